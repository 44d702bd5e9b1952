"""The callbacks without their frameworks: stand-ins for the base classes, and what is missing."""

from __future__ import annotations

import importlib
import sys
import types
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from gradscope.errors import UsageError
from gradscope.histories.open import open_history
from gradscope.recording.accelerate import AcceleratedRecorder


def stand_in(monkeypatch: pytest.MonkeyPatch, module: str, attribute: str, ours: str) -> Any:
    """Our callback's module over an empty base class in place of the framework's."""
    parts = module.split(".")
    for i in range(1, len(parts) + 1):
        monkeypatch.setitem(sys.modules, ".".join(parts[:i]), types.ModuleType(".".join(parts[:i])))
    setattr(sys.modules[module], attribute, type(attribute, (), {}))
    monkeypatch.setitem(sys.modules, ours, types.ModuleType(ours))  # gone again afterwards
    del sys.modules[ours]
    return importlib.import_module(ours)


def backward(model: nn.Module) -> torch.Tensor:
    model.zero_grad()
    loss = model(torch.ones(2, 3)).sum()
    loss.backward()
    return loss


def test_lightning_records_before_every_optimizer_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = stand_in(
        monkeypatch, "lightning.pytorch.callbacks", "Callback", "gradscope.recording.lightning"
    )
    model = nn.Linear(3, 2)
    trainer = SimpleNamespace(
        optimizers=[torch.optim.SGD(model.parameters(), 0.1)], global_step=0,
        precision_plugin=SimpleNamespace(), accumulate_grad_batches=1, gradient_clip_val=None,
        gradient_clip_algorithm=None,
    )  # fmt: skip
    callback = ours.GradientRecorderCallback(tmp_path / "a", every=1)
    callback.on_train_start(trainer, model)
    for trainer.global_step in range(3):
        callback.on_before_backward(trainer, model, backward(model))
        callback.on_before_optimizer_step(trainer, model, trainer.optimizers[0])
        trainer.optimizers[0].step()
    callback.on_train_end(trainer, model)

    history = open_history(str(tmp_path / "a"))

    assert history.steps.tolist() == [0, 1, 2]
    assert history.loss is not None


@pytest.mark.parametrize(
    ("name", "package"), [("lightning", "Lightning"), ("huggingface", "transformers")]
)
def test_a_missing_framework_is_named(
    name: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("lightning", "pytorch_lightning", "transformers"):
        monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.delitem(sys.modules, f"gradscope.recording.{name}", raising=False)

    with pytest.raises(UsageError, match=f"needs {package}.*: pip install"):
        importlib.import_module(f"gradscope.recording.{name}")


def test_accelerate_records_only_where_gradients_are_complete(tmp_path: Path) -> None:
    model = nn.Linear(3, 2)
    accelerator = SimpleNamespace(sync_gradients=False, scaler=None)
    with AcceleratedRecorder(accelerator, model, None, tmp_path / "a", every=1) as recorder:
        for step in range(6):
            backward(model)
            accelerator.sync_gradients = step % 2 == 1
            recorder.capture()

    assert open_history(str(tmp_path / "a")).steps.tolist() == [0, 1, 2]
    with pytest.raises(UsageError, match="Accelerator"):
        AcceleratedRecorder(object(), model, None, tmp_path / "b")
