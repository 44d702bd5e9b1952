"""What the flow rules share: severities, and places and times in words."""

from __future__ import annotations

from collections.abc import Sequence

from gradscope.flow.result import Extent, Level
from gradscope.report.severity import Severity

#: The seeds' scale on ours.
SEVERITY = {
    "none": Severity.INFO,
    "mild": Severity.LOW,
    "moderate": Severity.MEDIUM,
    "severe": Severity.HIGH,
    "critical": Severity.CRITICAL,
}


def severity(level: Level) -> Severity:
    """The severity of a region's level."""
    return SEVERITY[level]


def place(layers: Sequence[str]) -> str:
    """The subject of a finding about adjacent layers."""
    return layers[0] if len(layers) == 1 else f"{layers[0]} … {layers[-1]}"


def some(layers: Sequence[str], most: int = 4) -> str:
    """A few names, and how many more."""
    rest = len(layers) - most
    return ", ".join(layers[:most]) + (f" and {rest} more" if rest > 0 else "")


def since(onset: tuple[int | None, int]) -> str:
    """When something began, as an interval."""
    after, until = onset
    if after is None:
        return f"from the first record on (step {until})"
    return f"since step {until}" if until - after == 1 else f"since step {after + 1}–{until}"


def span(extent: Extent) -> str:
    """When something began and whether it lasts."""
    return (
        f"{since(extent.onset)}, {'to the end' if extent.ongoing else f'until step {extent.end}'}"
    )


def plural(count: int, noun: str) -> str:
    """``1 layer``, ``2 layers``."""
    return f"{count:,} {noun}{'s' * (count != 1)}"
