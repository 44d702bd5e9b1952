"""The rules of ``gradscope explain``; importing this registers them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence

from gradscope.attribution.methods import method_named
from gradscope.attribution.result import Control, Diagnostics, ExplainResult, Explanation, Need
from gradscope.report.model import Fact
from gradscope.report.rules import Observation, Unknown, rule
from gradscope.report.severity import Severity
from gradscope.text import listed, quoted


def _about(
    e: Explanation,
    message: str,
    recommendation: str,
    evidence: Mapping[str, Fact],
    *,
    threshold: float | None = None,
    severity: Severity | None = None,
) -> Observation:
    """An observation of one explanation, about its picture."""
    return Observation(
        e.subject, message, recommendation, evidence, threshold, severity, input=e.image
    )


@rule(
    "E101", "incomplete-attribution", Severity.MEDIUM, reads=ExplainResult, needs=Need.COMPLETENESS
)
def incomplete_attribution(
    result: ExplainResult, *, tolerance: float = 0.05, gross: float = 0.2
) -> Iterator[Observation | Unknown]:
    """An attribution's sum is not what the score changed by between reference and image.

    Integrated gradients must add up (Sundararajan et al. 2017, completeness). Where they do not,
    the path was sampled too coarsely: medium above ``tolerance`` of the change, high above
    ``gross``. Relevance must be conserved: what arrives at the pixels and at constants is the
    score. The relative delta is undefined where the score does not change at all.
    """
    for e in result.explanations:
        delta, share = e.diagnostics.completeness_delta, e.diagnostics.relative_delta
        if delta is None:
            continue
        if share is None:
            yield Unknown(f"{e.subject}: the score does not change from the reference")
        elif not share <= tolerance:
            yield _about(
                e,
                f"the attribution's sum misses the change of the score by {share:.1%} "
                f"({delta:+.3g})",
                method_named(e.method).refine,
                {"relative_delta": share, "completeness_delta": delta},
                threshold=tolerance,
                severity=Severity.MEDIUM if share <= gross else Severity.HIGH,
            )


@rule("E102", "degenerate-map", Severity.MEDIUM, reads=ExplainResult, needs=Need.MAPS)
def degenerate_map(result: ExplainResult, *, rounding: float = 1e-6) -> Iterator[Observation]:
    """A map shows nothing: it is not finite (critical), zero, constant, or nowhere positive.

    A map without a positive value is a result, "no evidence for the target at this layer", but its
    picture is empty. A range below ``rounding`` of the greatest magnitude counts as constant:
    bilinear upsampling in float32 makes as much of a constant map.
    """
    for e in result.explanations:
        low, high, total = e.map.min, e.map.max, e.map.sum
        facts = {"min": low, "max": high}
        if not (math.isfinite(low) and math.isfinite(high) and math.isfinite(total)):
            yield _about(
                e,
                "the map contains NaN or infinity",
                "check the weights for NaN (gradscope weights), or run the model in float32",
                facts,
                severity=Severity.CRITICAL,
            )
        elif high - low <= rounding * max(abs(low), abs(high)):
            what = "zero everywhere" if high == 0 else f"{high:.3g} everywhere"
            yield _about(e, f"the map is {what}", _elsewhere(e), facts)
        elif high <= 0 and e.sign == "positive":
            yield _about(
                e,
                f"no evidence for the target: the map's greatest value is {high:.3g}",
                _elsewhere(e),
                facts,
                threshold=0.0,
            )


def _elsewhere(e: Explanation) -> str:
    if e.layer is not None:
        return (
            f"layer {e.layer} may get no gradient, or not respond to the target: try another "
            "--layer (see `gradscope layers`), another --target, or integrated-gradients"
        )
    return "try another --target, or a CAM method; saturated or dead models give such maps too"


@rule("E103", "unfaithful", Severity.MEDIUM, reads=ExplainResult, needs=Need.EVALUATION)
def unfaithful(result: ExplainResult, *, spreads: float = 2.0) -> Iterator[Observation | Unknown]:
    """A map ranks pixels no better than the same map at random positions.

    Inserting its strongest pixels first should raise the target's probability sooner, deleting them
    should lower it sooner (Petsiuk et al. 2018). Both count: what one is better than the control,
    in its standard deviations (at most three), has to outweigh what the other is worse. Medium
    where it does not; high when both are worse by more than ``spreads``.
    """
    for e in result.explanations:
        control = e.diagnostics.random_control
        insertion, deletion = e.diagnostics.insertion_auc, e.diagnostics.deletion_auc
        if control is None or insertion is None or deletion is None:
            yield Unknown(f"{e.subject}: insertion and deletion were not measured")
            continue
        gain, loss = _gains(insertion, deletion, control)
        if min(gain, 3) + min(loss, 3) > 0:
            continue
        yield _about(
            e,
            f"insertion {insertion:.3f} (at random positions {control.insertion_auc:.3f}), "
            f"deletion {deletion:.3f} ({control.deletion_auc:.3f}): the map is no better than "
            "chance",
            "do not rely on it; compare with integrated-gradients or rise, and check the target",
            {
                "insertion_auc": insertion,
                "deletion_auc": deletion,
                "control_insertion_auc": control.insertion_auc,
                "control_deletion_auc": control.deletion_auc,
            },
            threshold=spreads,
            severity=Severity.HIGH if max(gain, loss) < -spreads else Severity.MEDIUM,
        )


def _gains(insertion: float, deletion: float, control: Control) -> tuple[float, float]:
    """How much better than the control, in its spreads (of at least a thousandth)."""
    return (
        (insertion - control.insertion_auc) / max(control.insertion_spread, 1e-3),
        (control.deletion_auc - deletion) / max(control.deletion_spread, 1e-3),
    )


@rule("E104", "sanity-check-failed", Severity.MEDIUM, reads=ExplainResult, needs=Need.EVALUATION)
def sanity_check_failed(
    result: ExplainResult, *, share: float = 0.6, steady: float = 0.7, same: float = 0.95
) -> Iterator[Observation | Unknown]:
    """A method's maps depend too little on the model's parameters, or not on the picture.

    The mean rank correlation of the raw values with those under random parameters counts, over the
    whole cascade from the output down and all pictures (Adebayo et al. 2018; Sixt et al. 2020), as
    a ``share`` of that with the maps of the same pictures changed invisibly (at least ``steady``):
    a noisy method is unlike itself, too. guided-backprop and deconvnet are known to fail. Limits
    are set on five trained networks: of gradients and Grad-CAM at most a fifth is left, of
    guided-backprop 0.7 to 1. Maps above ``same`` in correlation with that of noise show no picture.
    """
    for method in dict.fromkeys(e.method for e in result.explanations):
        known = [e.diagnostics for e in result.explanations if e.method == method]
        alike = _mean(d.similarity for d in known)
        own, noise = (
            _mean(getattr(d, k) for d in known) for k in ("repeatability", "noise_similarity")
        )
        if alike is None or own is None or noise is None:
            yield Unknown(f"{method}: {_unjudged(known)}")
        elif noise > same:
            yield Observation(
                method,
                f"its map of noise is the same (rank correlation {noise:.2f}): it does not depend "
                "on the picture",
                f"it shows the model, not what it sees; {_INSTEAD}",
                {"noise_similarity": noise},
                same,
            )
        elif alike > share * max(own, steady):
            yield Observation(
                method,
                f"with random parameters its maps stay similar (mean rank correlation {alike:.2f}; "
                f"{own:.2f} after an invisible change of the picture)",
                f"it shows edges of the picture rather than what the model uses; {_INSTEAD}",
                {"similarity": alike, "repeatability": own, "maps": len(known)},
                share,
            )


_INSTEAD = "use gradcam or integrated-gradients"


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _unjudged(known: Sequence[Diagnostics]) -> str:
    if all(d.randomisation is None for d in known):
        return "its dependence on parameters was not measured, or the model has none to randomise"
    return "its maps are constant, or its sensitivity was not measured"


@rule("E105", "low-confidence", Severity.LOW, reads=ExplainResult, needs=Need.MAPS)
def low_confidence(
    result: ExplainResult, *, likely: float = 0.1
) -> Iterator[Observation | Unknown]:
    """The class that is explained is improbable to the model.

    Its probability is below ``likely``, so the map explains an answer that the model does not give.
    Often the target, the preprocessing or the image is not the intended one.
    """
    for e in result.explanations:
        probability = e.target.probability
        if probability is None:
            yield Unknown(f"{e.subject}: the model gives no probabilities")
        elif probability < likely:
            yield _about(
                e,
                f"the model gives the target a probability of {probability:.2g}",
                "check the predictions in the report: is this the class you meant, and do the "
                "preprocessing and the labels belong to the model?",
                {"probability": probability},
                threshold=likely,
            )


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
