"""What a page shows of ``gradscope drift``: what changed where, how much and why."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import PurePath
from typing import Any

from gradscope.drift.result import DriftResult, LayerPath, Merge, Series, TensorDrift
from gradscope.report.panels import Chart, Column, Grid, Panel, Row, inline
from gradscope.text import plural
from gradscope.weights.places import by_place, drawn_by_place
from gradscope.weights.roles import Role

#: Lines of a series that can still be told apart.
_PATHS = 60
#: Relative drift at which the colours begin and end.
_LEAST, _MOST = 1e-8, 1.0


def drift(result: DriftResult) -> Iterator[Panel]:
    """Change by block and place, the way there, the merge, change by role, and every tensor."""
    # What counts something moves by many times its norm, and says nothing.
    model = (t for t in result.tensors if not t.beside and t.role is not Role.COUNTER)
    changed = [t for t in model if t.relative_drift is not None]
    if len(changed) > 1:
        yield _map(changed)
    if result.series is not None and result.series.layers:
        yield _paths(result.series)
    if result.merges:
        yield _merges(result.merges)
    if len(result.by_role) > 1:
        yield _roles(result)
    if result.tensors:
        yield _tensors(result.tensors)


def _map(tensors: Sequence[TensorDrift]) -> Chart:
    import altair as alt

    cells = [_cell(*place, inside) for place, inside in by_place(tensors, _role).items()]
    plain, size = drawn_by_place(cells)
    base = plain.encode(
        tooltip=[alt.Tooltip("tensor:N"), alt.Tooltip("drift:Q", format=".3g"),
                 alt.Tooltip("status:N"), alt.Tooltip("tensors:Q")],
    )  # fmt: skip
    same = base.transform_filter("datum.log === null").mark_rect(color="@@none")
    moved = (
        base.transform_filter("datum.log !== null")
        .mark_rect()
        .encode(
            color=alt.Color(
                "log:Q",
                title="log₁₀ drift",
                scale=alt.Scale(
                    range=["@@amount0", "@@amount1", "@@amount2", "@@amount3", "@@amount4"],
                    domain=[math.log10(_LEAST), math.log10(_MOST)],
                    clamp=True,
                ),
            )
        )
    )
    return Chart(
        "Change by place",
        "‖new − base‖ / ‖base‖ of the tensor that moved farthest in each place. Grey is identical, "
        "dark is what rounding does, bright is another tensor.",
        alt.layer(same, moved).properties(**size).to_dict(),
    )


def _role(tensor: TensorDrift) -> str:
    return str(tensor.role)


def _cell(block: str, row: str, inside: Sequence[TensorDrift]) -> Mapping[str, Any]:
    worst = max(inside, key=lambda t: t.relative_drift or 0.0)
    value = worst.relative_drift or 0.0
    return {
        "block": block, "row": row, "tensor": worst.name, "drift": value,
        "status": worst.status, "tensors": len(inside),
        "log": round(math.log10(value), 3) if 0 < value < math.inf else None,
    }  # fmt: skip


def _paths(series: Series) -> Chart:
    """The distance of layers from the first checkpoint: those that stand out, and the farthest."""
    import altair as alt

    told = [path for path in series.layers if _ways(path) != "goes on"]
    rest = sorted((p for p in series.layers if p not in told), key=lambda p: -p.distance[-1])
    shown = [*reversed(rest[: max(0, _PATHS - len(told))]), *told[:_PATHS]]
    first, *later = _labels(series.checkpoints)
    rows = [row for path in shown for row in _points(path, later)]
    chart = (
        alt.Chart(inline(rows))
        .mark_line(point=len(series.checkpoints) < 30, strokeWidth=1.5)
        .encode(
            x=alt.X("checkpoint:O", sort=later, title=None,
                    axis=alt.Axis(labelOverlap=True, labelLimit=160)),
            y=alt.Y("distance:Q", title=f"distance from {first}",
                    scale=alt.Scale(type="log", nice=False),
                    axis=alt.Axis(format="~g", tickCount=4)),
            detail="layer:N",
            color=alt.Color("way:N", title="layer", scale=alt.Scale(
                domain=["jumped", "stopped", "goes on"], range=["@@high", "@@line1", "@@dim"])),
            opacity=alt.condition("datum.way === 'goes on'", alt.value(0.45), alt.value(1)),
            tooltip=[alt.Tooltip("layer:N"), alt.Tooltip("checkpoint:O"),
                     alt.Tooltip("distance:Q", format=".3g"),
                     alt.Tooltip("step:Q", format=".3g", title="from the one before")],
        )
        .properties(width=640, height=220)
    )  # fmt: skip
    left = len(series.layers) - len(shown)
    return Chart(
        "The way of each layer",
        "‖W − first‖ / ‖first‖ at each checkpoint, a line a layer, on a logarithmic scale. A line "
        "that leaps is where to look; one that goes flat while others rise stopped learning."
        + (f" Left out: {plural(left, 'layer')} that moved less." if left else ""),
        chart.to_dict(),
    )


def _ways(path: LayerPath) -> str:
    return "jumped" if path.jumped_at else "stopped" if path.froze_after else "goes on"


def _labels(checkpoints: Sequence[str]) -> Sequence[str]:
    """Names without their suffixes, where those are still different."""
    short = [PurePath(name).stem for name in checkpoints]
    return short if len(set(short)) == len(short) else checkpoints


def _points(path: LayerPath, checkpoints: Sequence[str]) -> Iterator[Mapping[str, Any]]:
    """What there is from the second checkpoint on: the first lies at no distance from itself."""
    for checkpoint, far, step in zip(checkpoints, path.distance[1:], path.step_length, strict=True):
        yield {
            "layer": path.layer_name, "checkpoint": checkpoint, "way": _ways(path),
            "distance": far if 0 < far < math.inf else None,
            "step": step if math.isfinite(step) else None,
        }  # fmt: skip


def _merges(merges: Sequence[Merge]) -> Grid:
    return Grid(
        "Modules of the adapter",
        "Each weight against the base with the adapter's product added: what is left, in units in "
        "the last place (root mean square), and how much of the product is there.",
        (
            Column("module", number=False), Column("weight", number=False),
            Column("found", number=False), Column("left, units"), Column("at most"),
            Column("of the product"), Column("cosine"), Column("scale"), Column("scale that fits"),
        ),
        [
            Row([m.module, m.name, _became(m), m.residual_ulps, m.max_ulps, m.share, m.cosine,
                 m.scale, m.fitted_scale])
            for m in merges
        ],
    )  # fmt: skip


def _became(merge: Merge) -> str:
    if merge.unchanged:
        return "unchanged"
    if merge.residual_ulps is None and merge.share_error is None:
        return f"not compared: {merge.reason}" if merge.reason else "not compared"
    return "compared"


def _roles(result: DriftResult) -> Grid:
    return Grid(
        "By role",
        "The elements of all tensors of a role as one.",
        (
            Column("role", number=False), Column("tensors", form=","),
            Column("identical", form=","), Column("elements", form=","), Column("drift"),
            Column("cosine"), Column("changed", form="%"),
        ),
        [
            Row([role, p.tensors, p.identical, p.numel, p.relative_drift, p.cosine,
                 p.changed_fraction])
            for role, p in result.by_role.items()
        ],
    )  # fmt: skip


def _tensors(tensors: Sequence[TensorDrift]) -> Grid:
    return Grid(
        "Tensors",
        "Click a heading to sort, a name for the largest changes.",
        (
            Column("tensor", number=False), Column("status", number=False),
            Column("why", number=False), Column("role", number=False),
            Column("elements", form=","), Column("drift"), Column("cosine"),
            Column("max change"), Column("changed", form="%"), Column("sign flips", form="%"),
        ),
        [
            Row(
                [
                    t.name, t.status, t.explanation.text if t.explanation else None, str(t.role),
                    t.numel, t.relative_drift, t.cosine, t.max_abs_change, t.changed_fraction,
                    t.sign_flip_fraction,
                ],
                list(_more(t)),
            )
            for t in tensors
        ],
    )  # fmt: skip


def _more(tensor: TensorDrift) -> Iterator[tuple[str, Any]]:
    if tensor.base_name:
        yield "in the base", tensor.base_name
    if tensor.base_dtype != tensor.dtype:
        yield "type", f"{tensor.base_dtype} → {tensor.dtype}"
    if tensor.norm_ratio is not None:
        yield "norm ratio", tensor.norm_ratio
    if tensor.ulps is not None:
        yield "farthest, in units in the last place", tensor.ulps.max
    for change in tensor.largest[:5]:
        yield f"{list(change.index)}", f"{change.base:.5g} → {change.new:.5g}"
    if tensor.rows is not None and tensor.rows.changed:
        yield "rows changed", f"{tensor.rows.changed:,} of {tensor.rows.total:,}"
