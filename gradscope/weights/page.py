"""What a page shows of ``gradscope weights``: where the damage is, what the values are like."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from gradscope.report.panels import Chart, Column, Grid, Panel, Row, inline
from gradscope.text import shortened, size
from gradscope.weights.places import by_place, drawn_by_place
from gradscope.weights.result import Casting, TensorResult, WeightsResult
from gradscope.weights.roles import AUXILIARY

#: Inputs that are drawn; all of them are in the table.
_INPUTS = 4
#: Roles that are drawn, those with the most parameters first, and tensors that make a series.
_ROLES, _SERIES = 6, 3
_STATUSES = ("critical", "poor", "fair", "good", "excellent")


def weights(result: WeightsResult) -> Iterator[Panel]:
    """The map of health, quantiles by depth, what was asked for beside them, and every tensor."""
    inputs = list(dict.fromkeys(t.input for t in result.tensors))
    for path in inputs[:_INPUTS]:
        of = f" of {shortened(path, 60)}" if len(inputs) > 1 else ""
        judged = [t for t in result.tensors if t.health is not None and t.input == path]
        described = [t for t in judged if t.statistics is not None and t.statistics.quantiles]
        health = [_health(judged, of)] if len(judged) > 1 else []
        values = [_quantiles(series, of)] if (series := _series(described)) else []
        # A map without a spot on it is no news.
        spotless = all(_score(t) == 100 for t in judged)
        yield from (*values, *health) if spotless else (*health, *values)
    if result.casting is not None:
        yield _casts(result.casting)
    if any(t.spectrum is not None for t in result.tensors):
        yield _spectra(result.tensors)
    if result.tensors:
        yield _tensors(result.tensors)


# --- health ---------------------------------------------------------------------------------------


def _health(tensors: Sequence[TensorResult], of: str) -> Chart:
    import altair as alt

    cells = [_cell(*place, inside) for place, inside in by_place(tensors, _role).items()]
    base, size = drawn_by_place(cells)
    chart = (
        base.mark_rect()
        .encode(
            color=alt.Color(
                "status:N",
                title="health",
                scale=alt.Scale(
                    domain=list(_STATUSES),
                    range=["@@critical", "@@high", "@@medium", "@@low", "@@none"],
                ),
            ),
            tooltip=[alt.Tooltip("tensor:N"), alt.Tooltip("score:Q", title="health"),
                     alt.Tooltip("tensors:Q")],
        )
        .properties(**size)
    )  # fmt: skip
    return Chart(
        f"Health by place{of}",
        "Each cell is what one block has in one place; its colour is that of the worst tensor "
        "there. Health falls by findings alone: a map in grey has none.",
        chart.to_dict(),
    )


def _role(tensor: TensorResult) -> str:
    return str(tensor.role)


def _cell(block: str, row: str, inside: Sequence[TensorResult]) -> dict[str, Any]:
    worst = min(inside, key=_score)
    assert worst.health is not None
    return {
        "block": block,
        "row": row,
        "tensor": worst.name,
        "score": worst.health.score,
        "status": worst.health.status,
        "tensors": len(inside),
    }


def _score(tensor: TensorResult) -> float:
    return 100.0 if tensor.health is None else tensor.health.score


# --- quantiles ------------------------------------------------------------------------------------


def _series(tensors: Sequence[TensorResult]) -> Mapping[str, Sequence[TensorResult]]:
    """The tensors of the largest roles, in file order."""
    roles: dict[str, list[TensorResult]] = defaultdict(list)
    for tensor in tensors:
        if tensor.role not in AUXILIARY:
            roles[str(tensor.role)].append(tensor)
    long = {role: those for role, those in roles.items() if len(those) >= _SERIES}
    largest = sorted(long, key=lambda role: -sum(t.numel for t in long[role]))[:_ROLES]
    return {role: long[role] for role in largest}


def _quantiles(series: Mapping[str, Sequence[TensorResult]], of: str) -> Chart:
    import altair as alt

    rows = [row for role, tensors in series.items() for row in _bands(role, tensors)]
    base = alt.Chart(inline(rows)).encode(
        x=alt.X("depth:Q", title="tensor, in file order", axis=alt.Axis(tickMinStep=1)),
        tooltip=[alt.Tooltip("tensor:N"), alt.Tooltip("median:Q", format=".4g"),
                 alt.Tooltip("q1:Q", format=".4g", title="1 %"),
                 alt.Tooltip("q99:Q", format=".4g", title="99 %")],
    )  # fmt: skip
    value = alt.Y("q1:Q", title="value")
    layers = alt.layer(
        base.mark_area(color="@@line1", opacity=0.22).encode(y=value, y2="q99:Q"),
        base.mark_area(color="@@line1", opacity=0.45).encode(y=alt.Y("q25:Q"), y2="q75:Q"),
        base.mark_line(color="@@line2", strokeWidth=1.5).encode(y=alt.Y("median:Q")),
    ).properties(width=330, height=130)
    chart = layers.facet(
        facet=alt.Facet("role:N", title=None, sort=list(series)), columns=3
    ).resolve_scale(x="independent", y="independent")
    return Chart(
        f"Values by depth and role{of}",
        "The line is the median of each tensor, the dark band holds half of its values, the light "
        "one all but the outer 2 %. A band that widens, collapses or jumps is where to look. "
        "Neighbours of a long series are one point, whose light band holds those of all.",
        chart.to_dict(),
    )


#: Points of a series: more than pixels there are for it.
_POINTS = 400


def _bands(role: str, tensors: Sequence[TensorResult]) -> Iterator[dict[str, Any]]:
    each = -(-len(tensors) // _POINTS)
    for first in range(0, len(tensors), each):
        together = [(t, _quantiles_of(t)) for t in tensors[first : first + each]]
        widest, _ = max(together, key=lambda pair: _width(pair[1]))
        q = {name: [q[name] for _, q in together if name in q] for name in _BANDS}
        yield {
            "role": role, "depth": first, "tensor": widest.name, "median": _median(q["0.5"]),
            "q1": min(q["0.01"]), "q25": _median(q["0.25"]), "q75": _median(q["0.75"]),
            "q99": max(q["0.99"]),
        }  # fmt: skip


#: The quantiles that are drawn.
_BANDS = ("0.01", "0.25", "0.5", "0.75", "0.99")


def _quantiles_of(tensor: TensorResult) -> Mapping[str, float]:
    assert tensor.statistics is not None
    return tensor.statistics.quantiles or {}


def _width(q: Mapping[str, float]) -> float:
    return q["0.99"] - q["0.01"]


def _median(values: Sequence[float]) -> float:
    return sorted(values)[len(values) // 2]


# --- casts and spectra ----------------------------------------------------------------------------


def _casts(found: Casting) -> Grid:
    planned = (
        ""
        if found.plan is None
        else (
            f" At {found.plan.snr_db:g} dB or better, tensor by tensor, {size(found.plan.bytes)} "
            f"are left ({found.plan.saved_fraction:.0%} saved)."
        )
    )
    return Grid(
        "Casts",
        f"What each type costs and saves of {size(found.stored_bytes)}.{planned}",
        (
            Column("type", number=False), Column("tensors", form=","), Column("bytes", form=","),
            Column("saved", form="%"), Column("SNR dB"), Column("worst dB"),
            Column("overflow", form=","), Column("to zero", form=","),
            Column("worst tensor", number=False),
        ),
        [
            Row([
                s.format, s.tensors, s.bytes, s.saved_fraction, s.snr_db, s.worst_snr_db,
                s.overflow_count, s.underflow_count, s.worst_tensor,
            ])
            for s in found.formats
        ],
    )  # fmt: skip


_OF_SPECTRA = {
    "norm": "spectral_norm", "as map": "operator_norm", "stable rank": "stable_rank",
    "effective rank": "effective_rank", "alpha": "alpha", "tail": "alpha_tail_count",
    "edge": "mp_edge", "spikes": "spikes",
}  # fmt: skip


def _spectra(tensors: Sequence[TensorResult]) -> Grid:
    return Grid(
        "Spectra",
        "What the singular values of each matrix say. Compare alpha between layers of one shape, "
        "and trust it from tails of 50 values on.",
        (
            Column("tensor", number=False), Column("shape", number=False), *map(Column, _OF_SPECTRA)
        ),
        [
            Row([
                t.name, "×".join(map(str, t.shape)),
                *(getattr(t.spectrum, field) for field in _OF_SPECTRA.values()),
            ])
            for t in tensors
            if t.spectrum is not None
        ],
    )  # fmt: skip


# --- tensors --------------------------------------------------------------------------------------

_COLUMNS_SHOWN = (
    Column("tensor", number=False), Column("role", number=False), Column("dtype", number=False),
    Column("shape", number=False), Column("elements", form=","), Column("mean"), Column("std"),
    Column("abs max"), Column("kurtosis"), Column("zeros", form="%"), Column("dead rows", form=","),
    Column("health"),
)  # fmt: skip


def _tensors(tensors: Sequence[TensorResult]) -> Grid:
    several = len({t.input for t in tensors}) > 1
    return Grid(
        "Tensors",
        "Click a heading to sort, a name for its histogram and quantiles.",
        [*_COLUMNS_SHOWN, *[Column("input", number=False)] * several],
        [_row(tensor, [tensor.input] * several) for tensor in tensors],
    )


def _row(tensor: TensorResult, last: Sequence[str]) -> Row:
    s = tensor.statistics
    cells: list[Any] = [
        tensor.name, str(tensor.role), tensor.dtype, "×".join(map(str, tensor.shape)) or "scalar",
        tensor.numel,
    ]  # fmt: skip
    if s is None:
        return Row([*cells, *[None] * 7, *last])
    q = s.quantiles or {}
    more: list[tuple[str, Any]] = [(f"{float(p):g} quantile", v) for p, v in q.items()]
    more += [
        ("min", s.min), ("max", s.max), ("skewness", s.skewness), ("NaN", s.nan_count),
        ("Inf", s.posinf_count + s.neginf_count), ("entropy bits", s.entropy_bits),
    ]  # fmt: skip
    if tensor.outliers is not None:
        more.append(("peak ratio", tensor.outliers.peak_ratio))
    dead = tensor.units.dead_rows if tensor.units is not None else None
    score = tensor.health.score if tensor.health is not None else None
    return Row(
        [*cells, s.mean, s.std, s.abs_max, s.kurtosis, s.zero_fraction, dead, score, *last],
        [(name, value) for name, value in more if value is not None],
        tensor.histogram,
        (q.get("0.001"), q.get("0.999")),
    )
