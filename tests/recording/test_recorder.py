"""The recorder against plain autograd, in float64 or by hand."""

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
from torch.nn import functional as F  # noqa: N812

from gradscope import GradientRecorder
from gradscope.errors import UsageError
from gradscope.histories.history import Status
from gradscope.histories.open import open_history
from gradscope.histories.sketching import seed_of, sketch


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4), nn.Tanh(), nn.Linear(4, 3))


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(64, 3)
    )


def transformer() -> nn.Module:
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    return nn.Sequential(
        nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(8, 3)
    )


INPUTS = {mlp: (16, 6), cnn: (16, 1, 6, 6), transformer: (4, 5, 8)}


def norm(tensor: torch.Tensor) -> float:
    return float(tensor.detach().double().norm())


def run(
    make: Any, folder: Path, steps: int = 12, record: bool = True, **options: Any
) -> tuple[nn.Module, list[dict[str, Any]]]:
    """Train, and keep what plain autograd says of every step."""
    torch.manual_seed(0)
    model = make()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    recorder = GradientRecorder(model, optimizer, folder, **options) if record else None
    seen = []
    for step in range(steps):
        inputs = torch.randn(INPUTS[make])
        loss = (model(inputs) ** 2).mean()
        loss.backward()
        if recorder is not None:
            recorder.capture(step, loss=loss)
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        facts = {
            n: {
                "l2": norm(p.grad),
                "max_abs": float(p.grad.abs().max()),
                "zero": float((p.grad == 0).double().mean()),
                "param": norm(p),
                "grad": p.grad.double().numpy().copy(),
            }
            for n, p in model.named_parameters()
        }
        optimizer.step()
        for n, p in model.named_parameters():
            change = p.detach() - before[n]
            facts[n]["update"] = norm(change)
            facts[n]["grad_cos"] = float(
                -(change.double().flatten() @ torch.tensor(facts[n]["grad"]).flatten())
            ) / max(1e-300, facts[n]["update"] * facts[n]["l2"])
        optimizer.zero_grad()
        seen.append({"loss": float(loss.detach()), "rows": facts})
    if recorder is not None:
        recorder.close()
    return model, seen


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


def test_every_tenth_step_and_the_one_after_it_are_recorded(tmp_path: Path) -> None:
    run(mlp, tmp_path / "a", steps=25, every=10)

    assert open_history(str(tmp_path / "a")).steps.tolist() == [0, 1, 10, 11, 20, 21]


def test_training_is_the_same_to_the_bit_with_and_without(tmp_path: Path) -> None:
    with_, _ = run(transformer, tmp_path / "a", every=1)
    without, _ = run(transformer, tmp_path / "b", record=False)

    assert all(
        torch.equal(a, b) for a, b in zip(with_.parameters(), without.parameters(), strict=True)
    )


def test_a_half_precision_gradient_whose_norm_overflows_stays_finite(tmp_path: Path) -> None:
    model = nn.Linear(1000, 100, bias=False).half()
    model.weight.grad = torch.full_like(model.weight, 3000.0)
    with GradientRecorder(model, None, tmp_path / "a", every=1) as recorder:
        recorder.capture(0)

    history = open_history(str(tmp_path / "a"))

    assert history.l2[0, 0] == pytest.approx(3000 * np.sqrt(1e5), rel=1e-4)


def test_nothing_waits_for_the_device_before_a_shard_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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
        recorder._after_step()
        optimizer.zero_grad()
    monkeypatch.undo()
    recorder.close()


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
    [("os.kill(os.getpid(), signal.SIGKILL)", 16), ("raise SystemError", 20), ("sys.exit(3)", 20)],
)
def test_a_run_that_dies_leaves_what_was_recorded(end: str, records: int, tmp_path: Path) -> None:
    code = textwrap.dedent(CRASH).format(end=end)
    subprocess.run([sys.executable, "-c", code, tmp_path / "a"], check=False, capture_output=True)

    history = open_history(str(tmp_path / "a"))

    assert len(history.steps) == records
    assert history.failures == ()


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Linear(4, 4), nn.LayerNorm(4)
        self.inner, self.head = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu_(self.embed(x))
        return self.head(x + self.inner(self.norm(x)))


def edges_of(model: nn.Module, inputs: torch.Tensor, folder: Path) -> set[tuple[str, str]]:
    with GradientRecorder(model, None, folder, every=1) as recorder:
        out = model(inputs)
        (out[0] if isinstance(out, tuple) else out).sum().backward()
        recorder.capture(0)
    history = open_history(str(folder))
    assert history.topology == "recorded"
    assert history.edges is not None
    names = [*(layer.module for layer in history.layers), "loss", "input"]
    return {(names[u], names[v]) for u, v in history.edges.tolist()}


def test_the_edges_of_a_residual_net_are_those_of_its_code(tmp_path: Path) -> None:
    assert edges_of(Residual(), torch.randn(3, 4), tmp_path / "a") == {
        ("input", "embed"), ("embed", "norm"), ("norm", "inner"), ("inner", "head"),
        ("embed", "head"), ("head", "loss"),
    }  # fmt: skip


def test_the_edges_of_a_transformer_pass_attention_and_its_skips(tmp_path: Path) -> None:
    model = transformer()
    model.train()

    edges = edges_of(model, torch.randn(2, 5, 8), tmp_path / "a")

    first = "0.layers.0"
    assert (f"{first}.self_attn", f"{first}.self_attn.out_proj") in edges
    assert (f"{first}.self_attn.out_proj", f"{first}.norm1") in edges
    assert (f"{first}.norm1", f"{first}.norm2") in edges
    assert (f"{first}.norm2", "0.layers.1.self_attn") in edges
    assert ("1", "loss") in edges


def test_a_recurrent_and_a_shared_module_are_one_node(tmp_path: Path) -> None:
    lstm = nn.LSTM(4, 3, batch_first=True)
    shared = nn.Linear(4, 4)

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shared, self.head = shared, nn.Linear(4, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(torch.tanh(self.shared(torch.tanh(self.shared(x)))))

    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm, self.head = lstm, nn.Linear(3, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.lstm(x)[0])

    assert edges_of(Twice(), torch.randn(2, 4), tmp_path / "a") == {
        ("input", "shared"), ("shared", "head"), ("head", "loss"),
    }  # fmt: skip
    assert edges_of(Recurrent(), torch.randn(2, 5, 4), tmp_path / "b") == {
        ("input", "lstm"), ("lstm", "head"), ("head", "loss"),
    }  # fmt: skip


def test_layers_are_in_the_order_they_are_used_not_the_order_they_are_defined(
    tmp_path: Path,
) -> None:
    class Backwards(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last, self.first = nn.Linear(4, 2), nn.Linear(3, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.last(torch.tanh(self.first(x)))

    edges_of(Backwards(), torch.randn(2, 3), tmp_path / "a")

    modules = [layer.module for layer in open_history(str(tmp_path / "a")).layers]
    assert list(dict.fromkeys(modules)) == ["first", "last"]


def test_a_reentrant_checkpoint_hides_its_inside_so_no_edges_are_claimed(tmp_path: Path) -> None:
    from torch.utils.checkpoint import checkpoint

    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return checkpoint(self.b, self.a(x), use_reentrant=True)

    model = Checkpointed()
    with GradientRecorder(model, None, tmp_path / "a", every=1) as recorder:
        model(torch.randn(2, 3)).sum().backward()
        recorder.capture(0)

    assert open_history(str(tmp_path / "a")).topology == "assumed-chain"
