"""Every flow rule fires on what it is for, and says what, where, since when and what to do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from gradscope import analyze_flow
from gradscope.flow.result import FlowResult
from gradscope.histories.history import History, Status
from gradscope.report.rules import select_for

from .made import made, noise, of_vectors, quadratic

RULES = {rule.name: rule for rule in select_for(FlowResult)}


def with_nan() -> History:
    norms = noise(60, 4)
    norms[30, 1] = np.nan
    return made(norms)


def vanished() -> History:
    norms = noise(60, 8)
    norms[:, 2] *= 1e-6
    return made(norms)


def exploded() -> History:
    norms = noise(200, 4, scale=0.05)
    norms[150:] *= 300
    return made(norms)


def spiked() -> History:
    norms = noise(200, 4, scale=0.05)
    norms[150] *= 30
    return made(norms)


def died() -> History:
    norms = noise(60, 4)
    norms[30:, 1] = 0
    return made(norms)


def repeated() -> History:
    norms = noise(60, 4)
    norms[30:] = norms[30]
    return made(norms)


def narrow() -> History:
    norms = noise(60, 7)
    norms[:, 3] /= 300
    return made(norms)


def wild() -> History:
    return made(noise(60, 3), param_l2=np.ones((60, 3)), update_l2=np.full((60, 3), 0.7))


def unused() -> History:
    norms = noise(60, 4)
    status = np.full(norms.shape, Status.RECORDED, np.uint8)
    status[:, 1] = Status.NONE
    return made(norms, status=status)


def lost() -> History:
    loss = np.r_[np.linspace(3, 1, 60), np.full(60, 15.0)] * noise(120, 1, 0.02)[:, 0]
    return made(noise(120, 3), loss=loss)


def outside() -> History:
    history = made(noise(60, 3), meta={"optimizer": {"class": "SGD"}})
    groups = (0, None, 0)
    layers = (replace(layer, group=g) for layer, g in zip(history.layers, groups, strict=True))
    return replace(history, layers=tuple(layers))


def summed() -> History:
    rng = np.random.default_rng(3)
    signal = rng.normal(size=400)
    total, vectors = np.zeros(400), []
    for _ in range(60):
        total = total + signal + 0.5 * rng.normal(size=400)
        vectors.append([total])
    return of_vectors(vectors)


def damped() -> History:
    return made(noise(60, 3) * 1e-9, meta={"optimizer": {"class": "Adam", "eps": 1e-8}})


def underflowing() -> History:
    fields = {"zero_fraction": np.full((60, 3), 0.8), "meta": {"precision": {"grad": "float16"}}}
    return made(noise(60, 3), **fields)


def replaced() -> History:
    weights = np.ones((60, 3))
    weights[30:] = 0.5
    loss = np.where(np.arange(60) < 30, 0.1, 2.0) * noise(60, 1, 0.05)[:, 0]
    return made(noise(60, 3), param_l2=weights, update_l2=np.full((60, 3), 1e-3), loss=loss)


FIRING: dict[str, tuple[Callable[[], History], str, str]] = {
    "non-finite-gradient": (with_nan, "critical", "layers.1"),
    "vanishing-gradient": (vanished, "critical", "layers.2"),
    "exploding-gradient": (exploded, "critical", "layers.0 … layers.3"),
    "gradient-spike": (spiked, "low", "network"),
    "dead-zone": (died, "high", "layers.1"),
    "oscillation": (lambda: quadratic(1.5), "medium", "network"),
    "stagnation": (repeated, "medium", "network"),
    "bottleneck": (narrow, "medium", "layers.3"),
    "update-ratio": (wild, "high", "network"),
    "missing-gradient": (unused, "medium", "layers.1"),
    "diverged": (lost, "high", "loss"),
    "not-in-optimizer": (outside, "medium", "layers.1"),
    "underflow": (underflowing, "medium", "layers.0 … layers.2"),
    "always-clipped": (
        lambda: made(noise(60, 3), clip_coefficient=np.full(60, 0.2)),
        "low",
        "network",
    ),
    "carried-over": (summed, "medium", "network"),
    "epsilon-damped": (damped, "medium", "network"),
    "overwritten-weights": (replaced, "medium", "layers.0 … layers.2"),
}


def test_every_rule_of_the_contract_has_an_example() -> None:
    assert set(FIRING) == set(RULES)


@pytest.mark.parametrize("name", FIRING)
def test_a_rule_fires_with_its_severity_place_and_remedy(name: str) -> None:
    make, severity, subject = FIRING[name]

    found = [f for f in analyze_flow(make()).findings if f.name == name]

    assert [(f.severity, f.subject) for f in found] == [(severity, subject)]
    assert found[0].recommendation
    assert found[0].evidence
    assert found[0].rule == RULES[name].code


@pytest.mark.parametrize("name", FIRING)
def test_a_rule_is_silent_about_an_ordinary_run(name: str) -> None:
    rng = np.random.default_rng(2)
    signal = rng.normal(size=(4, 60))
    vectors = [[s + 2 * rng.normal(size=60) for s in signal] for _ in range(120)]
    ratio = np.full((120, 4), 1e-3)

    history = of_vectors(
        vectors,
        loss=np.linspace(2, 1, 120) * noise(120, 1, 0.05)[:, 0],
        meta={"optimizer": {"class": "Adam", "eps": 1e-8}},
        param_l2=np.ones((120, 4)),
        update_l2=ratio,
        edges=np.array([[i, i + 1] for i in range(4)]),
        topology="given",
    )
    layers = tuple(replace(layer, group=0) for layer in history.layers)
    report = analyze_flow(replace(history, layers=layers), select=[name])

    assert report.findings == ()
    assert report.coverage.not_evaluated == ()


@pytest.mark.parametrize("name", FIRING)
def test_a_rule_documents_why_it_matters(name: str) -> None:
    assert len(RULES[name].documentation.splitlines()) >= 3


def test_a_cause_is_one_finding_however_many_layers_it_has() -> None:
    norms = noise(60, 40) * 10.0 ** (-0.6 * np.arange(40)[::-1])

    report = analyze_flow(made(norms))

    assert [f.name for f in report.findings] == ["vanishing-gradient"]
    assert report.findings[0].evidence["factor_per_layer"] == pytest.approx(10**0.6, rel=0.02)


def test_a_small_gradient_that_an_adaptive_optimizer_makes_up_for_is_at_most_medium() -> None:
    norms = noise(60, 8)
    norms[:, 2] *= 1e-6

    kept = analyze_flow(made(norms, meta={"optimizer": {"class": "AdamW", "eps": 1e-12}}))
    lost = analyze_flow(made(norms, meta={"optimizer": {"class": "AdamW", "eps": 1e-4}}))

    assert [f.severity for f in kept.findings] == ["medium"]
    assert [f.severity for f in lost.findings] == ["critical"]
    assert "epsilon" in lost.findings[0].recommendation


def test_half_precision_that_underflows_is_told_by_its_type() -> None:
    norms = noise(60, 4) * 1e-3
    fields = {"zero_fraction": np.full((60, 4), 0.7), "numel": 10**6}

    half = analyze_flow(made(norms, meta={"precision": {"grad": "float16"}}, **fields))
    whole = analyze_flow(made(norms, meta={"precision": {"grad": "bfloat16"}}, **fields))

    assert [f.name for f in half.findings] == ["underflow"]
    assert "gradient scaler" in half.findings[0].recommendation
    assert whole.findings == ()


def test_biases_before_a_normalisation_are_one_finding_and_no_alarm() -> None:
    norms = noise(60, 6)
    norms[:, 1:4] *= 1e-9
    ratio = np.full(norms.shape, 1e-3)
    ratio[:, 1:4] = 1e-12
    kinds = ["bias"] * 6
    isolated = np.array([[i, 6] for i in range(6)])

    report = analyze_flow(
        made(norms, kinds=kinds, edges=isolated, param_l2=np.ones(norms.shape), update_l2=ratio)
    )

    (finding,) = report.findings
    assert (finding.name, finding.severity) == ("vanishing-gradient", "low")
    assert "bias=False" in finding.recommendation
    assert all(f"layers.{i}" in finding.message for i in (1, 2, 3))
