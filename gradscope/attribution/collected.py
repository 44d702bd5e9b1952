"""What a run of ``explain`` has found so far, and the result that it becomes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from gradscope.attribution.evaluation.summary import summarised
from gradscope.attribution.request import Asked, Request
from gradscope.attribution.result import (
    Environment,
    ExplainResult,
    Explanation,
    ImageFacts,
    ModelFacts,
    Preprocessed,
)
from gradscope.errors import NotApplicableError
from gradscope.models.scores import Answering, Head, Scores
from gradscope.report.model import Input
from gradscope.text import listed, quoted
from gradscope.version import __version__


@dataclass(eq=False, slots=True)
class Collected:
    """What the pictures of a run have given so far."""

    explanations: list[Explanation] = field(default_factory=list)
    images: list[ImageFacts] = field(default_factory=list)
    inputs: list[Input] = field(default_factory=list)
    notes: dict[str, None] = field(default_factory=dict)
    #: Why a method was left out that cannot read the model.
    refused: dict[str, None] = field(default_factory=dict)
    classes: int = 0
    head: Head | None = None

    def answered(self, scores: Scores) -> None:
        """Note what kind of answer the model gives."""
        self.classes, self.head = scores.values.shape[1], scores.head

    def kept(self, methods: Sequence[Asked], work: Callable[..., None]) -> list[Asked]:
        """Do the work for each method; those that can read the model.

        One that cannot costs the others nothing. Raises NotApplicableError where none can.
        """
        found, refused = [], []
        for method, options in methods:
            try:
                work(method, options)
                found.append((method, options))
            except NotApplicableError as error:
                refused.append(f"{method.name}: {error}")
        if refused and not found:
            raise NotApplicableError(refused[0])
        self.refused.update(dict.fromkeys(refused))
        return found


def result_of(collected: Collected, request: Request) -> ExplainResult:
    """The report's ``result``: the maps, and all that it takes to repeat them."""
    loaded, steps = request.vision.loaded, request.vision.preprocessing
    module = loaded.model.module
    answering: Answering | None = loaded.model.known.get("answering")
    like = next(module.parameters(), torch.zeros(()))
    return ExplainResult(
        explanations=tuple(collected.explanations),
        images=tuple(collected.images),
        model=ModelFacts(
            path=loaded.path,
            sha256=loaded.sha256,
            format=loaded.format,
            architecture=loaded.architecture,
            parameters=sum(p.numel() for p in module.parameters()),
            classes=collected.classes,
            ends_in_softmax=collected.head == "probabilities",
            output=None if answering is None else answering.choice.name or None,
            head=collected.head,
            competing=() if answering is None else answering.choice.competing,
        ),
        preprocessing=Preprocessed(
            size=steps.size or (0, 0),
            mean=steps.mean,
            std=steps.std,
            steps=steps.steps(),
            source=steps.source,
            assumed=steps.assumed,
        ),
        environment=Environment(
            seed=request.seed,
            device=str(like.device),
            dtype=str(like.dtype).removeprefix("torch."),
            versions={"gradscope": __version__, "torch": str(torch.__version__),
                      "numpy": np.__version__},
        ),
        evaluated=request.evaluated,
        summary=tuple(summarised(collected.explanations)),
        notes=(*loaded.notes, *collected.notes, *_notes(collected, answering)),
    )  # fmt: skip


def _notes(collected: Collected, answering: Answering | None) -> Iterator[str]:
    if answering is not None and answering.choice.others:
        others = [quoted(name) for name in answering.choice.others]
        yield (
            f"output {quoted(answering.choice.name)} is explained; the model also returns "
            f"{listed(others, len(others), 6)} (--output-name)"
        )
    if collected.head == "value" and collected.classes == 1:
        yield (
            "the model returns one number, which is explained as a value; if it is the logit of "
            'yes, name both classes with --labels, "no" first'
        )
    if collected.head == "probabilities":
        yield (
            "the model returns probabilities, whose gradients vanish where it is certain; a model "
            "that returns logits explains better"
        )
