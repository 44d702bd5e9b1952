"""The record of a pass: every operator, with values told apart by where they lie."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from gradscope.errors import UsageError
from gradscope.models.forms import as_model
from gradscope.models.probe import held
from gradscope.models.tape import Tape, record


class Computes(nn.Module):
    def __init__(self, compute: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.compute = compute

    def forward(self, x: Tensor) -> Tensor:
        return self.compute(x)


def taped(compute: Callable[[Tensor], Tensor], x: Tensor) -> Tape:
    model = as_model(Computes(compute))
    with held(model.module):
        return record(model, x)


X = torch.arange(1.0, 13.0).view(1, 3, 2, 2)


def gradient(tape: Tape, at: int) -> Tensor:
    """The derivative of one logit, by the steps' own derivatives."""
    start = torch.zeros_like(tape.logits)
    start[:, at] = 1
    return tape.back({tape.answer: start}, lambda step, given: step.pull(given))


@pytest.mark.parametrize(
    "compute",
    [
        lambda x: (x * x).sin().flatten(1),
        lambda x: (x + x.view(1, 3, 2, 2) * x.reshape(1, 3, -1).view_as(x)).flatten(1),
        lambda x: torch.cat([x.flatten(1), (x * 2).neg_().mul_(3).flatten(1)], 1).exp(),
        lambda x: sum((part * i).flatten(1) for i, part in enumerate((x * x).unbind(2))),
        lambda x: (x.clone().mul_(2) + x).square_().mean((2, 3)),
    ],
)
def test_passed_back_by_derivatives_it_gives_the_gradient(
    compute: Callable[[Tensor], Tensor],
) -> None:
    leaf = X.clone().requires_grad_()
    tape = taped(compute, X)
    (wanted,) = torch.autograd.grad(compute(leaf)[:, 1].sum(), leaf)

    torch.testing.assert_close(gradient(tape, 1), wanted)


def test_what_is_written_in_place_keeps_the_values_that_were_read() -> None:
    def compute(x: Tensor) -> Tensor:
        y = x - 6
        z = y * 2
        y.relu_()
        return (y + z).flatten(1)

    tape = taped(compute, X)

    assert [step.name for step in tape.steps][:4] == ["sub", "mul", "relu", "add"]
    torch.testing.assert_close(tape.steps[1].taken[0], X - 6)
    torch.testing.assert_close(tape.steps[2].taken[0], X - 6)
    torch.testing.assert_close(tape.steps[3].taken[0], (X - 6).relu())


def _in_part(x: Tensor) -> Tensor:
    y = x * 2
    y[:, 0] = 5
    return y.flatten(1)


def _into_a_constant(x: Tensor) -> Tensor:
    y = torch.zeros(1, 3, 2, 2)
    y[:, 1:] = x[:, 1:]
    return y.flatten(1)


def _through_a_view(x: Tensor) -> Tensor:
    y = x * 2
    y.view(-1).relu_()
    return y.flatten(1)


@pytest.mark.parametrize("compute", [_in_part, _into_a_constant, _through_a_view])
def test_writing_to_a_part_is_refused(compute: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(UsageError, match="written in place"):
        taped(compute, X)


def test_tensors_of_an_images_shape_alone_are_constants() -> None:
    tape = taped(lambda x: (x + torch.zeros_like(x) + x.new_ones(2)).flatten(1), X)

    assert [step.name for step in tape.steps][:2] == ["add", "add"]
    assert len(tape.steps[0].inputs) == 1


def test_a_score_without_the_image_is_refused() -> None:
    with pytest.raises(UsageError, match="does not depend on the image"):
        taped(lambda x: torch.ones(len(x), 3), X)
