"""What a page shows of ``verify``."""

from __future__ import annotations

from typing import Any

from gradscope.fingerprints.page import verify
from gradscope.fingerprints.result import TensorVerified, VerifyResult


def tensor(name: str, status: Any, **fields: Any) -> TensorVerified:
    plain = {"input": "m.pt", "dtype": "F32", "shape": (4, 4)}
    return TensorVerified(name=name, status=status, **(plain | fields))


def test_what_differs_comes_first_and_nothing_is_left_out() -> None:
    tensors = (
        tensor("a", "match"),
        tensor("b", "changed", between=((0, 1 << 20), (1 << 21, 3 << 20))),
        tensor("c", "missing", dtype=None, shape=None),
        tensor("d", "match", shape=()),
    )
    counts = {"match": 2, "changed": 1, "missing": 1}

    summary, grid = verify(VerifyResult(tensors=tensors, manifest="m.json", counts=counts))

    assert [row.cells for row in summary.rows] == [["match", 2], ["changed", 1], ["missing", 1]]
    assert [row.cells for row in grid.rows] == [
        ["b", "changed", "F32", "4×4", "0–1,048,576, 2,097,152–3,145,728"],
        ["c", "missing", None, None, None],
        ["a", "match", "F32", "4×4", None],
        ["d", "match", "F32", "scalar", None],
    ]


def test_several_checkpoints_are_told_apart() -> None:
    tensors = (tensor("a", "match"), tensor("a", "changed", input="n.pt"))

    _, grid = verify(VerifyResult(tensors=tensors, manifest="m.json", counts={}))

    assert [row.cells[-1] for row in grid.rows] == ["n.pt", "m.pt"]
    assert grid.columns[-1].title == "input"
