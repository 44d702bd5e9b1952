"""Third parties' rules, methods, readers and formats: entry points, found and loaded here alone."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Literal

from gradscope.errors import UsageError

#: What can be added; the entry point group is ``gradscope.`` and this.
Kind = Literal["rules", "methods", "checkpoints", "histories", "formats"]


def plugins(kind: Kind) -> list[EntryPoint]:
    """The installed plugins of a kind in the order of their names; nothing is imported."""
    return list(_registered(kind, tuple(sys.path)))


@cache
def _registered(kind: Kind, _path: tuple[str, ...]) -> tuple[EntryPoint, ...]:
    """Read once: it takes a file of each installed package, so milliseconds."""
    found = entry_points(group=f"gradscope.{kind}")
    return tuple(sorted(found, key=lambda p: (p.name, p.value)))


def load(kind: Kind, point: EntryPoint) -> Any:
    """The object of a plugin. Raises UsageError, in one line, when it cannot be imported."""
    try:
        return point.load()
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a module may also call sys.exit when it is imported
        raise UsageError(
            f"the {kind} plugin {point.name!r} ({point.value}) failed to load: {_first(error)}; "
            "repair or uninstall the package that registers it"
        ) from error


def loaded(kind: Kind) -> Iterator[tuple[str, Any]]:
    """Every plugin of a kind with its name. Raises UsageError as ``load`` does."""
    for point in plugins(kind):
        yield point.name, load(kind, point)


def _first(error: BaseException) -> str:
    line = str(error).strip().split("\n", 1)[0]
    return f"{type(error).__name__}: {line}" if line else type(error).__name__
