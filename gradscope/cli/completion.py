"""What a shell offers where a value is wanted: names of the registries, without what is heavy.

Typer calls these with what is typed so far; of several values behind commas the last is completed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import suppress

import typer

from gradscope.errors import GradscopeError

Offered = Iterator[tuple[str, str]]


def _beginning(typed: str, offered: Iterable[tuple[str, str]]) -> Offered:
    """What begins as the last of the values that are typed, behind those before it."""
    before, comma, last = typed.rpartition(",")
    # A plug-in that does not import is told by the command itself.
    with suppress(GradscopeError):
        for name, said in offered:
            if name.startswith(last):
                yield f"{before}{comma}{name}", said


def formats(incomplete: str) -> Offered:
    """Names for ``--format``."""
    from gradscope.report.formats import format_names

    yield from _beginning(incomplete, ((name, "") for name in format_names()))


def reports(incomplete: str) -> Offered:
    """``FORMAT=`` for ``--report``; the shell goes on with the path."""
    from gradscope.report.formats import PICTURES, TRACKERS, format_names

    names = (*format_names(), *PICTURES, *TRACKERS)
    yield from _beginning(incomplete, ((f"{name}=", "") for name in names))


def rules(ctx: typer.Context, incomplete: str) -> Offered:
    """Names and codes of the rules that the command asks (`rules`: all), with what they find."""
    from gradscope.report.rules import load_rules

    def offered() -> Offered:
        for rule in load_rules().values():
            if ctx.info_name in ("rules", rule.reads.command):
                yield rule.name, rule.summary
                yield rule.code, rule.summary

    yield from _beginning(incomplete, offered())


def methods(incomplete: str) -> Offered:
    """Names of attribution methods, each with what its map is."""
    from gradscope.attribution.methods import methods as known

    yield from _beginning(incomplete, ((m.name, m.summary) for m in known().values()))


def types(incomplete: str) -> Offered:
    """Types for ``--cast``."""
    from gradscope.casts.formats import TARGETS

    yield from _beginning(incomplete, ((name, "") for name in TARGETS))


def devices(incomplete: str) -> Offered:
    """Devices by name; which of them there are is not asked, for that would import torch."""
    yield from _beginning(incomplete, ((name, "") for name in ("cpu", "cuda", "auto")))


def palettes(incomplete: str) -> Offered:
    """Colour schemes of pages and charts."""
    from gradscope.report.palettes import PALETTES

    yield from _beginning(incomplete, ((name, "") for name in PALETTES))
