"""The callbacks in the frameworks themselves: pip install gradscope-diagnostics[frameworks]."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from gradscope import analyze_flow
from gradscope.histories.open import open_history

pytestmark = pytest.mark.filterwarnings("ignore")  # the frameworks' own

INPUTS = torch.randn(64, 6, generator=torch.Generator().manual_seed(0))


class Regressor(nn.Module):
    """What the Trainer and Lightning are given alike; ``spoiled`` from some call on."""

    def __init__(self, spoiled: int | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 1)
        self.spoiled, self.calls = spoiled, 0

    def forward(self, x: torch.Tensor) -> dict[str, Any]:
        out = self.second(torch.tanh(self.first(x)))
        loss = (out - x.sum(dim=1, keepdim=True)).square().mean() * 10
        self.calls += 1
        if self.spoiled is not None and self.calls > self.spoiled:
            loss = loss * math.nan
        return {"loss": loss}


def healthy_or_not(folder: Path) -> dict[str, str]:
    return {f.name: f.severity for f in analyze_flow(folder).findings}


# --- transformers -----------------------------------------------------------------------------


def trainer(folder: Path, model: nn.Module, **options: Any) -> list[dict[str, Any]]:
    """Train with the Trainer; what it has logged of each step."""
    transformers = pytest.importorskip("transformers")
    from gradscope.recording.huggingface import GradientRecorderCallback

    settings = {
        "max_steps": 24, "per_device_train_batch_size": 8, "learning_rate": 1e-2, "report_to": [],
        "logging_steps": 1, "save_strategy": "no", "use_cpu": True, "disable_tqdm": True,
        "logging_nan_inf_filter": False,
    }  # fmt: skip
    args = transformers.TrainingArguments(output_dir=str(folder / "out"), **settings | options)
    run = transformers.Trainer(
        model, args, train_dataset=[{"x": x} for x in INPUTS],
        callbacks=[GradientRecorderCallback(folder / "a", every=1)],
    )  # fmt: skip
    run.train()
    return [entry for entry in run.state.log_history if "grad_norm" in entry]


@pytest.mark.parametrize(
    "options",
    [
        {"max_grad_norm": 0.1},
        {"max_grad_norm": 0.1, "gradient_accumulation_steps": 2},
        {"max_grad_norm": 0.0},
    ],
)
def test_the_trainer_is_recorded_before_it_clips_with_its_loss(
    options: dict[str, Any], tmp_path: Path
) -> None:
    logged = trainer(tmp_path, Regressor(), **options)

    history = open_history(str(tmp_path / "a"))

    assert history.steps.tolist() == list(range(24))
    assert history.meta["stage"] == "pre_clip"
    assert history.meta["accumulation"] == options.get("gradient_accumulation_steps", 1)
    assert history.meta["captures"] == history.meta["optimizer_steps"] == 24
    assert history.topology == "recorded"
    np.testing.assert_allclose(history.total_l2, [e["grad_norm"] for e in logged], rtol=1e-4)
    np.testing.assert_allclose(history.loss, [e["loss"] for e in logged], rtol=1e-3)
    if limit := options["max_grad_norm"]:
        np.testing.assert_allclose(history.clip_coefficient, limit / history.total_l2, rtol=1e-3)
    assert np.isfinite(history.update_l2).all()


def test_a_healthy_trainer_passes_and_one_of_nan_does_not(tmp_path: Path) -> None:
    trainer(tmp_path / "healthy", Regressor())
    trainer(tmp_path / "ill", Regressor(spoiled=12))

    assert not {"high", "critical"} & set(healthy_or_not(tmp_path / "healthy" / "a").values())
    assert healthy_or_not(tmp_path / "ill" / "a")["non-finite-gradient"] == "critical"


# --- accelerate -------------------------------------------------------------------------------


@pytest.mark.parametrize("spoiled", [None, 12])
def test_accelerate_is_recorded_where_gradients_are_complete(
    spoiled: int | None, tmp_path: Path
) -> None:
    accelerate = pytest.importorskip("accelerate")
    from gradscope.recording.accelerate import AcceleratedRecorder

    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = Regressor(spoiled)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    model, optimizer = accelerator.prepare(model, optimizer)
    with AcceleratedRecorder(accelerator, model, optimizer, tmp_path / "a", every=1) as recorder:
        for batch in INPUTS.split(2):
            with accelerator.accumulate(model):
                loss = model(batch)["loss"]
                accelerator.backward(loss)
                recorder.capture(loss=loss, max_norm=1.0)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()

    history = open_history(str(tmp_path / "a"))
    found = healthy_or_not(tmp_path / "a")

    assert history.steps.tolist() == list(range(16))
    assert history.topology == "recorded"
    assert history.update_l2 is not None
    assert (found.get("non-finite-gradient") == "critical") == (spoiled is not None)


def test_accelerates_scaler_is_not_made_to_unscale_twice(tmp_path: Path) -> None:
    """The gradients still carry the loss scale where they are captured."""
    accelerate = pytest.importorskip("accelerate")
    from gradscope.recording.accelerate import AcceleratedRecorder

    accelerator = accelerate.Accelerator(cpu=True)
    model = nn.Linear(3, 2, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    accelerator.scaler = scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    with AcceleratedRecorder(accelerator, model, optimizer, tmp_path / "a", every=1) as recorder:
        for step in range(4):
            optimizer.zero_grad()
            loss = model(torch.ones(1, 3)).sum() * (math.inf if step == 2 else 1.0)
            scaler.scale(loss).backward()
            recorder.capture(loss=loss)
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()

    history = open_history(str(tmp_path / "a"))

    np.testing.assert_allclose(history.l2[[0, 1, 3], 0], math.sqrt(6), rtol=1e-5)
    assert history.max_abs[0, 0] == 1.0
    assert history.skipped.tolist() == [0, 0, 1, 0]
    assert healthy_or_not(tmp_path / "a").get("non-finite-gradient", "info") == "info"


# --- lightning --------------------------------------------------------------------------------


def lightning(folder: Path, module: Any, **options: Any) -> None:
    pl: Any = pytest.importorskip("lightning.pytorch")
    from gradscope.recording.lightning import GradientRecorderCallback

    data: Any = torch.utils.data.DataLoader(INPUTS, batch_size=2)
    settings = {
        "max_epochs": 1, "accelerator": "cpu", "logger": False, "enable_checkpointing": False,
        "enable_progress_bar": False, "enable_model_summary": False,
    }  # fmt: skip
    pl.Trainer(
        callbacks=[GradientRecorderCallback(folder / "a", every=1)], **settings | options
    ).fit(module, data)


def module(spoiled: int | None = None) -> tuple[Any, list[float]]:
    """A module that calls no forward of its own, and the losses that it has seen."""
    pl: Any = pytest.importorskip("lightning.pytorch")
    losses: list[float] = []

    class Module(pl.LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.net = Regressor(spoiled)

        def training_step(self, batch: torch.Tensor) -> torch.Tensor:
            loss = self.net(batch)["loss"]
            losses.append(float(loss.detach()))
            return loss

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), 1e-2)

    return Module(), losses


@pytest.mark.parametrize("accumulated", [1, 2])
def test_lightning_is_recorded_before_it_clips_with_its_loss(
    accumulated: int, tmp_path: Path
) -> None:
    ours, losses = module()
    lightning(tmp_path, ours, accumulate_grad_batches=accumulated, gradient_clip_val=0.1)

    history = open_history(str(tmp_path / "a"))

    wanted = np.reshape(losses, (-1, accumulated)).mean(axis=1)
    assert history.steps.tolist() == list(range(len(wanted)))
    assert history.topology == "recorded"
    assert history.meta["accumulation"] == accumulated
    np.testing.assert_allclose(history.loss, wanted, rtol=1e-5)
    assert (history.total_l2 > 0.2).all()
    np.testing.assert_allclose(history.clip_coefficient, 0.1 / history.total_l2, rtol=1e-4)


def test_lightnings_loss_scale_is_taken_out_of_the_loss_and_skipped_steps_are_known(
    tmp_path: Path,
) -> None:
    pl: Any = pytest.importorskip("lightning.pytorch")
    ours, losses = module()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**30)
    lightning(tmp_path, ours, plugins=[pl.plugins.MixedPrecision("16-mixed", "cpu", scaler)])

    history = open_history(str(tmp_path / "a"))

    assert history.skipped.any()
    np.testing.assert_allclose(history.loss, losses, rtol=2e-2)
    assert not {"high", "critical"} & set(healthy_or_not(tmp_path / "a").values())


def test_a_healthy_lightning_run_passes_and_one_of_nan_does_not(tmp_path: Path) -> None:
    lightning(tmp_path / "healthy", module()[0])
    lightning(tmp_path / "ill", module(spoiled=20)[0])

    assert not {"high", "critical"} & set(healthy_or_not(tmp_path / "healthy" / "a").values())
    assert healthy_or_not(tmp_path / "ill" / "a")["non-finite-gradient"] == "critical"


def test_lightnings_optimizers_are_recorded_each_at_its_own_steps(tmp_path: Path) -> None:
    pl: Any = pytest.importorskip("lightning.pytorch")

    class Gan(pl.LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False
            torch.manual_seed(0)
            self.g, self.d = nn.Linear(6, 6), nn.Linear(6, 1)

        def training_step(self, batch: torch.Tensor) -> None:
            opt_g, opt_d = self.optimizers()
            opt_d.zero_grad()
            self.manual_backward((self.d(self.g(batch).detach()) - self.d(batch)).mean())
            opt_d.step()
            opt_g.zero_grad()
            self.manual_backward(-self.d(self.g(batch)).mean())
            opt_g.step()

        def configure_optimizers(self) -> Any:
            return [torch.optim.Adam(m.parameters(), 1e-3) for m in (self.g, self.d)]

    lightning(tmp_path, Gan())

    history = open_history(str(tmp_path / "a"))

    assert history.steps.tolist() == list(range(32))
    assert {layer.module: layer.optimizer for layer in history.layers} == {"g": 0, "d": 1}
    assert history.optimizer_loss.shape == (32, 2)
    assert np.isfinite(history.optimizer_loss).all()
    assert np.isfinite(history.update_l2).all()
