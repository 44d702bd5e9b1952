"""Rules about rows: output units, filters and tokens that are dead, equal or untrained."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace

from gradscope.report.rules import Observation, rule
from gradscope.report.severity import Severity
from gradscope.statistics.records import UnitPart, Units
from gradscope.text import listed
from gradscope.weights.result import Examined, Need, TensorResult
from gradscope.weights.roles import MATRICES, TABLES, Role
from gradscope.weights.rules.tensors import LOST, with_units


@rule("W105", "dead-units", Severity.HIGH, reads=Examined, needs=Need.STATISTICS)
def dead_units(
    examined: Examined, *, high: float = LOST, medium: float = 0.10
) -> Iterator[Observation]:
    """Output units whose L2 norm is below 1e-3 of the reference norm of their tensor or part.

    They pass nothing on. Units are rows, or columns where a layer stores [in, out] (Conv1D, Flax
    kernels). The reference is the norm that a tenth of the units exceed, so that a dead majority
    cannot hide (the greatest unit of 594 healthy matrices had 28 times as much). Fused projections,
    gates and experts are judged part by part, and the worst part decides.

    A few are normal under batch norm: 29 of 106 convolutions of healthy mobile nets had some, so
    up to 10 % is info, up to 30 % medium. Rows of tables belong to `undertrained-rows`, experts
    that are dead to `dead-expert`.
    """
    for tensor, units in _judged(examined):
        share, worst = units.dead_rows / units.rows, _worst_share(units)
        if not units.dead_rows or units.rows < 2:
            continue
        severity = None if worst > high else Severity.MEDIUM if worst > medium else Severity.INFO
        yield Observation(
            tensor.name,
            f"{units.dead_rows:,} of {units.rows:,} {_called(tensor, units)}s are dead "
            f"({share:.1%}): {_where(units)}",
            "prune them; or, if training goes on, lower the learning rate, check the "
            "initialisation, or use an activation that does not saturate at zero",
            {
                "dead_rows": units.dead_rows,
                "rows": units.rows,
                "median_row_norm": units.norm_median,
                "reference_norm": units.reference,
                "affected_fraction": share,
            },
            threshold=high if severity is None else medium,
            severity=severity,
        )


def _judged(examined: Examined) -> Iterator[tuple[TensorResult, Units]]:
    """Matrices whose units these rules judge: what `dead-expert` speaks of is left out.

    Those are dead and copied experts, alone or in a stack, and the rows of routers.
    """
    experts = examined.experts
    for tensor, units in with_units(examined, MATRICES - TABLES):
        if tensor.name in experts.routers:
            continue
        if tensor.role is Role.EXPERTS and units.parts:
            told = {n for n in range(len(units.parts)) if experts.covers(tensor.name, n)}
            if len(told) < len(units.parts):
                yield tensor, _without(units, units.parts, told)
        elif not experts.covers(tensor.name):
            yield tensor, units


def _without(units: Units, parts: Sequence[UnitPart], told: Collection[int]) -> Units:
    """The units of the other experts, each by itself; experts have as many units each."""
    length = parts[0].rows
    kept = tuple(part for n, part in enumerate(parts) if n not in told)
    return replace(
        units,
        rows=sum(part.rows for part in kept),
        dead_rows=sum(part.dead_rows for part in kept),
        duplicate_rows=sum(part.duplicate_rows for part in kept),
        duplicates=tuple(
            (a, b)
            for a, b in units.duplicates
            if a // length == b // length and b // length not in told
        ),
        parts=kept,
    )


def _worst_share(units: Units) -> float:
    return max(part.dead_rows / part.rows for part in units.parts or (units,))


def _called(tensor: TensorResult, units: Units) -> str:
    """What a unit is along its axis."""
    if units.axis == 0 or tensor.role is Role.EXPERTS:
        return "row"
    return "column" if units.axis == len(tensor.shape) - 1 else "output channel"


def _where(units: Units) -> str:
    """Which units are dead: those of which parts, and which whole heads."""
    if units.parts is None:
        return _places(units)
    hit = [part for part in units.parts if part.dead_rows]
    told = (
        f"all of {part.name}"
        if part.dead_rows == part.rows
        else f"{part.dead_rows:,} of the {part.rows:,} of {part.name} ({_places(part)})"
        for part in hit
    )
    return listed(told, len(hit), 4)


def _places(units: Units | UnitPart) -> str:
    rows = listed(units.dead, units.dead_rows, len(units.dead))
    if not units.heads or not units.dead_heads:
        return rows
    heads = listed(units.dead_heads, len(units.dead_heads), 10)
    s = "s" * (len(units.dead_heads) > 1)
    return f"{rows}; all of head{s} {heads} of {units.heads}"


@rule("W106", "duplicate-units", Severity.MEDIUM, reads=Examined, needs=Need.STATISTICS)
def duplicate_units(
    examined: Examined, *, medium: float = 0.10, least_numel: int = 8
) -> Iterator[Observation]:
    """Rows that repeat an earlier row bit for bit, apart from rows of zeros.

    Equal units compute the same and stay equal under equal gradients; trained rows of eight or
    more elements do not coincide by chance. Up to 10 % is info, and so is a depthwise convolution
    of a single filter, as blurs and other constant filters are.
    """
    for tensor, units in _judged(examined):
        if not units.duplicate_rows or tensor.unit_numel < least_numel:
            continue
        share = units.duplicate_rows / units.rows
        worst = max(part.duplicate_rows / part.rows for part in units.parts or (units,))
        unit = _called(tensor, units)
        constant = tensor.role is Role.DEPTHWISE and units.duplicate_rows == units.rows - 1
        pair = "".join(f"; {unit} {b} equals {unit} {a}" for a, b in units.duplicates[:1])
        yield Observation(
            tensor.name,
            f"{units.duplicate_rows:,} of {units.rows:,} {unit}s repeat an earlier one "
            f"({share:.1%}){pair}",
            "nothing to do if this is a constant filter"
            if constant
            else "break the symmetry with a random initialisation, or merge the units",
            {
                "duplicate_rows": units.duplicate_rows,
                "rows": units.rows,
                "affected_fraction": share,
            },
            threshold=medium,
            severity=None if max(share, worst) > medium and not constant else Severity.INFO,
        )
