"""What ``visualize`` maximises: a class, or a channel of a layer."""

from __future__ import annotations

import torch
from torch import Tensor

from gradscope.attribution.result import Prediction
from gradscope.attribution.synthesis.views import Area
from gradscope.attribution.targets.classes import predictions
from gradscope.errors import UsageError
from gradscope.models.labels import Ranked, parse_target
from gradscope.models.layout import Layout, layout_of
from gradscope.models.probe import Pass, run
from gradscope.models.vision import Vision
from gradscope.text import quoted


class Goal:
    """What is maximised, of a held model."""

    def __init__(
        self, vision: Vision, target: int | str | None, layer: str | None, channel: int | None
    ) -> None:
        self.model, self.vision = vision.model, vision
        self.layer, self.channel = layer, channel
        blank = vision.like_parameters(torch.full((1, *vision.size), 0.5))
        self.device, self.kind = blank.device, blank.dtype
        with torch.no_grad():
            classes = run(self.model, self._inputs(blank)).logits.shape[1]
        self.labels = vision.labels(classes)
        self.target = None if target is None else self._class(str(target), classes)
        self.label = None if self.target is None else (self.labels or {}).get(self.target)
        if layer is not None:
            self._check_channel(blank)

    @property
    def dtype(self) -> str:
        """The type that the model computes in."""
        return str(self.kind).removeprefix("torch.")

    @property
    def name(self) -> str:
        """What its files are called."""
        return f"class-{self.target}" if self.layer is None else f"{self.layer}-{self.channel}"

    def takes(self, areas: tuple[Area, ...]) -> bool:
        """Whether the model answers about images of other sizes."""
        try:
            with torch.no_grad():
                for area in areas:
                    image = torch.full((1, self.vision.size[0], *area), 0.5).to(self.device)
                    self.score(image)
        except (RuntimeError, ValueError, AssertionError, IndexError, UsageError):
            return False
        return True

    def score(self, pixels: Tensor) -> Tensor:
        """The class's logit, or the channel's mean, of pixels [1, C, H, W]."""
        return self._score(self._seen(pixels, self.layer), pixels)

    def answers(self, pixels: Tensor, layer: str) -> tuple[Tensor, Tensor]:
        """The score, and the maps [1, K, h, w] of a layer."""
        seen = self._seen(pixels, self.layer, layer)
        piece = seen.pieces[layer][0]
        layout = self._layout(piece, pixels)
        if layout is None:
            raise UsageError(f"layer {quoted(layer)} has no maps by which pictures could differ")
        return self._score(seen, pixels), layout.maps(piece)[:1]

    def predictions(self, image: Tensor) -> tuple[Prediction, ...]:
        """The likeliest classes of an image [C, H, W]."""
        with torch.no_grad():
            seen = run(self.model, self._inputs(image[None].to(self.device)))
        return predictions(seen.scores, self.labels)

    def _inputs(self, pixels: Tensor) -> Tensor:
        return self.vision.preprocessing.normalise(pixels).to(self.kind)

    def _class(self, target: str, classes: int) -> int:
        found = parse_target(target, self.labels, classes)
        if isinstance(found, Ranked):
            message = "without a picture there is no ranking; name a class"
            raise UsageError(f"--target {target}: {message}")
        return found

    def _seen(self, pixels: Tensor, *layers: str | None) -> Pass:
        tapped = dict.fromkeys(layer for layer in layers if layer is not None)
        return run(self.model, self._inputs(pixels), list(tapped))

    def _score(self, seen: Pass, pixels: Tensor) -> Tensor:
        if self.layer is None:
            return seen.logits[:1, self.target].float()
        return self._channels(seen, pixels)[:, self.channel].float()

    def _channels(self, seen: Pass, pixels: Tensor) -> Tensor:
        """The layer's channels [1, C], their mean over positions."""
        assert self.layer is not None
        piece = seen.pieces[self.layer][0]
        layout = self._layout(piece, pixels)
        if layout is not None:
            return layout.maps(piece)[:1].mean((2, 3))
        return piece[:1].flatten(1, -2).mean(1) if piece.dim() > 2 else piece[:1]

    def _layout(self, piece: Tensor, pixels: Tensor) -> Layout | None:
        return layout_of(tuple(piece.shape), (self.model.batch or 1, *pixels.shape[1:]))

    def _check_channel(self, blank: Tensor) -> None:
        count = self._channels(self._seen(blank, self.layer), blank).shape[1]
        if self.channel is None or not 0 <= self.channel < count:
            raise UsageError(f"layer {quoted(self.layer or '')} has channels 0 to {count - 1}")
