"""What a record holds, against plain autograd in float64 or by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from gradscope import GradientRecorder
from gradscope.histories.history import Status
from gradscope.histories.open import open_history
from gradscope.histories.sketching import seed_of, sketch

from .training import cnn, mlp, norm, run, transformer


@pytest.mark.parametrize("make", [mlp, cnn, transformer])
def test_every_statistic_equals_that_of_autograd(make: Any, tmp_path: Path) -> None:
    _, seen = run(make, tmp_path / "a", every=1)

    history = open_history(str(tmp_path / "a"))

    assert history.steps.tolist() == list(range(12))
    np.testing.assert_allclose(history.loss, [s["loss"] for s in seen], rtol=1e-6)
    for field, fact in (
        ("l2", "l2"), ("max_abs", "max_abs"), ("zero_fraction", "zero"), ("param_l2", "param"),
        ("update_l2", "update"),
    ):  # fmt: skip
        wanted = [[s["rows"][layer.name][fact] for layer in history.layers] for s in seen]
        np.testing.assert_allclose(getattr(history, field), wanted, rtol=2e-5, atol=1e-7)
    cosines = [[s["rows"][layer.name]["grad_cos"] for layer in history.layers] for s in seen]
    moved = np.array([[s["rows"][y.name]["l2"] > 1e-7 for y in history.layers] for s in seen])
    np.testing.assert_allclose(history.update_cosine[moved], np.array(cosines)[moved], atol=2e-3)


def test_sketches_are_those_of_numpy(tmp_path: Path) -> None:
    _, seen = run(mlp, tmp_path / "a", steps=3, every=1)

    history = open_history(str(tmp_path / "a"))

    assert history.sketches is not None
    for t, record in enumerate(seen):
        for row, layer in enumerate(history.layers):
            facts = record["rows"][layer.name]
            wanted = sketch(facts["grad"] / facts["l2"], seed=seed_of(layer.name))
            np.testing.assert_allclose(history.sketches.values[t, row], wanted, atol=1e-3)


def test_a_half_precision_gradient_whose_norm_overflows_stays_finite(tmp_path: Path) -> None:
    model = nn.Linear(1000, 100, bias=False).half()
    model.weight.grad = torch.full_like(model.weight, 3000.0)
    with GradientRecorder(model, None, tmp_path / "a", every=1) as recorder:
        recorder.capture(0)

    history = open_history(str(tmp_path / "a"))

    assert history.l2[0, 0] == pytest.approx(3000 * np.sqrt(1e5), rel=1e-4)


def test_once_a_gradient_was_not_finite_its_elements_are_counted(tmp_path: Path) -> None:
    model = nn.Linear(3, 2, bias=False)
    with GradientRecorder(model, None, tmp_path / "a", every=1, capacity=2) as recorder:
        for step in range(4):
            model.weight.grad = torch.ones(2, 3)
            if step > 0:
                model.weight.grad[0] = torch.tensor([float("nan"), float("inf"), -float("inf")])
            recorder.capture(step)

    history = open_history(str(tmp_path / "a"))

    assert np.isnan(history.l2[1:, 0]).all()
    assert history.n_nan[:, 0].tolist() == [-1, -1, 1, 1]
    assert history.n_inf[:, 0].tolist() == [-1, -1, 2, 2]


def test_none_frozen_and_zero_are_three_states(tmp_path: Path) -> None:
    model = nn.ModuleDict(
        {n: nn.Linear(2, 2, bias=False) for n in ("used", "unused", "frozen", "zero")}
    )
    model["frozen"].weight.requires_grad_(False)
    with GradientRecorder(model, None, tmp_path / "a", every=1) as recorder:
        x = torch.ones(1, 2)
        (model["used"](x) + model["frozen"](x) + 0.0 * model["zero"](x)).sum().backward()
        recorder.capture(0)

    history = open_history(str(tmp_path / "a"))
    status = {layer.name: history.status[0, i] for i, layer in enumerate(history.layers)}

    assert status["used.weight"] == status["zero.weight"] == Status.RECORDED
    assert status["unused.weight"] == Status.NONE
    assert status["frozen.weight"] == Status.FROZEN
    assert history.l2[0, [y.name for y in history.layers].index("zero.weight")] == 0


def test_a_layer_unfrozen_late_and_one_added_late_are_there_from_then_on(tmp_path: Path) -> None:
    model = mlp()
    model[0].requires_grad_(False)
    with GradientRecorder(model, None, tmp_path / "a", every=1) as recorder:
        for step in range(6):
            if step == 2:
                model[0].requires_grad_(True)
            if step == 4:
                model.append(nn.Linear(3, 2))
            model.zero_grad()
            model(torch.randn(3, 6)).sum().backward()
            recorder.capture(step)

    history = open_history(str(tmp_path / "a"))
    rows = {layer.name: i for i, layer in enumerate(history.layers)}

    assert history.status[:, rows["0.weight"]].tolist() == [3, 3, 1, 1, 1, 1]
    assert history.status[:, rows["5.weight"]].tolist() == [0, 0, 0, 0, 1, 1]


def test_tied_weights_are_one_row(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 5, bias=False))
    model[1].weight = model[0].weight
    with GradientRecorder(model, None, tmp_path / "a", every=1) as recorder:
        model(torch.tensor([1, 2])).sum().backward()
        recorder.capture(0)

    assert [layer.name for layer in open_history(str(tmp_path / "a")).layers] == ["0.weight"]


def test_a_sparse_embedding_has_the_norm_of_its_dense_gradient(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(50, 4, sparse=True), nn.Linear(4, 1))
    with GradientRecorder(model, None, tmp_path / "a", every=1) as recorder:
        model(torch.tensor([1, 2, 2, 7])).sum().backward()
        recorder.capture(0)
        wanted = norm(model[0].weight.grad.to_dense())

    assert open_history(str(tmp_path / "a")).l2[0, 0] == pytest.approx(wanted, rel=1e-5)
