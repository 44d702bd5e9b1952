"""One map of one picture, its diagnostics and its entry in the report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from gradscope.attribution.attribute import Attribution, computed
from gradscope.attribution.diagnostics import Diagnostics
from gradscope.attribution.evaluation.similarity import Ranked, concentration
from gradscope.attribution.method import Method
from gradscope.attribution.result import Explanation, Files, MapFacts, Target
from gradscope.attribution.subject import Subject
from gradscope.models.images import Picture
from gradscope.models.probe import Pass


@dataclass(frozen=True, eq=False)
class Map:
    """A method's map for one picture and target, with what it takes to repeat it."""

    method: Method
    options: Mapping[str, Any]
    subject: Subject
    found: Attribution
    target: Target

    @property
    def notes(self) -> tuple[str, ...]:
        """What the method has to say about it."""
        found: tuple[str, ...] = self.found.diagnostics.get("notes", ())
        return found

    @property
    def values(self) -> Tensor:
        """The map [H, W] in input geometry."""
        return self.found.upsampled[0]

    @property
    def shown(self) -> Tensor:
        """The map without what is not finite, which has no rank."""
        return torch.nan_to_num(self.values)

    @property
    def quiet(self) -> Subject:
        """The subject, without progress."""
        return replace(self.subject, tick=lambda _done, _total: None)

    @property
    def contributions(self) -> Tensor:
        """What each pixel contributes [H, W]: a gradient's values times the picture's."""
        if self.method.channels == "max-abs":
            return (self.found.values * self.subject.inputs).sum(1)[0].detach()
        return self.values

    def again(self, inputs: Tensor, shared: dict[str, Pass]) -> Tensor:
        """The raw values for other inputs [N, C, H, W], same target and layer, with less effort.

        ``shared`` holds the passes that maps of the same inputs share.
        """
        count, against = len(inputs), self.subject.versus
        versus = None if against is None else against.expand(count)
        layer = self.found.layer or self.subject.layer
        subject = replace(
            self.quiet,
            inputs=inputs,
            shared=shared,
            layer=layer,
            targets=self.subject.targets.expand(count),
            versus=versus,
        )
        return torch.nan_to_num(computed(subject, self.method, self._less)[0])

    @cached_property
    def original(self) -> Tensor:
        """The values that repetitions are compared with, made as they are."""
        if self._less == dict(self.options):
            return torch.nan_to_num(self.found.values)
        return self.again(self.subject.inputs, {})

    @cached_property
    def ranked(self) -> Ranked:
        """The same, ranked."""
        return Ranked(self.original)

    @property
    def _less(self) -> dict[str, Any]:
        return {name: self._lessened(name, value) for name, value in self.options.items()}

    def _lessened(self, name: str, value: Any) -> Any:
        """An option with a quarter of the effort, and without a goal to reach."""
        option = self.method.options[name]
        if option.goal:
            return option.default
        return max(min(value, 4), value // 4) if option.effort else value

    def diagnostics(self, measured: Mapping[str, Any]) -> Diagnostics:
        """The method's own diagnostics, and what was measured of the map."""
        facts = dict(self.found.diagnostics)
        facts.pop("scores")
        delta, share = (facts.pop(k, [None])[0] for k in ("completeness_delta", "relative_delta"))
        own = {k: v[0] if isinstance(v, list) and len(v) == 1 else v for k, v in facts.items()}
        return Diagnostics(completeness_delta=delta, relative_delta=share, method=own, **measured)

    def explanation(self, picture: Picture, files: Files, known: Diagnostics) -> Explanation:
        """The map's entry in the report."""
        values = self.values
        choice = self.subject.choice if self.method.reads_layer else None
        shown = {k: "an image" if isinstance(v, Tensor) else v for k, v in self.options.items()}
        return Explanation(
            image=picture.path,
            image_sha256=picture.sha256,
            method=self.method.name,
            target=self.target,
            layer=self.found.layer,
            layer_reason=None if choice is None else choice.reason,
            options=shown,
            sign=self.method.sign,
            map=MapFacts(
                shape=(values.shape[0], values.shape[1]),
                min=float(values.min()),
                max=float(values.max()),
                sum=float(values.double().sum()),
                concentration=concentration(values),
            ),
            files=files,
            diagnostics=known,
        )
