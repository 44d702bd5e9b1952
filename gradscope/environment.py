"""What this installation is made of and what is wrong with it: versions, extras, devices, plug-ins.

Requirements are read from the metadata of the distribution, never listed again.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from itertools import groupby
from pathlib import Path
from typing import get_args

from gradscope.device import devices
from gradscope.errors import UsageError
from gradscope.plugins import Kind, load, plugins
from gradscope.text import plural
from gradscope.version import DISTRIBUTION, __version__, release

#: PyPI's package of this name is another project, with a command of the same name.
NAMESAKE = "gradscope"
#: Extras for work on the project itself.
_OWN = ("dev", "test", "oracles", "frameworks")
_REQUIREMENT = re.compile(r"([\w.-]+?)>=([\d.]+)(?:\s*;\s*extra\s*==\s*['\"](\w+)['\"])?")


@dataclass(frozen=True, slots=True)
class Fact:
    """Something about the installation; ``problem`` says what to do where it is wrong."""

    about: str
    name: str
    value: str
    problem: str | None = None


@dataclass(frozen=True, slots=True)
class Requirement:
    """A package of at least a version; for an extra, or for everything."""

    package: str
    least: str
    extra: str | None


def facts() -> Iterator[Fact]:
    """All that is known, without a look at any input."""
    import platform  # here, for it imports much of what starting processes needs

    yield Fact("program", "gradscope", f"{__version__}, in {Path(__file__).parents[1]}")
    yield Fact("program", "python", f"{platform.python_version()}, {platform.platform()}")
    yield Fact("program", "cores", str(os.cpu_count()))
    yield from _namesake()
    yield from _packages()
    yield from _devices()
    yield from _plugins()


def installed(package: str) -> str | None:
    """The version of a distribution; None where it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def requirements() -> list[Requirement]:
    """What the distribution needs; nothing where it runs without being installed."""
    try:
        said = requires(DISTRIBUTION) or []
    except PackageNotFoundError:
        return []
    found = (_REQUIREMENT.fullmatch(text.strip()) for text in said)
    return [Requirement(m[1], m[2], m[3]) for m in found if m]


def _namesake() -> Iterator[Fact]:
    if other := installed(NAMESAKE):
        yield Fact(
            "program",
            NAMESAKE,
            f"{other}, another project",
            f"either may own the command; uninstall one, or call `python -m gradscope` of "
            f"{DISTRIBUTION}",
        )


def _packages() -> Iterator[Fact]:
    everything = requirements()
    if not everything:
        yield Fact("packages", DISTRIBUTION, "not installed: it runs from its source")
    yield from (_package(r) for r in everything if r.extra is None)
    extras = sorted((r for r in everything if r.extra), key=lambda r: str(r.extra))
    for extra, group in groupby(extras, key=lambda r: r.extra):
        lacking = [r.package for r in group if _too_old(r.least, installed(r.package))]
        if extra not in _OWN:
            remedy = f"without {', '.join(lacking)}: pip install '{DISTRIBUTION}[{extra}]'"
            yield Fact("extras", str(extra), remedy if lacking else "installed")


def _package(wanted: Requirement) -> Fact:
    found = installed(wanted.package)
    old = _too_old(wanted.least, found)
    return Fact(
        "packages",
        wanted.package,
        found or "not installed",
        f"at least {wanted.least} is needed: pip install '{wanted.package}>={wanted.least}'"
        if old
        else None,
    )


def _too_old(least: str, found: str | None) -> bool:
    return found is None or release(found) < release(least)


def _devices() -> Iterator[Fact]:
    try:
        found = devices()
    except Exception as error:  # a torch that does not import fails in any way
        first = str(error).split("\n", 1)[0]
        yield Fact("devices", "torch", "does not import", f"{type(error).__name__}: {first}")
        return
    yield Fact("devices", "--device", ", ".join(found))


def _plugins() -> Iterator[Fact]:
    for kind in get_args(Kind):
        for point in plugins(kind):
            problem = None
            try:
                load(kind, point)
            except UsageError as error:
                problem = str(error)
            yield Fact("plug-ins", f"{kind}: {point.name}", point.value, problem)


def verdict(found: list[Fact]) -> str:
    """One line: whether anything is wrong."""
    wrong = sum(fact.problem is not None for fact in found)
    return f"{plural(wrong, 'problem')}" if wrong else "nothing is wrong"
