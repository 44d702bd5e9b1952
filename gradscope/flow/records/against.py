"""How a run differs from another."""

from __future__ import annotations

from typing import Literal

from gradscope.report.model import Record
from gradscope.report.severity import Severity


class Pair(Record):
    """A number of this run and of the other one."""

    here: float | None
    there: float | None


class LayerAgainst(Record):
    """One layer of both runs; positive is larger here."""

    layer_name: str
    #: Decades between the median RMS gradients of the last windows, and their joint spread.
    level: float | None
    spread: float | None
    #: Decades between the median update ratios.
    update: float | None
    #: The level differs by three spreads, and by a factor of two.
    differs: bool


class OnsetAgainst(Record):
    """Between which steps a kind of trouble first began in either run; None: it did not."""

    kind: Literal["vanishing", "exploding", "diverging"]
    here: tuple[int | None, int] | None
    there: tuple[int | None, int] | None


class FindingAgainst(Record):
    """A finding that one run has and the other has not, or has with another severity."""

    rule: str
    name: str
    subject: str
    here: Severity | None
    there: Severity | None


class Against(Record):
    """How this run differs from another one, over the steps that both have."""

    input: str
    first_step: int | None
    last_step: int | None
    layers: tuple[LayerAgainst, ...]
    only_here: tuple[str, ...]
    only_there: tuple[str, ...]
    efficiency: Pair
    #: The level of the loss at the last of these steps.
    loss: Pair
    onsets: tuple[OnsetAgainst, ...]
    findings: tuple[FindingAgainst, ...]
