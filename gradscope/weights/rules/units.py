"""Rules about rows: output units, filters and tokens that are dead, equal or untrained."""

from __future__ import annotations

from collections.abc import Iterator

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
    up to 10 % is info, up to 30 % medium. Rows of embeddings belong to `undertrained-rows` until
    they are more than 30 %.
    """
    for tensor, units in with_units(examined, MATRICES):
        share, worst = units.dead_rows / units.rows, _worst_share(units)
        if not units.dead_rows or units.rows < 2 or (tensor.role in TABLES and share <= high):
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
    for tensor, units in with_units(examined, MATRICES - TABLES):
        if not units.duplicate_rows or tensor.unit_numel < least_numel:
            continue
        share = units.duplicate_rows / units.rows
        first, second = units.duplicates[0]
        unit = _called(tensor, units)
        constant = tensor.role is Role.DEPTHWISE and units.duplicate_rows == units.rows - 1
        yield Observation(
            tensor.name,
            f"{units.duplicate_rows:,} of {units.rows:,} {unit}s repeat an earlier one "
            f"({share:.1%}); {unit} {second} equals {unit} {first}",
            "nothing to do if this is a constant filter"
            if constant
            else "break the symmetry with a random initialisation, or merge the units",
            {
                "duplicate_rows": units.duplicate_rows,
                "rows": units.rows,
                "affected_fraction": share,
            },
            threshold=medium,
            severity=None if share > medium and not constant else Severity.INFO,
        )


@rule("W114", "undertrained-rows", Severity.MEDIUM, reads=Examined, needs=Need.STATISTICS)
def undertrained_rows(examined: Examined, *, medium: float = 0.20) -> Iterator[Observation]:
    """Rows of an embedding that were hardly trained: nearly zero, or equal to another.

    Reserved and padding tokens are such rows in most released models (Land and Bartolo 2024,
    arXiv 2405.05417); a prompt that contains one gives undefined output. Above 20 %: medium.
    """
    for tensor, units in with_units(examined, TABLES):
        found = units.dead_rows + units.duplicate_rows
        if not found or units.rows < 16:
            continue
        share = found / units.rows
        rows = sorted({*units.dead, *(second for _, second in units.duplicates)})[:10]
        named = listed(rows, found, len(rows))
        yield Observation(
            tensor.name,
            f"{found:,} of {units.rows:,} rows look untrained ({share:.1%}; {units.dead_rows:,} "
            f"nearly zero, {units.duplicate_rows:,} equal to another): {named}",
            "keep these token ids out of prompts and of the tokenizer's special tokens",
            {
                "dead_rows": units.dead_rows,
                "duplicate_rows": units.duplicate_rows,
                "rows": units.rows,
                "affected_fraction": share,
            },
            threshold=medium,
            severity=None if share > medium else Severity.INFO,
        )
