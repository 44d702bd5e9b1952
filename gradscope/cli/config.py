"""``gradscope config``."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from gradscope.cli.command import command
from gradscope.cli.options import ConfigFrom, Isolated, ListFormat, Listing
from gradscope.cli.terminal import emit
from gradscope.text import escaped

if TYPE_CHECKING:
    from gradscope.report.config import Config, Origins


@command
def config(
    config: ConfigFrom = None, isolated: Isolated = False, format_: ListFormat = Listing.TABLE
) -> int:
    """The configuration in force, as a gradscope.toml that says where each value comes from."""
    from gradscope.cli.configuration import in_force

    found, origins = in_force(config or (), isolated)
    if format_ is Listing.JSON:
        shown = {key: {"value": v, "origin": o} for key, v, o in _settings(found, origins)}
        emit(json.dumps(shown, indent=1, default=str) + "\n")
    else:
        emit("".join(_lines(found, origins)))
    return 0


def _settings(config: Config, origins: Origins) -> Iterator[tuple[str, Any, str]]:
    """Key, value and origin of everything, thresholds by their whole names."""
    for name, value in config.model_dump(by_alias=True, exclude_none=True).items():
        if name != "rules":
            yield name, value, origins.get((name,), "default")
    for rule, given in config.rules.items():
        for name, value in given.items():
            yield f"rules.{rule}.{name}", value, origins.get(("rules", rule, name), "default")


def _lines(config: Config, origins: Origins) -> Iterator[str]:
    allow: list[Mapping[str, Any]] = []
    for key, value, origin in _settings(config, origins):
        if key == "allow":
            allow = list(value)
            continue
        yield f"{f'{key} = {_toml(value)}':<40}  # {escaped(origin)}\n"
    for entry in allow:
        yield f"\n[[allow]]  # {escaped(origins.get(('allow',), 'default'))}\n"
        yield from (f"{name} = {_toml(value)}\n" for name, value in entry.items())


def _toml(value: Any) -> str:
    """A value in TOML, which is JSON's spelling but for lists, dates and infinity."""
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_toml, value))}]"
    if isinstance(value, str):
        return f'"{"".join(map(_character, value))}"'
    return json.dumps(value) if isinstance(value, bool) else str(value)


def _character(c: str) -> str:
    """As a TOML string and a terminal can both take it; JSON's pairs of surrogates are no TOML."""
    if c.isprintable():
        return f"\\{c}" if c in '"\\' else c
    return f"\\u{ord(c):04x}" if ord(c) <= 0xFFFF else f"\\U{ord(c):08x}"
