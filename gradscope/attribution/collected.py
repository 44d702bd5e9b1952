"""What a run of ``explain`` has found so far, and the result that it becomes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch

from gradscope.attribution.request import Request
from gradscope.attribution.result import (
    Environment,
    ExplainResult,
    Explanation,
    ImageFacts,
    ModelFacts,
    Preprocessed,
)
from gradscope.attribution.summary import summarised
from gradscope.report.model import Input
from gradscope.version import __version__


@dataclass(eq=False, slots=True)
class Collected:
    """What the pictures of a run have given so far."""

    explanations: list[Explanation] = field(default_factory=list)
    images: list[ImageFacts] = field(default_factory=list)
    inputs: list[Input] = field(default_factory=list)
    notes: dict[str, None] = field(default_factory=dict)
    classes: int = 0
    ends_in_softmax: bool = False


def result_of(collected: Collected, request: Request) -> ExplainResult:
    """The report's ``result``: the maps, and all that it takes to repeat them."""
    loaded, steps = request.vision.loaded, request.vision.preprocessing
    module = loaded.model.module
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
            ends_in_softmax=collected.ends_in_softmax,
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
        notes=(*loaded.notes, *collected.notes, *_notes(collected)),
    )  # fmt: skip


def _notes(collected: Collected) -> Iterator[str]:
    if collected.ends_in_softmax:
        yield (
            "the model returns probabilities, whose gradients vanish where it is certain; a model "
            "that returns logits explains better"
        )
