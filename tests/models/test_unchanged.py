"""Whether a model still is what it was: what is noticed, and what is not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from gradscope.models.unchanged import looks

SHAPES = [(1, 1), (3, 1), (7, 2), (5, 9), (9, 5), (6, 4, 3, 3), (2, 50)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("order", ["rows", "columns first"])
def test_every_row_that_is_written_past_the_record_is_noticed(
    shape: tuple[int, ...], order: str
) -> None:
    weight = torch.randn(shape)
    net = holding(weight if order == "rows" else weight.transpose(0, -1).contiguous().mT)
    held = net.weight.data

    for row in range(len(held)):
        before = looks(net)
        assert before.same(looks(net))
        held[row] += 1
        assert not before.same(looks(net))


def test_columns_are_noticed_where_there_are_as_many_rows() -> None:
    net = holding(torch.randn(12, 8))

    for column in range(8):
        before = looks(net)
        net.weight.data[:, column] += 1
        assert not before.same(looks(net))


def test_a_single_number_is_noticed_where_pytorch_records_the_write() -> None:
    net = holding(torch.randn(6, 5, 3, 3))
    before = looks(net)

    # Row 2 is sampled in other columns.
    net.weight.data[2, 0, 0, 0] += 1
    assert before.same(looks(net))
    with torch.no_grad():
        net.weight[2, 0, 0, 0] -= 1
    assert not before.same(looks(net))


def test_tensors_of_inference_mode_have_no_record_and_are_read_whole() -> None:
    with torch.inference_mode():
        net = holding(torch.randn(6, 5))
        before = looks(net)
        assert before.same(looks(net))
        net.weight[2, 0] += 1
        assert not before.same(looks(net))


def test_numbers_of_several_types_are_kept_apart() -> None:
    net = nn.BatchNorm2d(3)
    net.num_batches_tracked = torch.tensor(1 << 24)
    before = looks(net)
    assert before.same(looks(net))

    # In float32 the two numbers would be one.
    net.num_batches_tracked.data.add_(1)
    assert not before.same(looks(net))


def holding(weight: Tensor) -> nn.Linear:
    net = nn.Linear(1, 1)
    net.weight = nn.Parameter(weight)
    return net
