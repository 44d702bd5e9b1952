"""The version, in a module that costs nothing to import."""

__version__ = "0.1.0"
#: What pip knows this project as.
DISTRIBUTION = "gradscope-diagnostics"


def release(text: str) -> tuple[int, ...]:
    """The first numbers of a version, comparable: (2, 13, 0, 0) of ``2.13.0+cpu`` and ``2.13``."""
    numbers: list[int] = []
    for part in text.split("."):
        digits = part[: len(part) - len(part.lstrip("0123456789"))]
        numbers += [int(digits)] if digits else []
        if digits != part:
            break
    return (*numbers, 0, 0, 0, 0)[:4]
