"""Several optimizers: whose step a record is of, and that the others' parameters are absent."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from gradscope import GradientRecorder, analyze_flow
from gradscope.errors import UsageError
from gradscope.histories.history import Status
from gradscope.histories.open import open_history

from .training import mlp, norm


def gan() -> nn.ModuleDict:
    torch.manual_seed(0)
    return nn.ModuleDict(
        {
            "g": nn.Sequential(nn.Linear(4, 16), nn.LeakyReLU(0.2), nn.Linear(16, 2)),
            "d": nn.Sequential(nn.Linear(2, 16), nn.LeakyReLU(0.2), nn.Linear(16, 1)),
        }
    )


def play(
    folder: Path, *, steps: int = 60, every: int = 1, critics: int = 1, explicit: bool = False,
    numbered: bool = False, named: bool = False,
) -> tuple[Any, dict[str, list[dict[str, float]]]]:  # fmt: skip
    """Train a GAN on a ring; what plain autograd says of each optimizer's own steps."""
    model = gan()
    optimizers = {k: torch.optim.Adam(model[k].parameters(), 2e-3, (0.5, 0.9)) for k in "gd"}
    seen: dict[str, list[dict[str, float]]] = {"g": [], "d": []}
    given = optimizers if named else list(optimizers.values())
    with GradientRecorder(model, given, folder, every=every) as recorder:

        def move(which: str, step: int, loss: torch.Tensor) -> None:
            optimizers[which].zero_grad()
            loss.backward()
            options = {"optimizer": which if named else optimizers[which]} if explicit else {}
            recorder.capture(step if numbered else None, loss=loss, **options)
            weight = model[which][0].weight
            before, length = weight.detach().clone(), norm(weight.grad)
            optimizers[which].step()
            seen[which].append(
                {"l2": length, "update": norm(weight - before), "loss": float(loss.detach())}
            )

        for step in range(steps):
            angle = torch.rand(64) * 6.283
            real = torch.stack([angle.cos(), angle.sin()], 1)
            fake = model["g"](torch.randn(64, 4))
            ones = torch.ones(64, 1)
            wrong = F.binary_cross_entropy_with_logits(model["d"](fake.detach()), 0 * ones)
            move("d", step, wrong + F.binary_cross_entropy_with_logits(model["d"](real), ones))
            if step % critics == critics - 1:
                fooled = F.binary_cross_entropy_with_logits(model["d"](fake), ones)
                move("g", step, fooled)
    return open_history(str(folder)), seen


@pytest.mark.parametrize("explicit", [True, False])
@pytest.mark.parametrize("numbered", [True, False])
@pytest.mark.parametrize("critics", [1, 3])
def test_each_optimizer_has_its_own_steps_norms_and_updates(
    critics: int, numbered: bool, explicit: bool, tmp_path: Path
) -> None:
    history, seen = play(
        tmp_path / "a", critics=critics, numbered=numbered, explicit=explicit, named=explicit
    )
    names = [layer.name for layer in history.layers]

    assert history.steps.tolist() == list(range(60))
    for which, facts in seen.items():
        row = names.index(f"{which}.0.weight")
        its = np.flatnonzero(history.status[:, row] == Status.RECORDED)
        own = slice(critics - 1, None, critics) if which == "g" else slice(None)
        assert its.tolist() == list(range(60))[own]
        np.testing.assert_allclose(history.l2[its, row], [f["l2"] for f in facts], rtol=1e-4)
        np.testing.assert_allclose(
            history.update_l2[its, row], [f["update"] for f in facts], rtol=1e-4
        )
        column = history.layers[row].optimizer
        np.testing.assert_allclose(
            history.optimizer_loss[its, column], [f["loss"] for f in facts], rtol=1e-5
        )
        absent = history.status[:, row] != Status.RECORDED
        assert (history.status[absent, row] == Status.NOT_RECORDED).all()
        assert np.isnan(history.l2[absent, row]).all()
        assert not history.sketches.values[absent][:, row].any()


def test_every_counts_the_steps_of_each(tmp_path: Path) -> None:
    history, _ = play(tmp_path / "a", steps=100, every=5, critics=4, explicit=True)
    rows = {layer.name: i for i, layer in enumerate(history.layers)}

    def recorded(name: str) -> list[int]:
        return history.steps[history.status[:, rows[name]] == Status.RECORDED].tolist()

    assert recorded("d.0.weight")[:5] == [0, 1, 5, 6, 10]
    # Its own steps 0, 1, 5, 6, 10, of which it takes one in four.
    assert recorded("g.0.weight")[:5] == [3, 7, 23, 27, 43]


