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
from gradscope.recording import lots

from .training import cnn, mlp, run, transformer


@pytest.fixture(params=["flat", "torch"])
def _both_ways(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the compiled loops of the CPU measure, and what torch does on any other device."""
    if request.param == "torch":
        monkeypatch.setattr(lots, "fits", lambda _: False)


@pytest.mark.usefixtures("_both_ways")
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


@pytest.mark.usefixtures("_both_ways")
def test_sketches_are_those_of_numpy(tmp_path: Path) -> None:
    _, seen = run(mlp, tmp_path / "a", steps=3, every=1)

    history = open_history(str(tmp_path / "a"))

    assert history.sketches is not None
    for t, record in enumerate(seen):
        for row, layer in enumerate(history.layers):
            facts = record["rows"][layer.name]
            wanted = sketch(facts["grad"] / facts["l2"], seed=seed_of(layer.name))
            np.testing.assert_allclose(history.sketches.values[t, row], wanted, atol=1e-3)


@pytest.mark.usefixtures("_both_ways")
def test_a_half_precision_gradient_whose_norm_overflows_stays_finite(tmp_path: Path) -> None:
    model = nn.Linear(1000, 100, bias=False).half()
    model.weight.grad = torch.full_like(model.weight, 3000.0)
    with GradientRecorder(model, None, tmp_path / "a", every=1) as recorder:
        recorder.capture(0)

    history = open_history(str(tmp_path / "a"))

    assert history.l2[0, 0] == pytest.approx(3000 * np.sqrt(1e5), rel=1e-4)


@pytest.mark.parametrize("flat", [True, False])
def test_once_a_gradient_was_not_finite_its_elements_are_counted(
    flat: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not flat:
        monkeypatch.setattr(lots, "fits", lambda _: False)
    model = nn.Linear(3, 2, bias=False)
    with GradientRecorder(model, None, tmp_path / "a", every=1, capacity=2) as recorder:
        for step in range(4):
            model.weight.grad = torch.ones(2, 3)
            if step > 0:
                model.weight.grad[0] = torch.tensor([float("nan"), float("inf"), -float("inf")])
            recorder.capture(step)

    history = open_history(str(tmp_path / "a"))

    assert np.isnan(history.l2[1:, 0]).all()
    assert history.n_nan[:, 0].tolist() == ([0, 1, 1, 1] if flat else [-1, -1, 1, 1])
    assert history.n_inf[2:, 0].tolist() == [2, 2]


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


@pytest.mark.usefixtures("_both_ways")
def test_a_gradient_that_is_missing_on_the_way_has_no_numbers(tmp_path: Path) -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with GradientRecorder(model, optimizer, tmp_path / "a", every=2) as recorder:
        for step in range(4):
            optimizer.zero_grad()
            model(torch.ones(2, 6)).sum().backward()
            if step >= 2:
                model[0].weight.grad = None
            recorder.capture(step)
            optimizer.step()

    history = open_history(str(tmp_path / "a"))
    row = [layer.name for layer in history.layers].index("0.weight")

    assert history.status[:, row].tolist() == [1, 1, 2, 2]
    for values in (history.l2, history.max_abs, history.update_l2, history.update_cosine):
        assert np.isfinite(values[0]).all()
        assert np.isnan(values[2:, row]).all()
        assert np.isfinite(np.delete(values[2], row)).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_and_gradients_in_another_order_are_measured_row_by_row(
    dtype: Any, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = nn.Conv2d(3, 5, 3, bias=False, dtype=dtype)
    model.weight.data = model.weight.data.to(memory_format=torch.channels_last)
    images = torch.randn(2, 3, 6, 6).to(dtype=dtype, memory_format=torch.channels_last)
    assert not model.weight.is_contiguous()

    history, seen = trained(
        model, torch.optim.SGD(model.parameters(), 0.1), tmp_path / "a", lambda _: images, steps=1
    )

    gradient, change, _ = (t.double() for t in seen[0])
    unit = gradient.contiguous().numpy() / float(gradient.norm())
    wanted = sketch(unit, seed=seed_of("weight"))
    assert history.l2[0, 0] == pytest.approx(float(gradient.norm()), rel=1e-5)
    assert history.update_l2[0, 0] == pytest.approx(float(change.norm()), rel=1e-2)
    assert history.update_cosine[0, 0] == pytest.approx(1.0, abs=1e-2)
    np.testing.assert_allclose(history.sketches.values[0, 0], wanted, atol=2e-3)


def test_a_parameter_that_changes_its_size_is_measured_as_it_is_now(tmp_path: Path) -> None:
    """Nothing is read where the larger one was."""
    model = nn.Linear(4, 3, bias=False)
    with GradientRecorder(model, None, tmp_path / "a", every=1) as recorder:
        for size in (3, 3, 2, 2):
            model.weight.grad = None
            model.weight.data = torch.ones(size, 4)
            model.weight.grad = torch.full((size, 4), 2.0)
            recorder.capture()

    history = open_history(str(tmp_path / "a"))

    np.testing.assert_allclose(history.l2[:, 0], 2 * np.sqrt([12, 12, 8, 8]), rtol=1e-6)


def test_tied_weights_are_one_row(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 5, bias=False))
    model[1].weight = model[0].weight
    with GradientRecorder(model, None, tmp_path / "a", every=1) as recorder:
        model(torch.tensor([1, 2])).sum().backward()
        recorder.capture(0)

    assert [layer.name for layer in open_history(str(tmp_path / "a")).layers] == ["0.weight"]


def trained(model: nn.Module, optimizer: Any, folder: Path, inputs: Any, steps: int = 4) -> Any:
    """Train and record, with the dense gradients and changes that plain torch saw of row 0."""
    seen = []
    with GradientRecorder(model, optimizer, folder, every=1) as recorder:
        for step in range(steps):
            optimizer.zero_grad()
            (model(inputs(step)).abs() ** 2).sum().backward()
            recorder.capture(step)
            weight = next(model.parameters())
            gradient, before = weight.grad.to_dense().clone(), weight.detach().clone()
            optimizer.step()
            change = weight.detach() - before
            inner = -torch.vdot(change.reshape(-1), gradient.reshape(-1)).real
            seen.append((gradient, change, inner / (change.norm() * gradient.norm())))
    return open_history(str(folder)), seen


def agrees(history: Any, seen: Any) -> None:
    """Every statistic of row 0 is that of the dense gradient."""
    for t, (gradient, change, cosine) in enumerate(seen):
        flat = gradient.abs().double()
        assert history.l2[t, 0] == pytest.approx(float(flat.norm()), rel=1e-5)
        assert history.max_abs[t, 0] == pytest.approx(float(flat.max()), rel=1e-6)
        assert history.zero_fraction[t, 0] == pytest.approx(float((flat == 0).float().mean()))
        assert history.update_l2[t, 0] == pytest.approx(float(change.norm()), rel=1e-4)
        assert history.update_cosine[t, 0] == pytest.approx(float(cosine), abs=1e-4)
        real = torch.view_as_real(gradient) if gradient.is_complex() else gradient
        unit = real.double().numpy() / float(flat.norm())
        wanted = sketch(unit, seed=seed_of(history.layers[0].name))
        np.testing.assert_allclose(history.sketches.values[t, 0], wanted, atol=2e-3)


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")  # torch's own, once a process
@pytest.mark.parametrize(
    "optimizer",
    [
        lambda p: torch.optim.SGD(p, 0.1),
        lambda p: torch.optim.SGD(p, 0.1, momentum=0.9),
        lambda p: torch.optim.SparseAdam(p, 0.1),
        lambda p: torch.optim.Adagrad(p, 0.1),
    ],
)
@pytest.mark.parametrize("make", [nn.Embedding, nn.EmbeddingBag])
def test_a_sparse_gradient_is_measured_as_its_dense_one(
    make: Any, optimizer: Any, tmp_path: Path
) -> None:
    """Duplicates are summed, also where autograd left them apart."""
    torch.manual_seed(0)
    model = make(100, 8, sparse=True)
    batches = torch.tensor([[1, 2, 2, 7], [7, 7, 7, 99], [0, 1, 2, 3], [5, 5, 6, 6]])

    history, seen = trained(
        model, optimizer(list(model.parameters())), tmp_path / "a", lambda t: batches[t][None]
    )

    agrees(history, seen)


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")  # torch's own, once a process
def test_an_uncoalesced_gradient_is_summed_first(tmp_path: Path) -> None:
    model = nn.Embedding(10, 2, sparse=True)
    index, values = torch.tensor([[3, 3, 4]]), torch.tensor([[1.0, 0], [2.0, 0], [0, 4.0]])
    model.weight.grad = torch.sparse_coo_tensor(index, values, (10, 2))
    with GradientRecorder(model, None, tmp_path / "a", every=1) as recorder:
        recorder.capture(0)

    history = open_history(str(tmp_path / "a"))

    assert history.l2[0, 0] == pytest.approx(5.0)
    assert history.max_abs[0, 0] == 4.0
    assert history.zero_fraction[0, 0] == pytest.approx(0.9)
    assert model.weight.grad.is_coalesced() is False


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")  # torch's own, once a process
def test_a_gradient_that_turns_sparse_or_dense_on_the_way_stays_right(tmp_path: Path) -> None:
    model = nn.Embedding(20, 3)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with GradientRecorder(model, optimizer, tmp_path / "a", every=1) as recorder:
        for step, sparse in enumerate([False, True, False, True]):
            optimizer.zero_grad()
            model.sparse = sparse
            (model(torch.tensor([1, 1, 5])) * 2).sum().backward()
            recorder.capture(step)
            optimizer.step()

    history = open_history(str(tmp_path / "a"))

    np.testing.assert_allclose(history.l2[:, 0], np.sqrt(3 * (16 + 4)), rtol=1e-6)
    np.testing.assert_allclose(history.update_l2[:, 0], 0.1 * np.sqrt(60), rtol=1e-5)


def test_a_complex_parameter_is_measured_by_its_magnitudes(tmp_path: Path) -> None:
    class Spectral(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(5, 4, dtype=torch.complex64))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.weight[:3] @ x

    torch.manual_seed(0)
    model = Spectral()
    inputs = torch.randn(4, 2, dtype=torch.complex64)

    history, seen = trained(
        model, torch.optim.SGD(model.parameters(), 0.1), tmp_path / "a", lambda _: inputs
    )

    agrees(history, seen)


@pytest.mark.usefixtures("_both_ways")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_network_of_another_type_is_measured_in_wide_numbers(dtype: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Linear(40, 30, bias=False).to(dtype)
    inputs = torch.randn(8, 40).to(dtype)

    history, seen = trained(
        model, torch.optim.SGD(model.parameters(), 0.5), tmp_path / "a", lambda _: inputs, steps=1
    )

    gradient, change, _ = (t.double() for t in seen[0])
    assert history.l2[0, 0] == pytest.approx(float(gradient.norm()), rel=1e-5)
    assert history.update_l2[0, 0] == pytest.approx(float(change.norm()), rel=1e-2)


@pytest.mark.usefixtures("_both_ways")
def test_parameters_of_no_elements_and_on_no_device_do_no_harm(tmp_path: Path) -> None:
    model = nn.ParameterDict(
        {
            "empty": nn.Parameter(torch.ones(0, 3)),
            "scalar": nn.Parameter(torch.tensor(2.0)),
            "nowhere": nn.Parameter(torch.empty(3, device="meta")),
        }
    )
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with GradientRecorder(model, optimizer, tmp_path / "a", every=1) as recorder:
        (model["empty"].sum() + 3 * model["scalar"]).backward()
        model["nowhere"].grad = torch.empty(3, device="meta")
        recorder.capture(0)
        optimizer.step()

    history = open_history(str(tmp_path / "a"))
    rows = {layer.name: i for i, layer in enumerate(history.layers)}

    assert history.l2[0, rows["empty"]] == 0
    assert history.l2[0, rows["scalar"]] == 3
    assert history.status[0, rows["nowhere"]] == Status.NOT_RECORDED


@pytest.mark.usefixtures("_both_ways")
def test_clipping_after_the_capture_leaves_the_updates_cosine_alone(tmp_path: Path) -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with GradientRecorder(model, optimizer, tmp_path / "a", every=1) as recorder:
        for step in range(3):
            optimizer.zero_grad()
            (model(torch.randn(4, 6)) * 100).sum().backward()
            recorder.capture(step, max_norm=1.0)
            total = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()

    history = open_history(str(tmp_path / "a"))

    np.testing.assert_allclose(history.update_cosine, 1.0, atol=1e-3)
    assert history.total_l2[-1] == pytest.approx(float(total), rel=1e-5)
    assert history.clip_coefficient[-1] == pytest.approx(1 / float(total), rel=1e-4)
