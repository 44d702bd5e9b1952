"""The tables of ``--cast``: what each type costs and saves, and the plan that keeps enough."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.console import RenderableType
from rich.text import Text

from gradscope.report.formats import Display
from gradscope.report.formats.cells import table
from gradscope.text import listed, plural, shortened, size
from gradscope.weights.result import (
    Casting,
    CastPlan,
    CastSummary,
    KeptColumns,
    KeptExperts,
    TensorResult,
)

_NAMED = 3


def casts(
    found: Casting, tensors: Sequence[TensorResult], display: Display
) -> Iterator[RenderableType]:
    """A row for each type, then the plan."""
    yield Text.assemble("\nCasts", f"   stored {size(found.stored_bytes)}")
    yield _formats(found)
    if found.plan is not None:
        most = 10**9 if display.detail > 1 else _NAMED
        yield from _plan(found.plan, most)
        yield from _kept("columns", [line for t in tensors for line in _without_columns(t)], most)
        yield from _kept("experts", [line for t in tensors for line in _without_experts(t)], most)


def _formats(found: Casting) -> RenderableType:
    below = [] if found.plan is None else [f"< {found.plan.snr_db:g} dB"]
    made = table(
        ("type", "left"), "tensors", "size", "saved", "SNR dB", "worst dB", "overflow", "to zero",
        *below, ("worst tensor", "left"),
    )  # fmt: skip
    for s in found.formats:
        made.add_row(*_row(s, below=bool(below)))
    return made


def _row(s: CastSummary, below: bool) -> Iterator[str]:
    yield from (s.format, f"{s.tensors:,}", size(s.bytes), _share(s.saved_fraction))
    yield from (_level(s.snr_db), "overflows" if s.overflow_count else _level(s.worst_snr_db))
    yield from (f"{s.overflow_count:,}", f"{s.underflow_count:,}")
    if below:
        yield f"{s.below or 0:,}"
    yield shortened(s.worst_tensor or "–")


def _level(decibels: float | None) -> str:
    return "–" if decibels is None else "exact" if decibels == float("inf") else f"{decibels:.1f}"


def _share(fraction: float) -> str:
    return f"{fraction:.0%}"


def _plan(plan: CastPlan, most: int) -> Iterator[RenderableType]:
    """What to take for which tensors, and which to keep."""
    taken = ", ".join(f"{name} {count:,}" for name, count in plan.tensors.items())
    yield Text.assemble(
        f"At {plan.snr_db:g} dB or better, tensor by tensor: ",
        (f"{size(plan.bytes)}, {_share(plan.saved_fraction)} saved", "bold"),
        f"   {taken}" if taken else "",
    )
    if plan.exceptions:
        unlike = (f"{shortened(n)} ({t or 'kept'})" for n, t in plan.exceptions.items())
        yield Text(f"need more than their like: {listed(unlike, len(plan.exceptions), most)}")
    if plan.kept:
        names = listed(map(shortened, plan.kept), len(plan.kept), most)
        yield Text(f"keep {plural(len(plan.kept), 'tensor')} as stored: {names}", style="dim")


def _kept(what: str, lines: Sequence[str], most: int) -> Iterator[RenderableType]:
    """What would do with fewer bits, those of one place of different layers apart."""
    if lines:
        each = listed(lines, len(lines), most)
        yield Text(f"would do with fewer bits if a few {what} stayed as stored: {each}")


def _without_columns(tensor: TensorResult) -> Iterator[str]:
    if (kept := tensor.kept_columns) is not None:
        yield _without(tensor, kept, "column", kept.columns)


def _without_experts(tensor: TensorResult) -> Iterator[str]:
    if (kept := tensor.kept_experts) is not None:
        yield _without(tensor, kept, "expert", kept.experts)


def _without(
    tensor: TensorResult, kept: KeptColumns | KeptExperts, one: str, which: Sequence[int]
) -> str:
    named = listed(map(str, which), len(which))
    return (
        f"{shortened(tensor.name)} ({kept.format}: {_level(kept.cast_snr_db)} dB, "
        f"{_level(kept.snr_db)} dB without {one}{'s' * (len(which) > 1)} {named})"
    )
