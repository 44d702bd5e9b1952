"""Where tensors stand in the maps of pages."""

from __future__ import annotations

import pytest

from gradscope.weights.places import by_place, drawn_by_place
from gradscope.weights.roles import Role

from .made import tensor


def placed(*names: str) -> dict[tuple[str, str], list[str]]:
    tensors = [tensor(name=name, role=Role.LINEAR) for name in names]
    return {
        place: [t.name for t in inside]
        for place, inside in by_place(tensors, lambda t: t.role.value).items()
    }


def test_blocks_of_a_stack_come_by_their_numbers_and_stacks_as_in_the_file() -> None:
    names = ["embed.weight", *(f"h.{n}.w" for n in (1, 10, 11, 2)), "g.3.w", "g.20.w", "head.bias"]

    blocks = list(dict.fromkeys(block for block, _ in placed(*names)))

    assert blocks == ["outside", "h.1", "h.2", "h.10", "h.11", "g.3", "g.20"]


def test_nested_blocks_come_by_all_their_numbers() -> None:
    names = [f"stage.{a}.blocks.{b}.w" for a in (10, 2) for b in (10, 9)]

    assert list(placed(*names)) == [("stage.2", "blocks.*.w"), ("stage.10", "blocks.*.w")]


def test_a_cell_holds_all_that_a_block_has_in_a_place() -> None:
    assert placed("h.0.experts.0.w", "h.0.experts.1.w", "h.0.norm.w") == {
        ("h.0", "experts.*.w"): ["h.0.experts.0.w", "h.0.experts.1.w"],
        ("h.0", "norm.w"): ["h.0.norm.w"],
    }


@pytest.mark.parametrize(("blocks", "columns"), [(96, 96), (97, 49), (1000, 91)])
def test_many_blocks_stand_together_and_none_is_lost(blocks: int, columns: int) -> None:
    names = [f"h.{n}.w" for n in range(blocks)]

    found = placed(*names)

    assert len(found) == columns
    assert [name for inside in found.values() for name in inside] == names
    assert all(block.endswith("…") for block, _ in found) is (blocks > 96)


def test_many_places_are_drawn_by_role() -> None:
    assert {row for _, row in placed(*(f"h.0.a{n}.w" for n in range(60)))} != {"linear"}
    assert {row for _, row in placed(*(f"h.0.a{n}.w" for n in range(61)))} == {"linear"}


def test_a_map_keeps_the_order_of_its_cells() -> None:
    pytest.importorskip("altair", reason="of the extra html")
    cells = [{"block": "h.2", "row": "w"}, {"block": "h.10", "row": "b"}]

    chart, size = drawn_by_place(cells)

    drawn = chart.mark_rect().to_dict()
    assert drawn["encoding"]["x"]["sort"] == ["h.2", "h.10"]
    assert drawn["encoding"]["y"]["sort"] == ["w", "b"]
    assert size == {"width": {"step": 48}, "height": {"step": 15}}