@pytest.mark.parametrize("every", [1, 2, 10])
@pytest.mark.parametrize("critics", [1, 5])
def test_a_healthy_gan_has_no_findings(every: int, critics: int, tmp_path: Path) -> None:
    play(tmp_path / "a", steps=400, every=every, critics=critics)

    found = [f for f in analyze_flow(tmp_path / "a").findings if f.severity in ("high", "critical")]

    assert found == []


def test_optimizers_that_step_together_make_one_record_with_one_loss(tmp_path: Path) -> None:
    model = mlp()
    weights = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() < 2]
    optimizers = [torch.optim.SGD(weights, 0.1), torch.optim.Adam(others, 1e-3)]
    losses = []
    with GradientRecorder(model, optimizers, tmp_path / "a", every=1) as recorder:
        for step in range(5):
            model.zero_grad()
            loss = model(torch.randn(8, 6)).square().mean()
            loss.backward()
            losses.append(float(loss.detach()))
            recorder.capture(step, loss=loss)
            for optimizer in optimizers:
                optimizer.step()

    history = open_history(str(tmp_path / "a"))

    assert history.steps.tolist() == list(range(5))
    assert (history.status == Status.RECORDED).all()
    assert np.isfinite(history.update_l2).all()
    np.testing.assert_allclose(history.loss, losses, rtol=1e-6)
    assert history.lr[0].tolist() == [0.1, 1e-3]
    assert list(history.meta["optimizers"]) == ["0", "1"]


def test_without_capture_calls_each_is_taken_before_its_step(tmp_path: Path) -> None:
    model = gan()
    optimizers = [torch.optim.SGD(m.parameters(), 0.1) for m in model.values()]
    with GradientRecorder(model, optimizers, tmp_path / "a", every=1):
        for _ in range(4):
            for optimizer in optimizers:
                model.zero_grad()
                model["d"](model["g"](torch.randn(3, 4))).sum().backward()
                optimizer.step()

    history = open_history(str(tmp_path / "a"))

    assert history.meta["stage"] == "pre_step"
    assert history.steps.tolist() == [0, 1, 2, 3]
    assert (history.status == Status.RECORDED).all()


def test_an_optimizer_that_is_not_the_recorders_is_refused(tmp_path: Path) -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    recorder = GradientRecorder(model, optimizer, tmp_path / "a")

    with pytest.raises(UsageError, match="not made with"):
        recorder.capture(optimizer=torch.optim.SGD(model.parameters(), 0.1))
    with pytest.raises(UsageError, match="twice"):
        GradientRecorder(model, [optimizer, optimizer], tmp_path / "b")
    recorder.close()


@pytest.mark.parametrize("micro", [1, 4])
def test_captures_that_outnumber_the_steps_are_noticed(
    micro: int, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with GradientRecorder(model, optimizer, tmp_path / "a", every=1) as recorder:
        for i in range(40):
            model(torch.randn(4, 6)).sum().backward()
            recorder.capture(i)
            if i % micro == micro - 1:
                optimizer.step()
                optimizer.zero_grad()

    meta = open_history(str(tmp_path / "a")).meta

    assert (meta["captures"], meta["optimizer_steps"]) == (40, 40 // micro)
    said = [str(w.message) for w in recwarn if "call it once a step" in str(w.message)]
    assert len(said) == (micro > 1)


@pytest.mark.parametrize("captured", [True, False])
def test_optimizers_that_step_in_the_backward_pass_need_no_capture(
    captured: bool, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    model = mlp()
    steps = {p: torch.optim.SGD([p], 0.1) for p in model.parameters()}

    def step(parameter: torch.Tensor) -> None:
        steps[parameter].step()
        steps[parameter].zero_grad()

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(step)
    with GradientRecorder(model, [*steps.values()], tmp_path / "a", every=1) as recorder:
        for i in range(6):
            model(torch.randn(4, 6)).square().mean().backward()
            if captured:
                recorder.capture(i)

    history = open_history(str(tmp_path / "a"))

    assert (history.status == (Status.NONE if captured else Status.RECORDED)).all()
    said = [str(w.message) for w in recwarn if "before zero_grad()" in str(w.message)]
    assert len(said) == captured
