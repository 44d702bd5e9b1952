"""What the optimizer makes of gradients: what it holds, epsilon, clipping, adding up."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from gradscope import analyze_flow
from gradscope.flow.directions import cosines
from gradscope.flow.graph import graph_of
from gradscope.flow.joining import series
from gradscope.flow.levels import levels
from gradscope.flow.optimizer import accumulation, clipping, damping, unoptimized
from gradscope.flow.records.optimizer import Accumulation, Damping
from gradscope.histories.history import History, Layer

from .made import made, noise, of_vectors

ADAM = {"optimizer": {"class": "AdamW", "eps": 1e-8}}


def grouped(history: History, *groups: int | None) -> History:
    layers = (replace(row, group=g) for row, g in zip(history.layers, groups, strict=True))
    return replace(history, layers=tuple(layers))


def rules(history: History) -> list[str]:
    return [f.name for f in analyze_flow(history).findings]


# --- whom it holds --------------------------------------------------------------------------------


def test_a_layer_in_no_group_is_told_with_its_share_of_the_parameters() -> None:
    history = grouped(made(noise(60, 3), numel=[100, 300, 100], meta=ADAM), 0, None, 0)

    (found,) = analyze_flow(history).findings

    assert (found.name, found.severity, found.subject) == (
        "not-in-optimizer",
        "medium",
        "layers.1",
    )
    assert "60% of the parameters" in found.message


@pytest.mark.parametrize(
    "history",
    [
        grouped(made(noise(60, 3), meta=ADAM), None, None, None),
        grouped(made(noise(60, 3)), 0, None, 0),
        grouped(made(noise(60, 3) * [1, 0, 1], meta=ADAM), 0, None, 0),
        grouped(
            made(noise(60, 3), param_l2=np.ones((60, 3)), update_l2=np.full((60, 3), 1e-3)),
            *(0, None, 0),
        ),
        grouped(made(noise(60, 3), meta=ADAM), 0, 1, 0),
    ],
    ids=["no groups", "no optimizer", "no gradient", "it moves", "all have one"],
)
def test_what_does_not_prove_that_a_layer_is_outside_proves_nothing(history: History) -> None:
    assert unoptimized(series(history)) is None


@pytest.mark.parametrize("updates", [True, False])
def test_of_a_layer_whose_other_parameters_an_optimizer_holds_those_outside_are_named(
    updates: bool,
) -> None:
    """Biases alone were passed on: the gradients of the weights are never zeroed and add up."""
    rows = tuple(
        Layer(f"{n}.{what}", kind, size, str(n), group=group)
        for n in range(3)
        for what, kind, size, group in (("weight", "matrix", 90, None), ("bias", "bias", 10, 0))
    )
    vectors = [[np.zeros(1)] * 6 for _ in range(60)]
    total = np.zeros((6, 300))
    for step, batch in enumerate(batches(60, 1.0)):
        total[::2] += batch
        total[1::2] = batch
        vectors[step] = list(total.copy())
    fields: dict[str, Any] = {"meta": ADAM}
    if updates:
        fields |= {
            "param_l2": np.ones((60, 6)),
            "update_l2": np.full((60, 6), 1e-3) * np.array([0, 1] * 3),
        }
    history = replace(of_vectors(vectors, **fields), layers=rows)

    (found,) = analyze_flow(history).findings

    assert found.name == "not-in-optimizer"
    assert found.message.startswith("0.weight, 1.weight, 2.weight get gradients")
    assert "90% of the parameters" in found.message


def test_gradients_that_nobody_zeroes_add_up_and_do_not_explode() -> None:
    norms = noise(120, 3, 0.05)
    norms[:, 1] *= np.arange(1, 121)
    history = made(
        norms, meta=ADAM, param_l2=np.ones((120, 3)), update_l2=np.full((120, 3), 1e-3) * [1, 0, 1]
    )

    assert "exploding-gradient" in rules(grouped(history, 0, 0, 0))
    assert rules(grouped(history, 0, None, 0)) == ["not-in-optimizer"]


# --- epsilon --------------------------------------------------------------------------------------


def damped(history: History) -> Damping | None:
    s = series(history)
    return damping(s, levels(s, graph_of(s)), 32)


@pytest.mark.parametrize("scale", [1e-12, 1e-9, 1e-7, 1.0])
def test_what_epsilon_leaves_is_the_rms_over_the_rms_and_epsilon(scale: float) -> None:
    found = damped(made(np.full((60, 2), scale), numel=100, meta=ADAM))

    assert found is not None
    rms = np.float32(scale) / 10
    assert found.left == pytest.approx(rms / (rms + 1e-8))
    assert found.share == (1.0 if rms < 1e-8 else 0.0)


def test_a_tight_limit_pushes_gradients_below_epsilon() -> None:
    history = made(1e-3 * noise(60, 2), numel=100, meta=ADAM)
    clipped = replace(history, clip_coefficient=np.full(60, 1e-6))

    assert rules(history) == []
    found = {f.name: f for f in analyze_flow(clipped).findings}
    assert set(found) == {"epsilon-damped", "always-clipped"}
    assert "after clipping" in found["epsilon-damped"].message
    assert "clipping limit" in found["epsilon-damped"].recommendation


def test_one_damped_layer_is_no_damped_network() -> None:
    norms = np.full((60, 4), 1.0) * [1e-9, 1, 1, 1]

    assert "epsilon-damped" not in rules(made(norms, meta=ADAM))
    assert damped(made(norms, meta={"optimizer": {"class": "SGD"}})) is None


# --- clipping -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("share", "told"), [(1.0, True), (0.98, False), (0.0, False)])
def test_steps_are_always_clipped_when_all_are(share: float, told: bool) -> None:
    coefficient = np.where(np.arange(100) < share * 100, 0.25, 1.0)

    assert ("always-clipped" in rules(made(noise(100, 2), clip_coefficient=coefficient))) is told


def test_norms_after_clipping_stay_at_the_limit() -> None:
    norms = noise(100, 2)
    pinned = norms / np.linalg.norm(norms, axis=1, keepdims=True) * 0.5

    found = clipping(series(made(pinned)))

    assert found is not None
    assert found.share == 1.0
    assert found.limit == pytest.approx(0.5)
    assert clipping(series(made(norms))).share < 0.1
    assert clipping(series(made(norms[:10]))) is None


@pytest.mark.parametrize(
    ("coefficient", "optimizer", "falls", "severity"),
    [
        (0.01, {"class": "SGD", "momentum": 0.9}, False, "medium"),
        (0.01, {"class": "SGD", "momentum": 0.9}, True, "low"),
        (0.5, {"class": "SGD"}, False, "low"),
        (0.01, {"class": "AdamW", "eps": 1e-30}, False, "low"),
        (0.01, {"class": "Lion"}, False, "low"),
        (0.01, None, False, "low"),
    ],
)
def test_clipping_that_freezes_a_run_is_medium(
    coefficient: float, optimizer: Any, falls: bool, severity: str
) -> None:
    """Steps of SGD are as long as its gradients; an adaptive optimizer divides by their length."""
    loss = np.geomspace(2.3, 0.5 if falls else 2.28, 100) * noise(100, 1, 0.02)[:, 0]
    fields = {"clip_coefficient": np.full(100, coefficient), "loss": loss}

    report = analyze_flow(made(noise(100, 2), meta={"optimizer": optimizer}, **fields))

    (found,) = (f for f in report.findings if f.name == "always-clipped")
    assert found.severity == severity
    assert ("the loss does not fall" in found.message) is (severity == "medium")


# --- adding up ------------------------------------------------------------------------------------


def added(vectors: Any, **fields: Any) -> Accumulation | None:
    s = series(of_vectors([[v] for v in vectors], **fields))
    return accumulation(s, cosines(s), None)


def batches(records: int, noise_scale: float, seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    signal = rng.normal(size=300)
    return [signal + noise_scale * rng.normal(size=300) for _ in range(records)]


@pytest.mark.parametrize("noise_scale", [0.1, 1.0, 3.0])
def test_gradients_that_are_never_zeroed_add_one_batch_a_step(noise_scale: float) -> None:
    vectors = list(np.cumsum(batches(80, noise_scale), axis=0))

    found = added(vectors)

    assert found is not None
    exact = [np.linalg.norm(b - a) for a, b in pairwise(vectors)]
    assert found.added == pytest.approx(np.median(exact) / np.linalg.norm(vectors[0]), rel=0.3)
    assert "carried-over" in rules(of_vectors([[v] for v in vectors]))


def test_a_gradient_that_agrees_with_itself_does_not_add_up() -> None:
    steady = batches(80, 0.01)
    growing = [v * 1.05**t for t, v in enumerate(batches(80, 1e-6))]

    for vectors in (steady, batches(80, 1.0), growing):
        assert "carried-over" not in rules(of_vectors([[v] for v in vectors]))
    assert added(steady[:4]) is None


def test_an_optimizer_that_holds_other_parameters_than_those_recorded_is_told() -> None:
    """It was made of a copy of the model, or before the model was moved or wrapped."""
    parts = {"param_l2": np.ones((60, 3)), "update_l2": np.zeros((60, 3))}
    counted = {"captures": 60, "optimizer_steps": 60, "optimizer": {"class": "SGD"}}

    (found,) = analyze_flow(made(noise(60, 3), meta=counted, **parts)).findings
    unknown = analyze_flow(made(noise(60, 3), meta={"optimizer": {"class": "SGD"}}, **parts))

    assert (found.name, found.severity) == ("not-in-optimizer", "medium")
    assert "100% of the parameters" in found.message
    assert "not-in-optimizer" not in {f.name for f in unknown.findings}


@pytest.mark.parametrize(
    ("calls", "steps", "told"), [(40, 10, 1), (40, 20, 1), (40, 0, 1), (40, 34, 0), (40, 40, 0)]
)
def test_captures_of_micro_batches_are_told_from_steps_that_mixed_precision_skipped(
    calls: int, steps: int, told: int
) -> None:
    report = analyze_flow(made(noise(40, 3), meta={"captures": calls, "optimizer_steps": steps}))

    found = [f for f in report.findings if f.name == "carried-over"]
    assert [f.severity for f in found] == ["medium"] * told
    assert all("micro-batch" in f.recommendation for f in found)


@pytest.mark.parametrize("skipped", [40, 39, 20])
def test_steps_that_mixed_precision_skipped_are_no_micro_batches(skipped: int) -> None:
    """A loss scale that never comes down: no step was made for any of the calls."""
    norms = noise(40, 3)
    norms[:skipped, 0] = np.inf
    flags = (np.arange(40) < skipped).astype(np.uint8)
    meta = {"captures": 400, "optimizer_steps": 10 * (40 - skipped)}

    report = analyze_flow(made(norms, skipped=flags, meta=meta))

    assert "carried-over" not in {f.name for f in report.findings}
    (found,) = (f for f in report.findings if f.name == "non-finite-gradient")
    assert found.severity == "info"
    assert ("no step was ever made" in found.recommendation) is (skipped == 40)
    assert report.gate.exit_code == (4 if skipped > 37 else 0)
