"""When explanations are findings, and when they are not."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from gradscope.attribution.diagnostics import Control, Diagnostics, Randomised
from gradscope.attribution.result import (
    Environment,
    ExplainResult,
    Explanation,
    Files,
    ImageFacts,
    MapFacts,
    ModelFacts,
    NotFinite,
    Preprocessed,
    Target,
)
from gradscope.report.model import Finding, NotEvaluated
from gradscope.report.rules import evaluate, load_rules, select_for

GOOD: dict[str, Any] = {
    "insertion_auc": 0.8,
    "deletion_auc": 0.1,
    "random_control": Control(
        insertion_auc=0.5, deletion_auc=0.4, insertion_spread=0.05, deletion_spread=0.05, rankings=5
    ),
    "randomisation": (Randomised(layer="0", correlation=0.1, magnitude_correlation=0.8),),
    "similarity": 0.1,
    "repeatability": 0.9,
    "noise_similarity": 0.0,
    "completeness_delta": 0.01,
    "relative_delta": 0.001,
}


def result(
    *,
    diagnostics: dict[str, Any] | None = None,
    values: tuple[float, float] = (0.0, 1.0),
    probability: float | None = 0.9,
    sign: Any = "positive",
    assumed: bool = False,
    source: str = "assumed",
    layer: str | None = "layer4",
) -> ExplainResult:
    explanation = Explanation(
        image="cat.png",
        image_sha256="0",
        method="gradcam",
        target=Target(index=281, label="tabby", score=3.0, probability=probability),
        layer=layer,
        layer_reason=None,
        options={},
        sign=sign,
        map=MapFacts(
            shape=(4, 4), min=values[0], max=values[1], sum=sum(values), concentration=0.3
        ),
        files=Files(),
        diagnostics=Diagnostics(**(GOOD if diagnostics is None else diagnostics)),
    )
    return ExplainResult(
        explanations=(explanation,),
        images=(
            ImageFacts(
                path="cat.png", sha256="0", width=4, height=4, mode="RGB", predictions=()
            ),
        ),
        model=ModelFacts(
            path="m.pt", sha256="0", format="export", architecture=None, parameters=1, classes=10,
            ends_in_softmax=False,
        ),
        preprocessing=Preprocessed(
            size=(4, 4), mean=(0.5,), std=(0.5,), steps=("a",), source=source, assumed=assumed
        ),
        environment=Environment(seed=0, device="cpu", dtype="float32", versions={}),
        evaluated=True,
    )  # fmt: skip


def found(made: ExplainResult) -> dict[str, str]:
    seen = evaluate(select_for(ExplainResult), made, "m.pt")
    return {f.name: str(f.severity) for f in seen if isinstance(f, Finding)}


def test_a_good_map_of_a_sure_model_raises_nothing() -> None:
    assert found(result()) == {}


@pytest.mark.parametrize(
    ("share", "severity"),
    [(0.05, None), (0.06, "medium"), (0.2, "medium"), (0.21, "high"), (math.nan, "high")],
)
def test_an_attribution_that_does_not_add_up_is_incomplete(
    share: float, severity: str | None
) -> None:
    seen = found(result(diagnostics=GOOD | {"relative_delta": share}))

    assert seen.get("incomplete-attribution") == severity


@pytest.mark.parametrize(
    ("share", "constants", "said", "advice"),
    [
        (0.3, 0.1, "by 30.0%", "stabilisers swallow"),
        (9.3e11, 6.7e13, "by 9.3e+11 times of it", "relevance grows without bound"),
        # A path whose ends have nearly the same score.
        (12.0, None, "by 12 times of it", "steps"),
    ],
)
def test_relevance_that_grows_without_bound_is_told_from_a_coarse_path(
    share: float, constants: float | None, said: str, advice: str
) -> None:
    method = "integrated-gradients" if constants is None else "lrp"
    own = {} if constants is None else {"relevance_of_constants": constants}
    made = result(diagnostics=GOOD | {"relative_delta": share, "method": own})
    (one,) = made.explanations
    made = made.model_copy(update={"explanations": (one.model_copy(update={"method": method}),)})

    (finding,) = (f for f in evaluate([r for r in load_rules().values() if r.code == "E101"],
                                      made, "m.pt") if isinstance(f, Finding))  # fmt: skip

    assert said in finding.message
    assert advice in finding.recommendation


@pytest.mark.parametrize(
    ("values", "severity"),
    [
        ((math.nan, math.nan), "critical"),
        ((0.0, math.inf), "critical"),
        ((0.0, 0.0), "medium"),
        ((2.0, 2.0), "medium"),
        ((-3.0, -1.0), "medium"),
        ((-3.0, 0.0), "medium"),
        ((-3.0, 1.0), None),
    ],
)
def test_a_map_that_says_nothing_is_degenerate(
    values: tuple[float, float], severity: str | None
) -> None:
    assert found(result(values=values)).get("degenerate-map") == severity


@pytest.mark.parametrize("side", [2, 3, 4, 7])
def test_a_constant_map_is_degenerate_after_upsampling_too(side: int) -> None:
    small = torch.full((1, 1, side, side), 1.7)
    large = torch.nn.functional.interpolate(small, size=224, mode="bilinear", align_corners=False)

    seen = found(result(values=(float(large.min()), float(large.max()))))

    assert seen.get("degenerate-map") == "medium"


def test_a_small_but_real_range_is_not_degenerate() -> None:
    assert "degenerate-map" not in found(result(values=(1.0, 1.0001)))
    assert "degenerate-map" not in found(result(values=(1.0, 1 + 1.2e-6)))
    assert "degenerate-map" in found(result(values=(1.0, 1 + 0.8e-6)))
    assert "degenerate-map" not in found(result(values=(0.0, 1e-30)))


def test_a_signed_map_may_be_negative_everywhere() -> None:
    assert "degenerate-map" not in found(result(values=(-3.0, -1.0), sign="signed"))


@pytest.mark.parametrize(
    ("insertion", "deletion", "severity"),
    [
        (0.6, 0.45, None),
        (0.45, 0.3, None),
        # No better than the control, and not surely worse: one picture does not tell.
        (0.5, 0.4, "unsettled"),
        (0.45, 0.36, "unsettled"),
        (0.45, 0.42, "unsettled"),
        (0.41, 0.44, "unsettled"),
        # 1.9 times the spread of 0.05 * sqrt(2), and of a mean of five.
        (0.4, 0.445, "unsettled"),
        (0.4, 0.45, "medium"),
        (0.3, 0.35, "medium"),
        (0.42, 0.48, "medium"),
        (0.39, 0.51, "high"),
        (0.3, 0.6, "high"),
    ],
)
def test_a_map_that_ranks_pixels_worse_than_at_random_places_is_unfaithful(
    insertion: float, deletion: float, severity: str | None
) -> None:
    made = result(diagnostics=GOOD | {"insertion_auc": insertion, "deletion_auc": deletion})
    told = list(evaluate([r for r in load_rules().values() if r.code == "E103"], made, "m.pt"))

    if severity == "unsettled":
        (one,) = told
        assert isinstance(one, NotEvaluated)
        assert "1 map cannot settle" in one.reason
    else:
        assert found(made).get("unfaithful") == severity


@pytest.mark.parametrize(
    ("gains", "wanted"),
    [
        # In standard deviations of one map: 0.0775.
        ([1.5] * 6, {}),
        ([0.3, -0.5, 0.6, -0.2, 0.4], {"gradcam": "medium"}),
        ([0.3, -0.5, 0.6, -0.2], {}),
        ([-1.0] * 5, {"gradcam": "high"}),
        # What three deviations prove, a hundred do not prove better.
        ([100.0, -1, -1, -1, -1], {"gradcam": "medium"}),
        # One map that is worse, of a method that is not.
        ([1.5, 1.5, 1.5, 1.5, 1.5, -2.5], {"5.png: gradcam → 281 tabby": "medium"}),
    ],
)
def test_several_pictures_show_that_a_method_is_no_better_than_chance(
    gains: list[float], wanted: dict[str, str]
) -> None:
    (one,) = result().explanations
    pictures = []
    for number, gain in enumerate(gains):
        facts = {"insertion_auc": 0.5 + gain * 0.05 * 2**0.5 * 1.2**0.5, "deletion_auc": 0.4}
        diagnostics = one.diagnostics.model_copy(update=facts)
        pictures.append(
            one.model_copy(update={"diagnostics": diagnostics, "image": f"{number}.png"})
        )
    made = result().model_copy(update={"explanations": tuple(pictures)})

    seen = evaluate([r for r in load_rules().values() if r.code == "E103"], made, "m.pt")

    assert {f.subject: str(f.severity) for f in seen if isinstance(f, Finding)} == wanted


@pytest.mark.parametrize(
    ("alike", "own", "verdict"),
    [
        # A half of how alike it is to itself, and 0.15 for a single picture.
        (0.3, 0.9, "passes"),
        (0.33, 0.9, "open"),
        (0.58, 0.9, "open"),
        (0.6, 0.9, "fails"),
        (0.7, 1.0, "fails"),
        # Of which noise excuses no more than three tenths.
        (0.24, 0.3, "passes"),
        (0.46, 0.3, "fails"),
    ],
)
def test_a_map_that_outlives_its_parameters_fails_the_sanity_check(
    alike: float, own: float, verdict: str
) -> None:
    made = result(diagnostics=GOOD | {"similarity": alike, "repeatability": own})

    assert sanity(made) == {"gradcam": verdict}


def sanity(made: ExplainResult) -> dict[str, str]:
    """Of each method, whether it passes, fails or is left open by the sanity check."""
    told = {e.method: "passes" for e in made.explanations}
    for one in evaluate([r for r in load_rules().values() if r.code == "E104"], made, "m.pt"):
        if isinstance(one, Finding):
            told[one.subject] = "fails"
        else:
            told[one.reason.partition(":")[0]] = "open"
    return told


@pytest.mark.parametrize(
    ("alike", "verdict"),
    [
        ((0.6, 0.62, 0.58, 0.61), "fails"),
        # The same mean, and pictures that differ.
        ((0.3, 0.9, 0.4, 0.81), "open"),
        ((0.1, -0.2, 0.3, 0.15), "passes"),
        ((0.44, 0.46, 0.45, 0.45), "open"),
        ((0.4, 0.41, 0.4, 0.39), "passes"),
    ],
)
def test_more_pictures_settle_what_one_leaves_open(alike: tuple[float, ...], verdict: str) -> None:
    (one,) = result().explanations
    pictures = [
        one.model_copy(update={"diagnostics": one.diagnostics.model_copy(
            update={"similarity": value}), "image": f"{number}.png"})
        for number, value in enumerate(alike)
    ]  # fmt: skip
    made = result().model_copy(update={"explanations": tuple(pictures)})

    assert sanity(made) == {"gradcam": verdict}


@pytest.mark.parametrize(("noise", "fails"), [(0.94, False), (0.96, True)])
def test_a_map_that_noise_has_as_well_fails_the_sanity_check(noise: float, fails: bool) -> None:
    made = result(diagnostics=GOOD | {"noise_similarity": noise})

    assert ("sanity-check-failed" in found(made)) is fails


def test_the_sanity_check_is_one_of_a_method_over_all_its_pictures() -> None:
    (one,) = result().explanations
    other = one.diagnostics.model_copy(update={"similarity": 1.0})
    pictures = [one, one.model_copy(update={"diagnostics": other, "image": "dog.png"})]
    guided = [e.model_copy(update={"method": "guided-backprop", "diagnostics": other})
              for e in pictures]  # fmt: skip
    made = result().model_copy(update={"explanations": (*pictures, *guided)})

    seen = [f for f in evaluate(select_for(ExplainResult), made, "m.pt") if isinstance(f, Finding)]

    # The mean of 0.1 and 1 is near the limit.
    assert sanity(made) == {"gradcam": "open", "guided-backprop": "fails"}
    (failed,) = (f for f in seen if f.name == "sanity-check-failed")
    assert failed.evidence["similarity"] == pytest.approx(1)
    assert failed.evidence["maps"] == 2


def test_a_map_without_measurements_is_unknown_to_the_rules_that_need_them() -> None:
    rules = [r for r in load_rules().values() if r.code in {"E103", "E104"}]

    seen = list(evaluate(rules, result(diagnostics={}), "m.pt"))

    assert [n.rule for n in seen if isinstance(n, NotEvaluated)] == [
        "unfaithful",
        "sanity-check-failed",
    ]


@pytest.mark.parametrize(
    ("target", "wanted"),
    [
        ({}, "cat.png: gradcam → 281 tabby"),
        ({"label": None}, "cat.png: gradcam → 281"),
        ({"versus": 5, "versus_label": "dog"}, "cat.png: gradcam → 281 tabby rather than dog"),
        ({"versus": 5}, "cat.png: gradcam → 281 tabby rather than 5"),
        ({"aim": "value"}, "cat.png: gradcam → value"),
    ],
)
def test_a_finding_names_the_picture_the_method_and_the_target(
    target: dict[str, Any], wanted: str
) -> None:
    (explanation,) = result().explanations
    changed = explanation.target.model_copy(update=target)

    assert explanation.model_copy(update={"target": changed}).subject == wanted


@pytest.mark.parametrize(("insertion", "severity"), [(0.5985, None), (0.5976, "medium")])
def test_a_control_without_a_spread_has_one_of_a_thousandth(
    insertion: float, severity: str | None
) -> None:
    still = Control(
        insertion_auc=0.5, deletion_auc=0.5, insertion_spread=0, deletion_spread=0, rankings=5
    )
    measured = {"insertion_auc": insertion, "deletion_auc": 0.6, "random_control": still}

    assert found(result(diagnostics=GOOD | measured)).get("unfaithful") == severity


def test_a_tenth_is_likely_enough() -> None:
    assert "low-confidence" not in found(result(probability=0.1))
    assert "low-confidence" in found(result(probability=0.099))


def test_an_unlikely_target_and_a_guessed_preprocessing_are_told() -> None:
    assert found(result(probability=0.01, assumed=True)) == {
        "low-confidence": "low",
        "assumed-preprocessing": "low",
    }


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("assumed", "ImageNet's preprocessing is assumed (a)"),
        ("torchvision's IMAGENET1K_V2 for resnet50",
         "the preprocessing of torchvision's IMAGENET1K_V2 for resnet50 is assumed (a); other "
         "weights of that model have another"),
    ],
)  # fmt: skip
def test_a_guess_and_a_doubt_between_weights_are_told_apart(source: str, said: str) -> None:
    seen = evaluate(select_for(ExplainResult), result(assumed=True, source=source), "m.pt")

    assert [f.message for f in seen if isinstance(f, Finding)] == [said]


def test_what_was_not_measured_is_not_evaluated_rather_than_passed() -> None:
    made = result(diagnostics={}).model_copy(update={"evaluated": False})

    seen = list(evaluate(select_for(ExplainResult), made, "m.pt"))

    unasked = {n.rule for n in seen if isinstance(n, NotEvaluated)}
    assert unasked == {"incomplete-attribution", "unfaithful", "sanity-check-failed"}


def test_each_finding_names_its_picture_and_one_about_the_model_the_model() -> None:
    made = result(probability=0.01, assumed=True)

    seen = evaluate(select_for(ExplainResult), made, "m.pt")

    assert {f.name: f.input for f in seen if isinstance(f, Finding)} == {
        "low-confidence": "cat.png",
        "assumed-preprocessing": "m.pt",
    }


def test_a_model_without_probabilities_is_neither_sure_nor_unsure() -> None:
    seen = list(evaluate(select_for(ExplainResult), result(probability=None), "m.pt"))

    assert not [f for f in seen if isinstance(f, Finding)]
    (left,) = [n for n in seen if isinstance(n, NotEvaluated)]
    assert (left.rule, "gives no probabilities" in left.reason) == ("low-confidence", True)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (NotFinite(scores=3, total=10, layer="stem.conv"),
         "3 of 10 scores are not finite, though the input is: the first layer whose output is not "
         "is stem.conv"),
        (NotFinite(scores=1, total=1, layer=None), "the score is not finite"),
    ],
)  # fmt: skip
def test_an_answer_that_is_not_finite_is_critical(wrong: NotFinite, said: str) -> None:
    made = result()
    spoiled = made.images[0].model_copy(update={"not_finite": wrong})

    seen = evaluate(
        select_for(ExplainResult), made.model_copy(update={"images": (spoiled,)}), "m.pt"
    )

    (finding,) = [f for f in seen if isinstance(f, Finding)]
    assert (finding.name, str(finding.severity), finding.input) == (
        "non-finite-output", "critical", "cat.png",
    )  # fmt: skip
    assert said in finding.message


def test_outputs_that_compete_are_a_finding_about_the_model() -> None:
    made = result()
    facts = made.model.model_copy(update={"output": "kind", "competing": ("colour", "size")})

    seen = evaluate(select_for(ExplainResult), made.model_copy(update={"model": facts}), "m.pt")

    (finding,) = [f for f in seen if isinstance(f, Finding)]
    assert (finding.name, finding.input) == ("ambiguous-output", "m.pt")
    assert "output 'kind' is explained, the first of them, not 'colour', 'size'" in finding.message
    assert "--output-name colour" in finding.recommendation
