"""The recorder in a training loop: what it records when, and what it leaves behind."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from gradscope import GradientRecorder
from gradscope.errors import UsageError
from gradscope.histories.open import open_history
from gradscope.recording import lots, records, spool

from .training import mlp, norm, run, transformer


def test_every_tenth_step_and_the_one_after_it_are_recorded(tmp_path: Path) -> None:
    run(mlp, tmp_path / "a", steps=25, every=10)

    assert open_history(str(tmp_path / "a")).steps.tolist() == [0, 1, 10, 11, 20, 21]


def test_training_is_the_same_to_the_bit_with_and_without(tmp_path: Path) -> None:
    with_, _ = run(transformer, tmp_path / "a", every=1)
    without, _ = run(transformer, tmp_path / "b", record=False)

    assert all(
        torch.equal(a, b) for a, b in zip(with_.parameters(), without.parameters(), strict=True)
    )


def test_nothing_waits_for_the_device_before_a_shard_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lots, "fits", lambda _: False)  # as on any other device
    monkeypatch.setattr(records, "on_host", lambda _: False)
    monkeypatch.setattr(spool, "FIRST_SHARD", 1000)
    model = mlp()
    optimizer = torch.optim.Adam(model.parameters())
    recorder = GradientRecorder(model, optimizer, tmp_path / "a", every=1, capacity=1000)
    waits: list[str] = []
    for name in ("item", "__bool__", "__float__", "__int__", "tolist", "cpu", "numpy"):
        original = getattr(torch.Tensor, name)

        def counted(self: Any, *a: Any, _n: str = name, _f: Any = original, **k: Any) -> Any:
            waits.append(_n)
            return _f(self, *a, **k)

        monkeypatch.setattr(torch.Tensor, name, counted)
    for step in range(5):
        loss = model(torch.randn(4, 6)).sum()
        loss.backward()
        waits.clear()
        recorder.capture(step, loss=loss)
        taken = list(waits)
        # Hashing the names' buckets reads host memory once, whatever the device.
        assert [w for w in taken if step > 0 or w != "numpy"] == []
        recorder.after_step(0)
        optimizer.zero_grad()
    monkeypatch.undo()
    recorder.close()


def test_a_compiled_model_is_recorded_under_its_own_names(tmp_path: Path) -> None:
    torch.manual_seed(0)
    plain = mlp()
    model: Any = torch.compile(plain, backend="eager")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with GradientRecorder(model, optimizer, tmp_path / "a", every=1) as recorder:
        for step in range(3):
            optimizer.zero_grad()
            model(torch.ones(2, 6)).sum().backward()
            wanted = [norm(p.grad) for p in plain.parameters()]
            recorder.capture(step)
            optimizer.step()

    history = open_history(str(tmp_path / "a"))

    assert [layer.name for layer in history.layers] == [n for n, _ in plain.named_parameters()]
    np.testing.assert_allclose(history.l2[-1], wanted, rtol=1e-5)


def test_without_a_call_gradients_are_taken_before_the_optimizer_and_marked(tmp_path: Path) -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with GradientRecorder(model, optimizer, tmp_path / "a", every=1):
        for _ in range(3):
            (model(torch.randn(4, 6)) * 1e4).sum().backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()

    history = open_history(str(tmp_path / "a"))

    assert history.meta["stage"] == "pre_step"
    np.testing.assert_allclose(np.sqrt((history.l2**2).sum(axis=1)), 1.0, rtol=1e-4)


def test_a_capture_inside_a_closure_is_the_only_record_of_its_step(tmp_path: Path) -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    lengths = []
    with GradientRecorder(model, optimizer, tmp_path / "a", every=1) as recorder:

        def closure() -> torch.Tensor:
            optimizer.zero_grad()
            loss = model(torch.randn(4, 6)).square().sum()
            loss.backward()
            lengths.append(norm(model[0].weight.grad))
            recorder.capture(loss=loss)
            return loss

        for _ in range(3):
            optimizer.step(closure)

    history = open_history(str(tmp_path / "a"))

    assert history.meta["stage"] == "pre_clip"
    assert history.steps.tolist() == [0, 1, 2]
    assert history.meta["captures"] == history.meta["optimizer_steps"] == 3
    np.testing.assert_allclose(history.l2[:, 0], lengths, rtol=1e-5)
    assert np.isfinite(history.update_l2).all()


def test_a_learning_rate_is_the_one_that_the_step_was_taken_with(tmp_path: Path) -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    with GradientRecorder(model, optimizer, tmp_path / "a", every=1) as recorder:
        for step in range(4):
            optimizer.zero_grad()
            model(torch.randn(4, 6)).sum().backward()
            recorder.capture(step)
            optimizer.step()
            scheduler.step()

    assert open_history(str(tmp_path / "a")).lr[:, 0].tolist() == [1.0, 0.5, 0.25, 0.125]


def test_a_step_that_the_scaler_skips_is_marked(tmp_path: Path) -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    with GradientRecorder(model, optimizer, tmp_path / "a", every=1) as recorder:
        for step in range(4):
            loss = model(torch.randn(4, 6)).sum() * (float("inf") if step == 2 else 1.0)
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            recorder.capture(step, loss=loss, scaler=scaler)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()

    history = open_history(str(tmp_path / "a"))

    assert history.skipped is not None
    assert history.skipped.tolist() == [0, 0, 1, 0]
    assert history.loss_scale is not None
    assert history.loss_scale.tolist() == [8.0, 8.0, 8.0, 4.0]


def test_accumulated_gradients_are_one_record(tmp_path: Path) -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with GradientRecorder(model, optimizer, tmp_path / "a", every=1) as recorder:
        for _ in range(4):
            model(torch.ones(1, 6)).sum().backward()
        total = norm(model[0].weight.grad)
        recorder.capture(0)
        optimizer.step()

    history = open_history(str(tmp_path / "a"))

    assert history.steps.tolist() == [0]
    assert history.l2[0, 0] == pytest.approx(total, rel=1e-5)


def test_a_capture_after_zero_grad_is_told_the_order(tmp_path: Path) -> None:
    model = mlp()
    with (
        GradientRecorder(model, None, tmp_path / "a", every=1) as recorder,
        pytest.warns(UserWarning, match="after backward"),
    ):
        recorder.capture(0)


def test_a_folder_that_holds_a_run_is_not_written_over(tmp_path: Path) -> None:
    run(mlp, tmp_path / "a", steps=2, every=1)

    with pytest.raises(UsageError, match="already holds"):
        GradientRecorder(mlp(), None, tmp_path / "a")


def test_a_resumed_run_is_one_history_and_the_restart_wins(tmp_path: Path) -> None:
    run(mlp, tmp_path / "a", steps=20, every=1)
    model = mlp()
    with GradientRecorder(model, None, tmp_path / "a", every=1, resume=True) as recorder:
        for step in range(10, 30):
            model.zero_grad()
            model(torch.randn(3, 6)).sum().backward()
            recorder.capture(step)

    history = open_history(str(tmp_path / "a"))

    assert history.steps.tolist() == list(range(30))
    assert any("restarts at 10" in note for note in history.notes)


def test_a_resumed_run_writes_over_none_of_its_shards(tmp_path: Path) -> None:
    run(mlp, tmp_path / "a", steps=12, every=1, capacity=1)
    before = {path.name: path.read_bytes() for path in (tmp_path / "a").iterdir()}
    model = mlp()
    with GradientRecorder(model, None, tmp_path / "a", every=1, resume=True) as recorder:
        model(torch.ones(3, 6)).sum().backward()
        recorder.capture(12)

    after = {path.name: path.read_bytes() for path in (tmp_path / "a").iterdir()}

    assert sorted(after.keys() - before.keys()) == ["00012.npz"]
    assert {name: after[name] for name in before} == before
    assert open_history(str(tmp_path / "a")).steps.tolist() == list(range(13))


CRASH = """
    import os, signal, sys, torch
    from gradscope import GradientRecorder
    model = torch.nn.Linear(3, 2)
    recorder = GradientRecorder(model, None, sys.argv[1], every=1, capacity=8)
    for step in range(20):
        model.zero_grad(); model(torch.ones(1, 3)).sum().backward(); recorder.capture(step)
    {end}
"""


@pytest.mark.parametrize(
    ("end", "records"),
    [
        # Shards of four and of eight, the next was not full.
        ("os.kill(os.getpid(), signal.SIGKILL)", 12),
        ("os.kill(os.getpid(), signal.SIGTERM)", 20),
        ("raise SystemError", 20),
        ("sys.exit(3)", 20),
        ("del recorder; os._exit(0)", 20),
    ],
)
def test_a_run_that_dies_leaves_what_was_recorded(end: str, records: int, tmp_path: Path) -> None:
    code = textwrap.dedent(CRASH).format(end=end)
    subprocess.run([sys.executable, "-c", code, tmp_path / "a"], check=False, capture_output=True)

    history = open_history(str(tmp_path / "a"))

    assert len(history.steps) == records
    assert history.failures == ()
