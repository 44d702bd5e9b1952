"""What a page shows of ``gradscope verify``: where it differs, and every tensor."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from gradscope.fingerprints.result import TensorVerified, VerifyResult
from gradscope.report.panels import Chart, Column, Grid, Panel, Row, inline
from gradscope.text import listed, plural, shortened
from gradscope.weights.places import by_place, drawn_by_place

#: Inputs that are drawn; all of them are in the table.
_INPUTS = 4
#: Tensors whose damage is drawn.
_DAMAGED = 40
#: The worst first: a cell has the colour of the first that a tensor there has.
_COLOURS = {
    "changed": "@@critical", "missing": "@@high", "retyped": "@@medium", "reshaped": "@@medium",
    "rearranged": "@@low", "added": "@@line4", "match": "@@none",
}  # fmt: skip
_ORDER = list(_COLOURS)


def verify(result: VerifyResult) -> Iterator[Panel]:
    """The map of what differs, where in long tensors it does, and every tensor."""
    inputs = list(dict.fromkeys(t.input for t in result.tensors))
    for path in inputs[:_INPUTS]:
        of = f": {shortened(path, 60)}" if len(inputs) > 1 else ""
        tensors = [t for t in result.tensors if t.input == path]
        yield _map(tensors, of, result.manifest)
        if damaged := [t for t in tensors if t.between and t.shape]:
            yield _damage(damaged, of)
    if result.tensors:
        yield _tensors(sorted(result.tensors, key=lambda t: t.status == "match"))


# --- where ----------------------------------------------------------------------------------------


def _map(tensors: Sequence[TensorVerified], of: str, manifest: str) -> Chart:
    import altair as alt

    cells = [_cell(*place, inside) for place, inside in by_place(tensors, _leaf).items()]
    base, size = drawn_by_place(cells)
    found = {cell["status"] for cell in cells}
    shown = [status for status in _ORDER if status in found]
    chart = (
        base.mark_rect()
        .encode(
            color=alt.Color(
                "status:N",
                scale=alt.Scale(domain=shown, range=[_COLOURS[status] for status in shown]),
            ),
            tooltip=[alt.Tooltip("status:N"), alt.Tooltip("differ:N"), alt.Tooltip("tensors:Q")],
        )
        .properties(**size)
    )
    return Chart(
        f"Against the manifest{of}",
        f"{_counted(tensors)} {shortened(manifest, 60)}. Each cell is what one block has in one "
        "place, in the colour of what differs most there. One spot is a flipped bit or a torn "
        "copy; whole rows or columns are another version of the model.",
        chart.to_dict(),
    )


def _counted(tensors: Sequence[TensorVerified]) -> str:
    same = sum(t.status == "match" for t in tensors)
    counts = [(s, sum(t.status == s for t in tensors)) for s in _ORDER if s != "match"]
    others = "".join(f", {count:,} {status}" for status, count in counts if count)
    return f"{same:,} of {plural(len(tensors), 'tensor')} match{others}:"


def _leaf(tensor: TensorVerified) -> str:
    return tensor.name.rpartition(".")[2]


def _cell(block: str, row: str, inside: Sequence[TensorVerified]) -> Mapping[str, Any]:
    differ = [t for t in inside if t.status != "match"]
    return {
        "block": block,
        "row": row,
        "status": min((t.status for t in inside), key=_ORDER.index),
        "differ": listed((t.name for t in differ), len(differ)) or "none",
        "tensors": len(inside),
    }


def _damage(tensors: Sequence[TensorVerified], of: str) -> Chart:
    """The parts of long tensors that differ, as shares of each."""
    import altair as alt

    shown = tensors[:_DAMAGED]
    rows = [row for tensor in shown for row in _parts(tensor)]
    chart = (
        alt.Chart(inline(rows))
        .mark_bar(height=11)
        .encode(
            y=alt.Y("tensor:N", title=None, sort=None, axis=alt.Axis(labelLimit=300)),
            x=alt.X("from:Q", title="of its elements", scale=alt.Scale(domain=[0, 1]),
                    axis=alt.Axis(format="%")),
            x2="to:Q",
            color=alt.Color("colour:N", scale=None),
            tooltip=[alt.Tooltip("tensor:N"), alt.Tooltip("what:N"),
                     alt.Tooltip("first:Q", format=",", title="from element"),
                     alt.Tooltip("last:Q", format=",", title="to element")],
        )
        .properties(width=640, height={"step": 19})
    )  # fmt: skip
    left = len(tensors) - len(shown)
    return Chart(
        f"Where in the tensor{of}",
        "Long tensors are hashed in parts; the coloured ones differ. A single part is damage to "
        "the file, all of them are other values."
        + (f" Left out: {plural(left, 'tensor')}." if left else ""),
        chart.to_dict(),
    )


def _parts(tensor: TensorVerified) -> Iterator[Mapping[str, Any]]:
    numel = math.prod(tensor.shape or ())
    whole = ((0, numel),)
    for what, colour, ranges in (
        ("whole tensor", "@@none", whole),
        ("differs", "@@critical", tensor.between),
    ):
        for first, last in ranges:
            yield {
                "tensor": tensor.name, "what": what, "colour": colour, "first": first,
                "last": min(last, numel), "from": first / numel, "to": min(last, numel) / numel,
            }  # fmt: skip


# --- every tensor ---------------------------------------------------------------------------------


def _tensors(tensors: Sequence[TensorVerified]) -> Grid:
    several = len({t.input for t in tensors}) > 1
    columns = ["tensor", "status", "dtype", "shape", "between elements", *["input"] * several]
    return Grid(
        "Tensors",
        "Those that differ first. Parts of a large tensor are hashed by themselves: its damage "
        "lies between the elements that are named.",
        [Column(title, number=False) for title in columns],
        [Row([*_cells(t), *[t.input] * several]) for t in tensors],
    )


def _cells(t: TensorVerified) -> list[str | None]:
    shape = None if t.shape is None else "×".join(map(str, t.shape)) or "scalar"
    between = ", ".join(f"{first:,}–{last:,}" for first, last in t.between)
    return [t.name, t.status, t.dtype, shape, between or None]
