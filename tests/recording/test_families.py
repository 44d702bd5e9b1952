"""Trainings of every kind: with a recorder the losses are the same to the bit, and all is read."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from gradscope import GradientRecorder
from gradscope.histories.history import History, Status
from gradscope.histories.open import open_history

from .training import mlp

#: A training: given what makes a recorder of a model and its optimizers, the losses of its steps.
Training = Callable[[Callable[..., Any]], Iterator[float]]

STEPS = 12


class Nobody:
    """In place of a recorder."""

    def capture(self, *_: Any, **__: Any) -> None:
        pass


def batches(steps: int = STEPS) -> Iterator[torch.Tensor]:
    chooser = torch.Generator().manual_seed(5)
    for _ in range(steps):
        yield torch.randn(8, 6, generator=chooser)


def simple(change: Callable[[int, Any, Any], None] | None = None, **options: Any) -> Training:
    """A loop in which ``change`` may happen to model and optimizer before a step."""

    def train(recorder_of: Callable[..., Any]) -> Iterator[float]:
        model = options.get("make", mlp)()
        optimizer = torch.optim.SGD(model.parameters(), 0.05)
        recorder = recorder_of(model, optimizer)
        for step, batch in enumerate(batches()):
            if change is not None:
                change(step, model, optimizer)
            optimizer.zero_grad(set_to_none=step % 2 == 0)
            loss = model(batch.to(next(model.parameters()).dtype)).square().mean()
            loss.backward()
            recorder.capture(step, loss=loss)
            nn.utils.clip_grad_norm_(model.parameters(), options.get("clip", 1e9))
            optimizer.step()
            yield float(loss.detach())
            del loss  # its graph knows the parameters as they were

    return train


def replaced(step: int, model: Any, optimizer: Any) -> None:
    if step == 5:
        model[0].weight = nn.Parameter(model[0].weight.detach() * 2)
        optimizer.add_param_group({"params": [model[0].weight], "lr": 0.01})


def tied(step: int, model: Any, _: Any) -> None:
    if step == 5:
        model[2].weight = nn.Parameter(model[2].weight.detach().clone())
        model[4].weight = nn.Parameter(torch.ones(3, 4))
        model[4].bias = model[2].bias = nn.Parameter(torch.zeros(1))


def resized(step: int, model: Any, _: Any) -> None:
    if step == 5:
        for p in model.parameters():
            p.grad = None
        model[0].weight.data, model[0].bias.data = torch.ones(5, 6), torch.ones(5)
        model[2].weight.data = torch.ones(4, 5)


def cast(step: int, model: Any, _: Any) -> None:
    if step in (4, 8):
        model.to(torch.float64 if step == 4 else torch.bfloat16)


def grown(step: int, model: Any, optimizer: Any) -> None:
    if step == 5:
        model.append(nn.Linear(3, 2))
        optimizer.add_param_group({"params": model[5].parameters()})


def shrunk(step: int, model: Any, _: Any) -> None:
    if step == 5:
        del model[4]


def frozen(step: int, model: Any, _: Any) -> None:
    model[0].requires_grad_(step % 4 < 2)
    if step % 4 == 2:
        model[0].weight.grad = None


def spread(step: int, model: Any, _: Any) -> None:
    """Weights in another order."""
    if step == 5:
        with torch.no_grad():
            model[2].weight.data = model[2].weight.data.t().contiguous().t()


def closures(recorder_of: Callable[..., Any]) -> Iterator[float]:
    model = mlp()
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=3)
    recorder = recorder_of(model, optimizer)
    for batch in batches():

        def closure(batch: torch.Tensor = batch) -> torch.Tensor:
            optimizer.zero_grad()
            loss = model(batch).square().mean()
            loss.backward()
            recorder.capture(loss=loss)
            return loss

        yield float(optimizer.step(closure).detach())


def accumulated(recorder_of: Callable[..., Any]) -> Iterator[float]:
    model = mlp()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    recorder = recorder_of(model, optimizer)
    for step, batch in enumerate(batches()):
        optimizer.zero_grad()
        total = torch.zeros(())
        for micro in batch.chunk(4):
            loss = model(micro).square().mean() / 4
            loss.backward()
            total += loss.detach()
        recorder.capture(step, loss=total)
        optimizer.step()
        yield float(total)


def scaled(recorder_of: Callable[..., Any]) -> Iterator[float]:
    model, scaler = mlp(), torch.amp.GradScaler("cpu", init_scale=16.0)
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    recorder = recorder_of(model, optimizer)
    for step, batch in enumerate(batches()):
        optimizer.zero_grad()
        loss = model(batch * (torch.inf if step % 5 == 3 else 1.0)).sum() * (
            torch.inf if step % 5 == 3 else 1.0
        )
        scaler.scale(loss).backward()
        recorder.capture(step, loss=loss, scaler=scaler)
        scaler.step(optimizer)
        scaler.update()
        yield float(loss.detach())


class Words(nn.Module):
    """A table with sparse gradients before a dense layer."""

    def __init__(self, table: Any, **options: Any) -> None:
        super().__init__()
        self.table, self.head = table(30, 6, sparse=True, **options), nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.table(x))


def sparse(table: Any) -> Training:
    def train(recorder_of: Callable[..., Any]) -> Iterator[float]:
        model = Words(table)
        both = [
            torch.optim.SparseAdam(list(model.table.parameters()), 1e-2),
            torch.optim.Adam(model.head.parameters(), 1e-2),
        ]
        recorder = recorder_of(model, both)
        chooser = torch.Generator().manual_seed(5)
        for step in range(STEPS):
            model.zero_grad()
            words = torch.randint(0, 30, (4, 5), generator=chooser)
            loss = model(words).square().mean()
            loss.backward()
            recorder.capture(step, loss=loss)
            for optimizer in both:
                optimizer.step()
            yield float(loss.detach())

    return train


def adversaries(recorder_of: Callable[..., Any]) -> Iterator[float]:
    """Five steps of the critic for one of the generator."""
    parts = nn.ModuleDict({"g": nn.Linear(3, 6), "d": nn.Linear(6, 1)})
    each = {name: torch.optim.RMSprop(part.parameters(), 1e-3) for name, part in parts.items()}
    recorder = recorder_of(parts, list(each.values()))
    for step, batch in enumerate(batches(36)):
        which = "g" if step % 6 == 5 else "d"
        each[which].zero_grad()
        made = parts["d"](parts["g"](batch[:, :3]))
        loss = -made.mean() if which == "g" else made.mean() - parts["d"](batch).mean()
        loss.backward()
        recorder.capture(loss=loss)
        each[which].step()
        yield float(loss.detach())


def compiled(recorder_of: Callable[..., Any]) -> Iterator[float]:
    model: Any = torch.compile(mlp(), backend="eager")
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    recorder = recorder_of(model, optimizer)
    for step, batch in enumerate(batches()):
        optimizer.zero_grad()
        loss = F.mse_loss(model(batch), torch.ones(8, 3))
        loss.backward()
        recorder.capture(step, loss=loss)
        optimizer.step()
        yield float(loss.detach())


TRAININGS: dict[str, Training] = {
    "plain": simple(), "clipped": simple(clip=0.01), "replaced": simple(replaced),
    "tied": simple(tied), "resized": simple(resized), "cast": simple(cast), "grown": simple(grown),
    "shrunk": simple(shrunk), "frozen": simple(frozen), "spread": simple(spread),
    "half": simple(make=lambda: mlp().to(torch.bfloat16)), "closures": closures,
    "accumulated": accumulated, "scaled": scaled, "sparse": sparse(nn.Embedding),
    "bags": sparse(nn.EmbeddingBag), "adversaries": adversaries, "compiled": compiled,
    "scripted": simple(make=lambda: torch.jit.script(mlp())),
}  # fmt: skip


def losses(train: Training, recorder_of: Callable[..., Any]) -> list[float]:
    torch.manual_seed(0)
    return list(train(recorder_of))


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")  # torch's own, once a process
@pytest.mark.filterwarnings("ignore:grad and param do not obey")
@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")
@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("name", TRAININGS)
def test_losses_are_the_same_to_the_bit_and_everything_is_read(
    name: str, every: int, tmp_path: Path
) -> None:
    made: list[GradientRecorder] = []

    def recorded(model: Any, optimizer: Any) -> GradientRecorder:
        made.append(GradientRecorder(model, optimizer, tmp_path / "a", every=every))
        return made[-1]

    found = losses(TRAININGS[name], recorded)
    made[0].close()

    np.testing.assert_array_equal(found, losses(TRAININGS[name], lambda *_: Nobody()))
    history = open_history(str(tmp_path / "a"))
    assert history.failures == ()
    wanted = [s for s in range(STEPS) if s % every < 2]
    if name != "adversaries":
        assert history.steps.tolist() == wanted
        told = history.loss if history.loss is not None else history.optimizer_loss[:, 0]
        np.testing.assert_allclose(told, np.array(found)[wanted], rtol=1e-6)
    _consistent(history)


def _consistent(history: History) -> None:
    """A cell has a norm where a gradient was recorded, and none elsewhere."""
    recorded = history.status == Status.RECORDED
    assert recorded.any()
    assert np.isfinite(history.l2[recorded & ~_skipped(history)[:, None]]).all()
    assert np.isnan(history.l2[~recorded]).all()


def _skipped(history: History) -> Any:
    skipped = history.skipped
    return np.zeros(len(history.steps), bool) if skipped is None else skipped.astype(bool)
