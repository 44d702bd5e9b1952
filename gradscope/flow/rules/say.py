"""What the flow rules share: severities, and places and times in words."""

from __future__ import annotations

from collections.abc import Sequence

from gradscope.flow.result import Extent, Level
from gradscope.report.severity import Severity
from gradscope.text import listed

#: The levels of the seeds on the scale of the report.
SEVERITY: dict[Level, Severity] = {
    "none": Severity.INFO,
    "mild": Severity.LOW,
    "moderate": Severity.MEDIUM,
    "severe": Severity.HIGH,
    "critical": Severity.CRITICAL,
}
_NAMES = 4


def place(layers: Sequence[str]) -> str:
    """The subject of a finding about adjacent layers."""
    return layers[0] if len(layers) == 1 else f"{layers[0]} … {layers[-1]}"


def several(layers: Sequence[str]) -> str:
    """A few names, and how many more."""
    return listed(layers, len(layers), _NAMES)


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
