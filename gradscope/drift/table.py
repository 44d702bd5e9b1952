"""What ``gradscope drift`` shows of its result in a table."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from rich.console import RenderableType
from rich.text import Text

from gradscope.drift.result import DriftResult, Merge, Pooled, Series, TensorDrift
from gradscope.report.formats import Display
from gradscope.report.formats.cells import Grid, number, sparkline, table
from gradscope.report.severity import Severity
from gradscope.text import escaped, plural, shortened
from gradscope.weights.names import pattern

_SHOWN = 24
_NARROW_NAME = 32
#: In the order in which a reader wants to know.
_STATUSES = (
    "identical", "retyped", "rounding", "changed", "replaced", "reshaped", "added", "removed",
    "not compared",
)  # fmt: skip
_STYLES = {
    "identical": "green", "retyped": "green", "rounding": "green", "changed": "yellow",
    "replaced": "bold red", "reshaped": "red", "added": "cyan", "removed": "red",
}  # fmt: skip
#: Octaves of relative change that a sparkline shows, two a character.
_OCTAVES = range(-24, 2, 2)


def drift(result: DriftResult, display: Display) -> Iterator[RenderableType | Grid]:
    """Notes, what became of how many tensors, drift by role, then tensors."""
    for note in result.notes:
        yield Text.assemble(("note ", "dim"), escaped(note))
    yield _summary(result)
    if result.merges:
        yield Text(_merged(result.merges))
    if result.by_role and any(p.identical < p.tensors for p in result.by_role.values()):
        yield Text("")
        yield _pools("role", result.by_role)
    if result.series is not None:
        yield from _series(result.series, display)
    yield from _tensors(result.tensors, display)


def _merged(merges: Sequence[Merge]) -> str:
    """How far what the adapter changes is from the merge."""
    unknown = [m for m in merges if m.residual_ulps is None and m.share_error is None]
    idle = [m for m in merges if m.unchanged]
    away = [m.residual_ulps for m in merges if m.residual_ulps is not None and not m.unchanged]
    coded = [m.share for m in merges if m.share_error is not None and m.share is not None]
    said = [
        f"at most {max(away):.3g} units in the last place (rms) from the merge" if away else "",
        f"{min(coded):.3g} to {max(coded):.3g} of the product in codes" if coded else "",
        f"{len(idle):,} unchanged" if idle else "",
        f"{len(unknown):,} not compared" if unknown else "",
    ]
    return f"{plural(len(merges), 'module')} of the adapter: {', '.join(filter(None, said))}"


def _series(series: Series, display: Display) -> Iterator[RenderableType]:
    """The way of each layer from the first checkpoint to the last, the farthest first."""
    brief = display.width is not None and display.detail < 2
    layers = list(series.layers)
    if brief:
        layers = sorted(layers, key=lambda p: -p.distance[-1])[:_SHOWN]
    yield Text(
        f"\n{len(series.checkpoints)} checkpoints, {escaped(series.checkpoints[0])} … "
        f"{escaped(series.checkpoints[-1])}"
    )
    made = table(
        ("layer", "left"), "distance", ("from the first", "left"), "last step", ("steps", "left"),
        "turn", ("", "left"),
    )  # fmt: skip
    for path in layers:
        cosines = [c for c in path.cosine if c is not None]
        said = [
            f"froze after {path.froze_after}" if path.froze_after else "",
            f"jumped at {path.jumped_at}" if path.jumped_at else "",
        ]
        made.add_row(
            shortened(path.layer_name), number(path.distance[-1]),
            sparkline(_resampled(path.distance), display.unicode), number(path.step_length[-1]),
            sparkline(_resampled(path.step_length), display.unicode),
            f"{sum(cosines) / len(cosines):.2f}" if cosines else "–",
            escaped(", ".join(filter(None, said))),
        )  # fmt: skip
    yield made
    if len(layers) < len(series.layers):
        rest = len(series.layers) - len(layers)
        yield Text(f"… {rest:,} more layers; -v shows every one", style="dim")


def _resampled(values: Sequence[float], most: int = 24) -> list[float]:
    """At most so many of a series, evenly, its ends among them."""
    if len(values) <= most:
        return list(values)
    return [values[round(k * (len(values) - 1) / (most - 1))] for k in range(most)]


def _summary(result: DriftResult) -> RenderableType:
    counted = [(s, result.counts[s]) for s in _STATUSES if result.counts.get(s)]
    parts: list[str | tuple[str, str]] = ["\n"]
    for status, count in counted:
        parts += [(f"{count:,} {status}", _STYLES.get(status, "")), "  "]
    if result.max_drift:
        parts.append(
            f" drift {number(result.mean_drift)} on average, {number(result.max_drift)} at most"
        )
    return Text.assemble(*parts)


def _pools(heading: str, pools: Mapping[str, Pooled]) -> RenderableType:
    made = table(
        (heading, "left"), "tensors", "identical", "elements", "changed", "drift", "cosine"
    )
    for name, pool in pools.items():
        made.add_row(
            shortened(name), str(pool.tensors), str(pool.identical), f"{pool.numel:,}",
            _share(pool.changed_fraction), number(pool.relative_drift), _cosine(pool.cosine),
        )  # fmt: skip
    return made


def _tensors(tensors: Sequence[TensorDrift], display: Display) -> Iterator[RenderableType | Grid]:
    """What is not identical, the farthest first; tensors of one place of a stack together."""
    brief = display.width is not None and display.detail < 2
    differing = [t for t in tensors if t.status != "identical"]
    groups = _grouped(differing) if brief else [[t] for t in tensors]
    shown = groups[:_SHOWN] if brief else groups
    if not shown:
        return
    wide = display.width is None or display.width >= 130
    columns = (
        ("tensor", "left"), *((("shape", "left"), ("dtype", "left")) if wide else ()),
        ("status", "left"), "drift", "cosine", "changed", *(("flipped",) if wide else ()),
        ("2^-24…2^1", "left"), ("why", "left"),
    )  # fmt: skip
    rows = [_row(group, display, wide) for group in shown]
    yield Text("")
    if display.width is None and not display.colour:
        yield Grid([(c, "right") if isinstance(c, str) else c for c in columns], rows)
    else:
        made = table(*columns)
        made.columns[0].min_width = min(_NARROW_NAME, max(len(str(row[0])) for row in rows))
        made.columns[-1].no_wrap = False
        for row in rows:
            made.add_row(*row)
        yield made
    rest = len(differing) - sum(map(len, shown))
    if rest > 0 and brief:
        yield Text(f"… {rest:,} more tensors differ; -v shows every one", style="dim")


def _grouped(tensors: Sequence[TensorDrift]) -> list[list[TensorDrift]]:
    """What was only stored otherwise is one row; what training keeps comes last."""
    groups: dict[object, list[TensorDrift]] = {}
    for t in tensors:
        why = t.explanation
        key: object = (t.beside, t.status, t.base_dtype, t.dtype, why.text if why else None)
        if t.affected:
            kind = why.kind if why is not None else None
            key = (
                pattern(t.name),
                t.base_shape,
                t.shape,
                t.base_dtype,
                t.dtype,
                t.status,
                kind,
                t.beside,
            )
        groups.setdefault(key, []).append(t)
    return sorted(groups.values(), key=_order)


def _order(group: Sequence[TensorDrift]) -> tuple[bool, int, float]:
    return group[0].beside, -max(map(_rank, group)), -max(map(_drift, group))


def _rank(tensor: TensorDrift) -> int:
    return list(Severity).index(tensor.severity)


def _drift(tensor: TensorDrift) -> float:
    return tensor.relative_drift or 0.0


def _row(group: Sequence[TensorDrift], display: Display, wide: bool) -> list[str | Text]:
    worst = max(group, key=_drift)
    many = f"  ×{len(group)}" if len(group) > 1 else ""
    alike = len({pattern(t.name) for t in group}) == 1
    name = shortened(pattern(worst.name) if many else worst.name) + many
    name = name if alike else f"{len(group):,} tensors"
    status = worst.status or "–"
    where = [_between(_shape(worst.base_shape), _shape(worst.shape)),
             _between(worst.base_dtype, worst.dtype)]  # fmt: skip
    arrow = "←" if display.unicode else "<-"
    was = f"{arrow} {shortened(worst.base_name)}" if worst.base_name and not many else ""
    why = "; ".join(x for x in (worst.explanation.text if worst.explanation else "", was) if x)
    return [
        name, *(where if wide else ()), Text(status, style=_STYLES.get(status, "")),
        number(worst.relative_drift), _cosine(worst.cosine), _share(worst.changed_fraction),
        *([_share(worst.sign_flip_fraction)] if wide else ()),
        sparkline(_changes(worst), display.unicode), escaped(why),
    ]  # fmt: skip


def _between(base: str | None, new: str | None) -> str:
    if base is None or new is None or base == new:
        return new or base or ""
    return f"{base} → {new}"


def _shape(shape: tuple[int, ...] | None) -> str | None:
    return None if shape is None else "×".join(map(str, shape)) or "scalar"


def _changes(tensor: TensorDrift) -> list[int]:
    found = tensor.relative_changes
    if not found:
        return []
    return [found.get(f"2^{k}", 0) + found.get(f"2^{k + 1}", 0) for k in _OCTAVES]


def _cosine(value: float | None) -> str:
    """Near 1, what it lacks says more."""
    if value is None:
        return "–"
    return "1" if value > 1 - 1e-12 else f"1-{1 - value:.1g}" if value > 0.9999 else f"{value:.4f}"


def _share(fraction: float | None) -> str:
    return "–" if fraction is None else "0" if fraction == 0 else f"{fraction:.2%}"
