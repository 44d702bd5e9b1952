"""What a page shows of ``gradscope drift``: what changed where, how much and why."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from gradscope.drift.result import DriftResult, TensorDrift
from gradscope.report.panels import Chart, Column, Grid, Panel, Row, inline
from gradscope.weights.names import place_of
from gradscope.weights.roles import TRAINING

_COLUMNS, _ROWS = 96, 60
#: Relative drift at which the colours begin and end.
_LEAST, _MOST = 1e-8, 1.0


def drift(result: DriftResult) -> Iterator[Panel]:
    """Change by block and place, by role, and every tensor."""
    model = (t for t in result.tensors if t.role not in TRAINING)
    changed = [t for t in model if t.relative_drift is not None]
    if len(changed) > 1:
        yield _map(changed)
    if len(result.by_role) > 1:
        yield _roles(result)
    if result.tensors:
        yield _tensors(result.tensors)


def _map(tensors: Sequence[TensorDrift]) -> Chart:
    import altair as alt

    cells = list(_cells(tensors))
    blocks = list(dict.fromkeys(cell["block"] for cell in cells))
    rows = list(dict.fromkeys(cell["row"] for cell in cells))
    base = alt.Chart(inline(cells)).encode(
        x=alt.X("block:O", sort=blocks, title="block, input to output",
                axis=alt.Axis(labelOverlap=True, labelLimit=120)),
        y=alt.Y("row:O", sort=rows, title=None, axis=alt.Axis(labelLimit=260)),
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
    chart = alt.layer(same, moved).properties(
        width={"step": max(6, min(26, 900 // len(blocks)))}, height={"step": 15}
    )
    return Chart(
        "Change by place",
        "‖new − base‖ / ‖base‖ of the tensor that moved farthest in each place. Grey is identical, "
        "dark is what rounding does, bright is another tensor.",
        chart.to_dict(),
    )


def _cells(tensors: Sequence[TensorDrift]) -> Iterator[Mapping[str, Any]]:
    placed = [(*place_of(t.name), t) for t in tensors]
    blocks = list(dict.fromkeys(block for block, _, _ in placed))
    together = -(-len(blocks) // _COLUMNS)
    column = {b: blocks[i // together * together] for i, b in enumerate(blocks)}
    coarse = len({row for _, row, _ in placed}) > _ROWS
    found: dict[tuple[str, str], list[TensorDrift]] = defaultdict(list)
    for block, row, tensor in placed:
        found[column[block], str(tensor.role) if coarse else row].append(tensor)
    for (block, row), inside in found.items():
        worst = max(inside, key=lambda t: t.relative_drift or 0.0)
        value = worst.relative_drift or 0.0
        yield {
            "block": block, "row": row, "tensor": worst.name, "drift": value,
            "status": worst.status, "tensors": len(inside),
            "log": round(math.log10(value), 3) if value > 0 else None,
        }  # fmt: skip


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
