"""What a page shows of ``gradscope verify``: what differs from the manifest, then all the rest."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from gradscope.fingerprints.result import TensorVerified, VerifyResult
from gradscope.report.panels import Column, Grid, Panel, Row


def verify(result: VerifyResult) -> Iterator[Panel]:
    """How many of each status, and every tensor, those that differ first."""
    yield Grid(
        "Against the manifest",
        result.manifest,
        (Column("status", number=False), Column("tensors", form=",")),
        [Row([status, count]) for status, count in result.counts.items()],
    )
    if result.tensors:
        yield _tensors(sorted(result.tensors, key=lambda t: t.status == "match"))


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
