"""What ``gradscope weights`` shows of its result in a table."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import zip_longest

from rich.console import RenderableType
from rich.text import Text

from gradscope.report.formats import Display
from gradscope.report.formats.cells import Grid, health_text, number, sparkline, table
from gradscope.text import escaped, shortened
from gradscope.weights.cast_table import casts
from gradscope.weights.names import pattern
from gradscope.weights.result import TensorResult, WeightsResult
from gradscope.weights.roles import MATRICES, Role
from gradscope.weights.spectral_table import attentions, spectra

_SHOWN = 24
_NARROW_NAME = 32


def weights(result: WeightsResult, display: Display) -> Iterator[RenderableType | Grid]:
    """Notes, the model's health, elements by role, then tensors."""
    for note in result.notes:
        yield Text.assemble(("note ", "dim"), escaped(note))
    if result.health is not None:
        yield Text.assemble(
            "\nHealth ",
            health_text(result.health.score, result.health.status),
            f"   {result.overall.parameters:,} parameters in {result.overall.tensors:,} tensors",
        )
    if result.overall.by_role:
        yield Text("")
        yield _by_role(result)
    if result.casting is not None:
        yield from casts(result.casting, result.tensors, display)
    if any(t.spectrum is not None for t in result.tensors):
        yield from spectra(result.tensors, display)
    if result.attention:
        yield from attentions(result.attention, display)
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


def _tensors(tensors: Sequence[TensorResult], display: Display) -> Iterator[RenderableType | Grid]:
    """Every tensor off a terminal or when asked; else what multiplies, and what is unhealthy."""
    brief = display.width is not None and display.detail < 2
    groups = _brief(tensors) if brief else [[t] for t in tensors]
    shown = groups[:_SHOWN] if brief else groups
    wide = display.width is None or display.width >= 130
    room = display.width is None or display.width >= 110
    planned = any(t.cast_plan for t in tensors)
    measured = (
        *(("mean",) if wide else ()), "std", "abs max", "peak", "zeros", "health",
        *((("distribution", "left"),) if room else ()),
    )  # fmt: skip
    headers_only = all(t.statistics is None for t in tensors)
    columns = (
        ("tensor", "left"), ("shape", "left"), ("dtype", "left"),
        *((("cast to", "left"),) if planned else ()),
        *((("role", "left"),) if headers_only else measured),
    )  # fmt: skip
    row = _described if headers_only else partial(_row, display=display, planned=planned)
    rows = [row(group, wide=wide) for group in shown]
    if shown:
        yield Text("")
        yield _grid(columns, rows) if _in_file(display) else _table(columns, rows, shown)
    rest = len(tensors) - sum(map(len, shown))
    if rest:
        yield Text(f"… {rest:,} more tensors; -v shows every one", style="dim")


def _in_file(display: Display) -> bool:
    return display.width is None and not display.colour


def _grid(columns: Sequence[str | tuple[str, str]], rows: Sequence[list[str | Text]]) -> Grid:
    return Grid([(c, "right") if isinstance(c, str) else c for c in columns], rows)


def _table(
    columns: Sequence[str | tuple[str, str]],
    rows: Sequence[list[str | Text]],
    shown: Sequence[Sequence[TensorResult]],
) -> RenderableType:
    made = table(*columns)
    made.columns[0].min_width = min(_NARROW_NAME, max((len(g[0].name) for g in shown), default=0))
    for row in rows:
        made.add_row(*row[: len(made.columns)])
    return made


def _described(group: Sequence[TensorResult], wide: bool) -> list[str | Text]:
    """What a header tells of a tensor, or of several alike."""
    first = group[0]
    return [*_identity(group, first, wide), first.role]


def _identity(
    group: Sequence[TensorResult], first: TensorResult, wide: bool
) -> tuple[str, str, str]:
    """Name, shape, and dtype: of codes the scheme, which U8 or I32 would not tell."""
    many = f"  ×{len(group)}" if len(group) > 1 else ""
    name = shortened(pattern(first.name) if many else first.name)
    room = _NARROW_NAME - len(many)
    if not wide and len(name) > room:
        name = "…" + name[1 - room :]
    return name + many, "×".join(map(str, first.shape)) or "scalar", _kind(first)


def _kind(tensor: TensorResult) -> str:
    return tensor.dequantized.scheme if tensor.dequantized else tensor.dtype


def _row(
    group: Sequence[TensorResult], display: Display, wide: bool, planned: bool
) -> list[str | Text]:
    first = min(group, key=_score)
    s = first.statistics
    row: list[str | Text] = [
        *_identity(group, first, wide),
        *([first.cast_plan or "–"] if planned else []),
    ]
    if s is None:
        return [*row, *["–"] * (6 if wide else 5), ""]
    peak = first.outliers.peak_ratio if first.outliers is not None else None
    health = health_text(first.health.score, first.health.status) if first.health else "–"
    counts = first.histogram if wide else _halved(first.histogram)
    drawing = sparkline(counts, display.unicode)
    return [*row, *([number(s.mean)] if wide else []), number(s.std), number(s.abs_max),
            number(peak), _share(s.zero_fraction), health, drawing]  # fmt: skip


def _brief(tensors: Sequence[TensorResult]) -> list[list[TensorResult]]:
    """Tensors of one place of different layers together: the unhealthy first, then the largest."""
    groups: dict[object, list[TensorResult]] = {}
    for tensor in tensors:
        if tensor.role in MATRICES | {Role.QUANTIZED} or _score(tensor) < 100:
            band = tensor.health.status if tensor.health else ""
            key = (pattern(tensor.name), tensor.shape, _kind(tensor), tensor.cast_plan, band)
            groups.setdefault(key, []).append(tensor)
    return sorted(groups.values(), key=lambda g: (min(map(_score, g)), -sum(t.numel for t in g)))


def _halved(counts: Sequence[int]) -> list[int]:
    return [a + b for a, b in zip_longest(counts[::2], counts[1::2], fillvalue=0)]


def _score(tensor: TensorResult) -> float:
    return tensor.health.score if tensor.health is not None else 100.0


def _share(fraction: float | None) -> str:
    return "–" if fraction is None else "0" if fraction == 0 else f"{fraction:.2%}"
