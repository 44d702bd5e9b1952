"""How many inputs a model sees at a time, from the memory that its backward pass holds."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from gradscope.attribution.subject import Subject
from gradscope.models.forms import as_model

#: Bytes of one image [3, 5, 7] in float32; its score needs a few more.
IMAGE = 4 * 3 * 5 * 7


class Squares(nn.Module):
    """Its backward pass needs the image, once, and the weights, which are held anyway."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3 * 5 * 7, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head((x * x).flatten(1))


def subject(batch: int | None = None) -> Subject:
    model = replace(as_model(Squares().requires_grad_(False)), batch=batch)
    return Subject(model, torch.ones(2, 3, 5, 7), torch.tensor([0, 1]))


@pytest.mark.parametrize(
    ("memory", "cache", "batch", "gradient", "forward"),
    [(5, 99, None, 5, 10), (0.5, 99, None, 1, 2), (99, 9, None, 8, 4), (99, 0.5, None, 1, 1),
     (12, 99, 3, 12, 24), (99, 7, 3, 6, 3), (99, 2, 3, 3, 3), (999, 999, None, 64, 128)],
)  # fmt: skip
def test_chunks_hold_as_many_images_as_fit_in_half_of_the_memory_and_in_the_cache(
    monkeypatch: pytest.MonkeyPatch,
    memory: float,
    cache: float,
    batch: int | None,
    gradient: int,
    forward: int,
) -> None:
    monkeypatch.setattr("gradscope.attribution.chunks._CPU_BUDGET", int(2.2 * memory * IMAGE))
    monkeypatch.setattr("gradscope.attribution.chunks.last_cache", lambda: int(cache * IMAGE))
    made = subject(batch)

    chunks = [len(which) for which, _, _ in made.gradients(made.own, items=20)]

    first, last = [gradient] * (40 // gradient), [40 % gradient] * (40 % gradient > 0)
    assert chunks == first + last
    assert made.chunks.forward == forward


def test_items_and_images_come_in_order_and_all() -> None:
    made = subject()
    made.limit(3)

    found = [pair for which, images, _ in made.scores(made.own, 4)
             for pair in zip(which.tolist(), images.tolist(), strict=True)]  # fmt: skip

    assert found == [(item, image) for item in range(4) for image in range(2)]


def test_a_chunk_is_halved_down_to_one_and_then_the_error_is_told() -> None:
    made = subject()
    made.limit(5)

    def full(_which: Tensor, _images: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("no room")

    with pytest.raises(torch.OutOfMemoryError):
        list(made.answers(full, 9))

    assert (made.chunks.gradient, made.chunks.forward, made.chunks.windows) == (1, 1, 1)
    assert made.chunks.notes == [
        "out of memory: continued with chunks of 2",
        "out of memory: continued with chunks of 1",
    ]
    with pytest.raises(RuntimeError, match="another"):
        list(made.answers(lambda *_: (_ for _ in ()).throw(RuntimeError("another")), 9))


def test_an_objective_is_a_logit_or_the_difference_of_two() -> None:
    made = subject()
    logits = torch.arange(8.0).view(2, 4)
    images = torch.tensor([1, 0, 1])

    assert made.objective(logits[images], images).tolist() == [5, 0, 5]
    contrast = made.about(torch.tensor([3, 2]), torch.tensor([0, 1]))
    assert contrast.objective(logits[images], images).tolist() == [1, 3, 1]
