"""Rules about rows: output units, filters and tokens that are dead, equal or untrained."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from gradscope.report.rules import Observation, rule
from gradscope.report.severity import Severity
from gradscope.statistics.records import UnitPart, Units
from gradscope.text import listed
from gradscope.weights.result import Examined, Need, TensorResult
from gradscope.weights.roles import MATRICES, TABLES, Role
from gradscope.weights.rules.tensors import with_units


def _judged(
    examined: Examined, count: Callable[[Units | UnitPart], int]
) -> Iterator[tuple[TensorResult, Units, str]]:
    """What has units that a rule judges, with a word for it where it is a part of a tensor.

    Experts that are dead or copies, and the rows of routers, belong to `dead-expert`. Of stacked
    experts the one with the greatest share is judged, as it would be alone.
    """
    experts = examined.experts
    for tensor, units in with_units(examined, MATRICES - TABLES):
        if tensor.name in experts.routers:
            continue
        if tensor.role is not Role.EXPERTS or not units.parts:
            if not experts.covers(tensor.name):
                yield tensor, units, ""
            continue
        living = [n for n in range(len(units.parts)) if not experts.covers(tensor.name, n)]
        shares = {n: count(units.parts[n]) / units.parts[n].rows for n in living}
        if shares:
            worst = max(shares, key=lambda n: shares[n])
            yield tensor, _alone(units, units.parts[worst], worst), f" of expert {worst}"


def _alone(units: Units, part: UnitPart, number: int) -> Units:
    """A part's units as those of a tensor; parts have as many each."""
    first = number * part.rows
    pairs = ((a - first, b - first) for a, b in units.duplicates)
    return replace(
        units,
        rows=part.rows,
        dead_rows=part.dead_rows,
        dead=part.dead,
        duplicate_rows=part.duplicate_rows,
        duplicates=tuple(p for p in pairs if min(p) >= 0 and max(p) < part.rows),
    )


@rule("W105", "dead-units", Severity.HIGH, reads=Examined, needs=Need.STATISTICS)
def dead_units(
    examined: Examined, *, high: float = 0.30, medium: float = 0.10
) -> Iterator[Observation]:
    """Rows (output units, filters) whose L2 norm is below 1e-3 of the tensor's median row norm.

    They pass nothing on. A few are normal under batch norm: 29 of 106 convolutions of healthy
    mobile nets had some, so up to 10 % is info, up to 30 % medium. Rows of tables belong to
    `undertrained-rows`.
    """
    for tensor, units, what in _judged(examined, lambda units: units.dead_rows):
        share = units.dead_rows / units.rows
        if not units.dead_rows or units.rows < 2:
            continue
        severity = None if share > high else Severity.MEDIUM if share > medium else Severity.INFO
        yield Observation(
            tensor.name,
            f"{units.dead_rows:,} of {units.rows:,} rows{what} are dead ({share:.1%}): "
            f"{listed(units.dead, units.dead_rows, len(units.dead))}",
            "prune them; or, if training goes on, lower the learning rate, check the "
            "initialisation, or use an activation that does not saturate at zero",
            {
                "dead_rows": units.dead_rows,
                "rows": units.rows,
                "median_row_norm": units.norm_median,
                "affected_fraction": share,
            },
            threshold=high if severity is None else medium,
            severity=severity,
        )


@rule("W106", "duplicate-units", Severity.MEDIUM, reads=Examined, needs=Need.STATISTICS)
def duplicate_units(
    examined: Examined, *, medium: float = 0.10, least_numel: int = 8
) -> Iterator[Observation]:
    """Rows that repeat an earlier row bit for bit, apart from rows of zeros.

    Equal units compute the same and stay equal under equal gradients; trained rows of eight or
    more elements do not coincide by chance. Up to 10 % is info.
    """
    for tensor, units, what in _judged(examined, lambda units: units.duplicate_rows):
        if not units.duplicate_rows or tensor.row_numel < least_numel:
            continue
        share = units.duplicate_rows / units.rows
        pair = "".join(f"; row {b} equals row {a}" for a, b in units.duplicates[:1])
        yield Observation(
            tensor.name,
            f"{units.duplicate_rows:,} of {units.rows:,} rows{what} repeat an earlier one "
            f"({share:.1%}){pair}",
            "break the symmetry with a random initialisation, or merge the units",
            {
                "duplicate_rows": units.duplicate_rows,
                "rows": units.rows,
                "affected_fraction": share,
            },
            threshold=medium,
            severity=None if share > medium else Severity.INFO,
        )
