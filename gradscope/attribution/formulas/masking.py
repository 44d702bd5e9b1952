"""Class activation maps without gradients: channels weighted by the scores that they cause."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from gradscope.attribution.formulas.cams import rectified, weighted
from gradscope.attribution.formulas.gradients import Result
from gradscope.attribution.subject import Answer, Points, Subject, forward, in_windows
from gradscope.errors import UsageError
from gradscope.models.model import Tap

#: Last places by which a score may differ between two batches.
_ROUNDINGS = 32


def scorecam(subject: Subject, *, channels: int, relu: bool) -> Result:
    """sum_k w_k A_k, w the softmax over channels of the score of x times A_k.

    A_k is upsampled to the image and scaled to 0..1. Every constant channel gives the same black
    image, which is scored once. ``channels`` limits them to those of the greatest variance.
    """
    activations, inputs = subject.activations, subject.inputs
    count, total = activations.shape[:2]
    if channels < 0:
        raise UsageError("channels has to be at least 1, or 0 for all")
    flat = activations.flatten(2)
    low, high = flat.amin(2), flat.amax(2)
    chosen = _chosen(flat, channels or total)
    wanted = (high > low) & chosen

    def points(which: Tensor, images: Tensor) -> Tensor:
        mask = interpolate(
            activations[images, which][:, None],
            size=inputs.shape[2:],
            mode="bilinear",
            align_corners=False,
        )
        edges = mask.flatten(1)
        low, high = (t.view(-1, 1, 1, 1) for t in (edges.amin(1), edges.amax(1)))
        return inputs[images] * ((mask - low) / (high - low))

    black = torch.zeros_like(inputs)
    scores = _joined(subject.scores(lambda _which, images: black[images]))[:, None]
    scores = scores.expand(count, total).clone()
    forwards = count
    for image in range(count):
        kept = wanted[image].nonzero()[:, 0]
        shown = partial(_shown, points, kept, image)
        seen = subject.only(image).scores(shown, len(kept))
        for which, _, found in seen:
            scores[image, kept[which]] = found
        forwards += len(kept)
    weights = scores.masked_fill(~chosen, -torch.inf).softmax(1)
    return rectified(weighted(weights, activations), relu), {"forwards": forwards}


def _shown(points: Points, kept: Tensor, image: int, which: Tensor, images: Tensor) -> Tensor:
    return points(kept[which], images + image)


def _chosen(flat: Tensor, most: int) -> Tensor:
    """Whether each channel [N, C] is among the ``most`` of greatest variance."""
    if most >= flat.shape[1]:
        return torch.ones(flat.shape[:2], dtype=torch.bool, device=flat.device)
    best = flat.var(2).topk(most, dim=1).indices
    return torch.zeros(flat.shape[:2], dtype=torch.bool, device=flat.device).scatter(1, best, True)


def ablationcam(subject: Subject, *, relu: bool) -> Result:
    """sum_k w_k A_k, w_k = (S - S_k) / |S|, S_k the score with channel k set to zero.

    What precedes the layer runs once a chunk: the tap returns as many copies of the output as
    channels are ablated. Where a model cannot carry these copies on, the image is repeated.
    """
    activations = subject.activations
    lost = activations.new_empty(activations.shape[:2])
    calls = _calls(subject)
    copies = _carries_copies(subject, calls)
    # Each chunk runs what precedes the layer anew.
    size = in_windows if copies else forward
    for image in range(len(lost)):
        one = subject.only(image)
        ablated = _Ablated(one, calls, copies)
        for which, _, found in one.answers(ablated.lost, lost.shape[1], size):
            lost[image, which] = found
    score = subject.own_scores.abs()[:, None]
    facts: dict[str, Any] = {"prefix_once": copies} | _below_rounding(lost, score)
    weights = torch.where(score > 0, lost / torch.where(score > 0, score, 1), 0.0)
    return rectified(weighted(weights, activations), relu), facts


def _below_rounding(lost: Tensor, size: Tensor) -> dict[str, Any]:
    """A note where no channel moves the score by more than the rounding of a sum does."""
    least = _ROUNDINGS * torch.finfo(lost.dtype).eps * size
    if bool((lost.abs().amax(1, keepdim=True) > least).all()):
        return {}
    return {
        "notes": (
            "ablationcam: without any one channel the score stays the same but for rounding; the "
            "map is noise (an untrained model, or a layer that the score hardly depends on)",
        )
    }


@dataclass(frozen=True, eq=False, slots=True)
class _Ablated:
    """One image's logits without single channels of the layer's last call."""

    subject: Subject
    calls: int
    #: Whether what precedes the layer runs on one image, whose output is then copied.
    copies: bool

    def lost(self, channels: Tensor, images: Tensor) -> Tensor:
        """What the score loses with each channel [M].

        The full score comes from the same batch: another batch rounds differently, by as much as a
        channel may matter.
        """
        asked = torch.cat([channels, channels.new_tensor([-1])])
        scores = self.subject.objective(self.logits(asked), images[:1].expand(len(asked)))
        return scores[-1] - scores[:-1]

    def logits(self, channels: Tensor) -> Tensor:
        """Logits [M, K]; channel -1 ablates nothing."""
        model = self.subject.model
        parts = channels.split(model.batch or len(channels))
        with torch.no_grad():
            return torch.cat([self._part(part, model.batch or len(part)) for part in parts])

    def _part(self, channels: Tensor, batch: int) -> Tensor:
        images = self.subject.inputs
        inputs = images if self.copies else images.expand(batch, *images.shape[1:]).contiguous()
        taps = {self.subject.layer_name: _at_call(self.calls, partial(self._ablate, channels))}
        model = self.subject.model
        return model.scores(model.forward(inputs, taps)).values[: len(channels)]

    def _ablate(self, channels: Tensor, output: Tensor) -> Tensor:
        layout = self.subject.layout
        found = output.clone()
        if self.copies:
            found = output.repeat_interleave(len(channels), layout.batch_dim)
        rows = (channels >= 0).nonzero()[:, 0]
        # A view with the images first and the channels last.
        view = found.movedim((layout.batch_dim, layout.channel_dim), (0, -1))
        view[rows, ..., channels[rows]] = 0
        return found


def _at_call(number: int, tap: Tap) -> Tap:
    """A tap that acts on the ``number``-th call only."""
    calls = itertools.count(1)
    return lambda output: tap(output) if next(calls) == number else None


def _calls(subject: Subject) -> int:
    """How often one pass calls the layer."""
    seen: list[Tensor] = []
    image = subject.inputs[:1]
    with torch.no_grad():
        batch = image.expand(subject.model.batch or 1, *image.shape[1:])
        subject.model.forward(batch, {subject.layer_name: seen.append})
    return len(seen)


def _carries_copies(subject: Subject, calls: int) -> bool:
    """Whether two copies of the layer's output become two equal rows of logits.

    They do not where the model remembers the batch size from before the layer.
    """
    if subject.model.batch is not None:
        return False
    nothing = torch.tensor([-1, -1], device=subject.inputs.device)
    wanted = subject.tapped.logits[:1].detach()
    try:
        found = _Ablated(subject.only(0), calls, True).logits(nothing)
    except (RuntimeError, ValueError, AssertionError, UsageError):
        return False
    if found.shape != (2, wanted.shape[1]):
        return False
    return torch.allclose(found, wanted.expand_as(found), rtol=1e-3, atol=1e-3)


def _joined(answers: Iterable[Answer]) -> Tensor:
    return torch.cat([found for _, _, found in answers])
