"""One map of one picture, its diagnostics and its entry in the report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from gradscope.attribution import evaluation
from gradscope.attribution.attribute import Attribution, attributed
from gradscope.attribution.methods import Method
from gradscope.attribution.result import Diagnostics, Explanation, Files, MapFacts, Target
from gradscope.attribution.subject import Subject, Tick
from gradscope.models.images import Picture


@dataclass(frozen=True, eq=False, slots=True)
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

    def again(self, inputs: Tensor) -> Tensor:
        """The map of other inputs [1, C, H, W] for the same target and layer, without refining."""
        layer = self.found.layer or self.subject.layer
        subject = replace(self._quiet, inputs=inputs, shared={}, layer=layer)
        return attributed(subject, self.method, self._unrefined).upsampled[0]

    @property
    def _unrefined(self) -> dict[str, Any]:
        """The options without a tolerance, which every repetition would have to meet again."""
        return {k: 0.0 if k == "tolerance" else v for k, v in self.options.items()}

    def _again_unmoved(self, values: Tensor) -> Tensor:
        """The map that repetitions are compared with, made as they are."""
        refined = self._unrefined != dict(self.options)
        return self.again(self.subject.inputs) if refined else values

    @property
    def _quiet(self) -> Subject:
        return replace(self.subject, tick=lambda _done, _total: None)

    def diagnostics(self) -> Diagnostics:
        """The method's own diagnostics."""
        facts = dict(self.found.diagnostics)
        facts.pop("scores")
        delta, share = (facts.pop(k, [None])[0] for k in ("completeness_delta", "relative_delta"))
        own = {k: v[0] if isinstance(v, list) and len(v) == 1 else v for k, v in facts.items()}
        return Diagnostics(completeness_delta=delta, relative_delta=share, method=own)

    def evaluated(self, agreement: Mapping[str, float], tick: Tick) -> Diagnostics:
        """Those and the evaluation of the map, which takes many passes."""
        measured: dict[str, Any] = {"agreement": dict(agreement) or None}
        stages = (self._faithful, self._controlled, self._randomised, self._sensitive)
        for number, stage in enumerate(stages):
            measured |= stage(self._quiet, torch.nan_to_num(self.values))
            tick(number + 1, len(stages))
        return self.diagnostics().model_copy(update=measured)

    def _faithful(self, subject: Subject, values: Tensor) -> dict[str, Any]:
        names = ("insertion_auc", "deletion_auc", "insertion_spread", "deletion_spread")
        return dict(zip(names, evaluation.areas(subject, values, subject.seed), strict=True))

    def _controlled(self, subject: Subject, values: Tensor) -> dict[str, Any]:
        return {"random_control": evaluation.random_control(subject, values, subject.seed)}

    def _randomised(self, subject: Subject, values: Tensor) -> dict[str, Any]:
        found = evaluation.randomisation(
            subject.model.module,
            lambda: self.again(subject.inputs),
            self._again_unmoved(values),
            subject.seed,
        )
        return {"randomisation": found or None}

    def _sensitive(self, subject: Subject, values: Tensor) -> dict[str, Any]:
        width = torch.ones(1) if subject.std is None else subject.std
        radius = (evaluation.RADIUS / width).view(-1, 1, 1).to(subject.inputs)
        original = self._again_unmoved(values)
        found = evaluation.sensitivity(self.again, subject.inputs, original, radius, subject.seed)
        return {"sensitivity": found}

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
                concentration=evaluation.concentration(values),
            ),
            files=files,
            diagnostics=known,
        )
