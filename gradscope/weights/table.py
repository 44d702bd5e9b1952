"""What ``gradscope weights`` shows of its result in a table."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from rich.console import RenderableType
from rich.text import Text

from gradscope.report.formats import Display
from gradscope.report.formats.table_ import (
    clean,
    health_text,
    number,
    section,
    sparkline,
    table,
)
from gradscope.weights.result import TensorResult, WeightsResult

_SHOWN = 24


@section("weights")
def parts(result: WeightsResult, display: Display) -> Iterator[RenderableType]:
    """Notes, the model's health, elements by role, then tensors."""
    for note in result.notes:
        yield Text.assemble(("note ", "dim"), clean(note, None))
    if result.health is not None:
        yield Text.assemble(
            "\nHealth ",
            health_text(result.health.score, result.health.status),
            f"   {result.overall.parameters:,} parameters in {result.overall.tensors:,} tensors",
        )
    if result.overall.by_role:
        yield Text("")
        yield _by_role(result)
    if result.tensors:
        yield from _tensors(result.tensors, display)


def _by_role(result: WeightsResult) -> RenderableType:
    made = table(
        ("role", "left"), "tensors", "elements", "mean", "std", "min", "max", "kurtosis", "zeros"
    )
    for role, pool in result.overall.by_role.items():
        s = pool.statistics
        made.add_row(
            role, str(pool.tensors), f"{s.count:,}", number(s.mean), number(s.std), number(s.min),
            number(s.max), number(s.kurtosis), _share(s.zero_fraction),
        )  # fmt: skip
    return made


def _tensors(tensors: Sequence[TensorResult], display: Display) -> Iterator[RenderableType]:
    groups = _groups(tensors, together=display.width is not None and display.detail < 2)
    shown = groups if display.width is None or display.detail > 1 else groups[:_SHOWN]
    made = table(
        ("tensor", "left"), ("shape", "left"), ("dtype", "left"), "mean", "std", "abs max",
        "peak", "zeros", "health", ("distribution", "left"),
    )  # fmt: skip
    for group in shown:
        made.add_row(*_row(group, display))
    yield Text("")
    yield made
    if len(groups) > len(shown):
        rest = sum(len(g) for g in groups[len(shown) :])
        yield Text(f"… {rest} more tensors; -v shows every one", style="dim")


def _row(group: Sequence[TensorResult], display: Display) -> list[str | Text]:
    first = min(group, key=lambda t: t.health.score if t.health else 100.0)
    name = clean(_pattern(first.name) if len(group) > 1 else first.name)
    s = first.statistics
    row: list[str | Text] = [
        name + (f"  ×{len(group)}" if len(group) > 1 else ""),
        "×".join(map(str, first.shape)) or "scalar",
        first.dtype,
    ]
    if s is None:
        return [*row, *["–"] * 6, ""]
    peak = first.outliers.peak_ratio if first.outliers is not None else None
    health = health_text(first.health.score, first.health.status) if first.health else "–"
    drawing = sparkline(first.histogram, display.unicode)
    return [*row, number(s.mean), number(s.std), number(s.abs_max), number(peak),
            _share(s.zero_fraction), health, drawing]  # fmt: skip


def _groups(tensors: Sequence[TensorResult], together: bool) -> list[list[TensorResult]]:
    """Tensors of the same place of different layers together, the unhealthy first."""
    groups: dict[object, list[TensorResult]] = {}
    for place, tensor in enumerate(tensors):
        band = tensor.health.status if tensor.health else ""
        key = (_pattern(tensor.name), tensor.shape, tensor.dtype, band) if together else place
        groups.setdefault(key, []).append(tensor)
    if not together:
        return list(groups.values())
    return sorted(
        groups.values(), key=lambda g: min(t.health.score if t.health else 100 for t in g)
    )


def _pattern(name: str) -> str:
    return re.sub(r"(?<![^.])\d+(?![^.])", "*", name)


def _share(fraction: float | None) -> str:
    return "–" if fraction is None else "0" if fraction == 0 else f"{fraction:.2%}"
