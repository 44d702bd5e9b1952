"""What pictures were made into, and what the model answered."""

from __future__ import annotations

from collections.abc import Iterator

from gradscope.attribution.result import ExplainResult, Need
from gradscope.report.rules import Observation, rule
from gradscope.report.severity import Severity
from gradscope.text import listed, quoted


@rule("E106", "assumed-preprocessing", Severity.LOW, reads=ExplainResult, needs=Need.MAPS)
def assumed_preprocessing(result: ExplainResult) -> Iterator[Observation]:
    """How images become inputs was not specified, or for which of several weights.

    ImageNet's preprocessing is assumed, or that of the weights that a library takes by default. If
    the model was trained with another, it sees wrong colours or sizes, and every map is about
    those.
    """
    steps = result.preprocessing
    if steps.assumed:
        known = steps.source != "assumed"
        what = f"the preprocessing of {steps.source}" if known else "ImageNet's preprocessing"
        others = "; other weights of that model have another" if known else ""
        yield Observation(
            result.model.path,
            f"{what} is assumed ({', '.join(steps.steps)}){others}",
            "specify it with --preprocess: imagenet, a preprocessor_config.json, or "
            "image_mean=…,image_std=…,size=…",
        )


@rule("E107", "non-finite-output", Severity.CRITICAL, reads=ExplainResult, needs=Need.ANSWERS)
def non_finite_output(result: ExplainResult) -> Iterator[Observation]:
    """The model's answer to a picture contains NaN or infinity, so there is nothing to explain.

    Inputs are always finite, so the cause lies in the model: NaN in the weights, an overflow of
    half precision, a division by zero on this picture. The first layer in the order of the calls
    whose output is not finite is named. A logarithm of a probability of 0 is not counted.
    """
    for image in result.images:
        wrong = image.not_finite
        if wrong is None:
            continue
        scores = (
            "the score is"
            if wrong.total == 1
            else f"{wrong.scores:,} of {wrong.total:,} scores are"
        )
        place = (
            "every layer's output is finite, the fault lies in what follows them"
            if wrong.layer is None
            else f"the first layer whose output is not is {wrong.layer}"
        )
        yield Observation(
            image.path,
            f"{scores} not finite, though the input is: {place}; no maps were made",
            "look for NaN in the weights (gradscope weights); if they are fine, run the model in "
            "float32, and compare with pictures that it answers",
            {"not_finite": wrong.scores, "scores": wrong.total, "layer": wrong.layer or ""},
            input=image.path,
        )


@rule("E108", "ambiguous-output", Severity.MEDIUM, reads=ExplainResult, needs=Need.ANSWERS)
def ambiguous_output(result: ExplainResult) -> Iterator[Observation]:
    """The model returns several sets of scores, and nothing tells which is its answer.

    Names decide (``logits``, not ``features``), and what is made from what: features come before
    the scores that are made from them. Two heads side by side are both answers; the first is
    explained unless ``--output-name`` says otherwise.
    """
    model = result.model
    if model.competing:
        others = listed(map(quoted, model.competing), len(model.competing), 6)
        yield Observation(
            model.path,
            f"the model returns several sets of scores; output {quoted(model.output or '')} is "
            f"explained, the first of them, not {others}",
            f"say which is meant: --output-name {model.competing[0]}",
            {"output": model.output or "", "competing": len(model.competing)},
        )
