"""The ``result`` section of ``gradscope explain`` (contract.md §4), typed."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import Any, ClassVar, Literal

from gradscope.attribution.diagnostics import Diagnostics
from gradscope.report.model import Number, Record, Report


class Target(Record):
    """What is explained: a class (with ``versus``, less another) and the model's score for it."""

    index: int
    label: str | None
    #: The logit, or whatever number the model returns; with ``versus`` the difference of the two.
    score: Number
    #: None where the model gives no probabilities.
    probability: Number | None
    versus: int | None = None
    versus_label: str | None = None
    #: What it is where it is not a class of the whole picture: ``value``, ``pixel:12,40``.
    aim: str | None = None

    @property
    def what(self) -> str:
        """``281 tabby``; ``15 person (box:0)``; ``value``."""
        named = f"{self.index} {self.label or ''}".rstrip()
        if self.aim is None or self.aim.startswith("text:"):
            return named
        somewhere = self.aim.startswith(("pixel:", "mask:", "box:"))
        return f"{named} ({self.aim})" if somewhere else self.aim

    @property
    def named(self) -> str:
        """``281 tabby``; ``281 tabby rather than tiger cat``."""
        if self.versus is None:
            return self.what
        return f"{self.what} rather than {self.versus_label or self.versus}"

    @property
    def strength(self) -> str:
        """``probability 0.72``; ``score 3.1`` where the model gives no probabilities."""
        if self.probability is None:
            return f"score {self.score:.3g}"
        return f"probability {self.probability:.2g}"


class MapFacts(Record):
    """The raw signed map in the model's input geometry."""

    shape: tuple[int, int]
    min: Number
    max: Number
    sum: Number
    #: Share of |map| in the strongest tenth of the pixels: 0.1 is flat, 1 is a point.
    concentration: Number | None


class Files(Record):
    """What was written; None where it was not."""

    heatmap: str | None = None
    overlay: str | None = None
    array: str | None = None
    figure: str | None = None


class Explanation(Record):
    """One map: an image, a method, a target."""

    image: str
    image_sha256: str
    method: str
    target: Target
    #: None for methods that read no layer.
    layer: str | None
    layer_reason: str | None
    options: Mapping[str, Any]
    #: "signed" where both signs have a meaning, "positive" where only positive values have.
    sign: Literal["signed", "positive"]
    map: MapFacts
    files: Files
    diagnostics: Diagnostics

    @property
    def input(self) -> str:
        """The picture, as findings name their input."""
        return self.image

    @property
    def subject(self) -> str:
        """What findings about it name: ``cat.png: gradcam → 281 tabby``."""
        return f"{self.image}: {self.method} → {self.target.named}"


class Summary(Record):
    """One metric of one method over all pictures, with the 95 % confidence interval of the mean."""

    method: str
    metric: str
    better: Literal["higher", "lower", "neither"]
    mean: Number
    #: None for less than three pictures.
    low: Number | None
    high: Number | None
    pictures: int
    #: The mean for the same maps at random positions, or what chance gives; None where neither is.
    control: Number | None


class Prediction(Record):
    """One of the model's predictions for an image."""

    index: int
    label: str | None
    score: Number
    #: None where the model gives no probabilities.
    probability: Number | None


class NotFinite(Record):
    """An answer of NaN or infinity, for which there are no maps."""

    #: How many of the scores are not finite, and how many there are.
    scores: int
    total: int
    #: The first layer whose output is not finite; None where every layer's is.
    layer: str | None


class ImageFacts(Record):
    """An image as it was read, and its five likeliest classes; none of an embedding."""

    path: str
    sha256: str
    width: int
    height: int
    mode: str
    predictions: tuple[Prediction, ...]
    #: None where the model's answer is finite.
    not_finite: NotFinite | None = None


class ModelFacts(Record):
    """The model as it was loaded."""

    path: str
    sha256: str
    format: str
    architecture: str | None
    parameters: int
    classes: int
    #: Whether it returns probabilities, whose gradients vanish where it is certain.
    ends_in_softmax: bool
    #: The output that was read, and what its numbers are; None where no answer was.
    output: str | None = None
    head: str | None = None
    #: Other outputs that could as well be meant.
    competing: tuple[str, ...] = ()


class Preprocessed(Record):
    """How images became inputs, and where that was specified."""

    size: tuple[int, int]
    mean: tuple[Number, ...]
    std: tuple[Number, ...]
    steps: tuple[str, ...]
    source: str
    #: Specified nowhere; ImageNet's was assumed.
    assumed: bool


class Environment(Record):
    """What else it takes to repeat the run."""

    seed: int
    device: str
    dtype: str
    versions: Mapping[str, str]


class Need(StrEnum):
    """The kinds of facts that a rule about explanations can need."""

    ANSWERS = "answers"
    MAPS = "maps"
    COMPLETENESS = "completeness"
    EVALUATION = "evaluation"


class ExplainResult(Record):
    """Everything that ``gradscope explain`` found."""

    command: ClassVar[str] = "explain"
    Needs: ClassVar[type[StrEnum]] = Need

    explanations: tuple[Explanation, ...]
    images: tuple[ImageFacts, ...]
    model: ModelFacts
    preprocessing: Preprocessed
    environment: Environment
    evaluated: bool = False
    #: Method by metric; empty where nothing was evaluated.
    summary: tuple[Summary, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def measured(self) -> frozenset[Need]:
        """The kinds of facts that are there."""
        facts = {Need.ANSWERS} if self.images else set()
        if self.explanations:
            facts.add(Need.MAPS)
        if any(e.diagnostics.completeness_delta is not None for e in self.explanations):
            facts.add(Need.COMPLETENESS)
        if self.evaluated:
            facts.add(Need.EVALUATION)
        return frozenset(facts)


ExplainReport = Report[ExplainResult]


class SynthesisedPicture(Record):
    """A picture that ``gradscope visualize`` made."""

    #: The seed of its start and of its views.
    start: int
    #: The logit, or the channel's mean, at each step under its random view, then for the picture.
    objective: tuple[Number, ...]
    #: The model's five likeliest classes for the picture.
    predictions: tuple[Prediction, ...]
    #: The PNG that was written; None where none was asked for.
    image: str | None


class VisualizeResult(SynthesisedPicture):
    """The picture with the highest score that ``gradscope visualize`` made, and the others."""

    model: str
    sha256: str
    #: The class, or None where a channel of a layer was maximised.
    target: int | None
    label: str | None
    layer: str | None
    channel: int | None
    #: The picture's height and width, and those of what the model sees.
    size: tuple[int, int]
    seen: tuple[int, int]
    #: What pictures are made of, and how much of the score those lose that are alike.
    prior: str
    diversity: float
    steps: int
    #: The pictures from other starts, by falling score.
    others: tuple[SynthesisedPicture, ...]
    #: The mean cosine between the pictures' Gram matrices; None of one, and without maps.
    similarity: Number | None
    environment: Environment
    notes: tuple[str, ...] = ()


VisualizeReport = Report[VisualizeResult]
