"""What is measured of gradients, where the recorder's small networks do not reach."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from gradscope.recording import measure
from gradscope.recording.flat import CELLS, FlatLot
from gradscope.recording.measure import Sketcher, dots, norms, subset


def test_sketches_of_a_subset_estimate_the_cosine_of_all_elements(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(measure, "MOST_SKETCHED", 1000)
    rows, size = 60, 50_000
    rng = np.random.default_rng(0)
    first = rng.normal(size=(rows, size))
    second = 0.6 * first + 0.8 * rng.normal(size=(rows, size))
    sketcher = Sketcher([f"layers.{i}.weight" for i in range(rows)], [size] * rows, "cpu")

    one, other = (
        sketcher(list(torch.tensor(x)), torch.tensor(x).norm(dim=1), range(rows)).numpy()
        for x in (first, second)
    )

    # Each estimate is within a tenth; the mean of sixty within a seventieth, or 0.05 at four.
    assert (one * one).sum(axis=1).mean() == pytest.approx(1.0, abs=0.07)
    assert (one * other).sum(axis=1).mean() == pytest.approx(0.6, abs=0.05)


@pytest.mark.parametrize("share", [1.001, 1.3, 2.5])
def test_the_cosine_of_a_parameter_little_larger_than_the_subset_is_not_underestimated(
    share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Drawn with replacement, a subset's squares add up to more than the whole's."""
    monkeypatch.setattr(measure, "MOST_SKETCHED", 2000)
    size, rows = int(2000 * share), 80
    rng = np.random.default_rng(0)
    first = rng.normal(size=(rows, size))
    second = 0.6 * first + 0.8 * rng.normal(size=(rows, size))
    sketcher = Sketcher([f"layers.{i}.weight" for i in range(rows)], [size] * rows, "cpu")

    one, other = (
        sketcher(list(torch.tensor(x)), torch.tensor(x).norm(dim=1), range(rows)).numpy()
        for x in (first, second)
    )

    assert (one * one).sum(axis=1).mean() == pytest.approx(1.0, abs=0.05)
    assert (one * other).sum(axis=1).mean() == pytest.approx(0.6, abs=0.05)


@pytest.mark.parametrize("size", [1001, 1500, 2000, 100_000])
def test_a_subset_holds_different_elements_that_the_name_alone_decides(
    size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "MOST_SKETCHED", 1000)

    chosen = subset("weight", size)

    assert subset("weight", 1000) is None
    assert chosen is not None
    assert len(chosen.unique()) == len(chosen) == 1000
    assert 0 <= int(chosen.min()) <= int(chosen.max()) < size
    assert torch.equal(chosen, subset("weight", size))
    assert not torch.equal(chosen, subset("bias", size))


@pytest.mark.parametrize("order", [2, math.inf, 0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_norms_are_those_of_numpy_in_every_type(order: float, dtype: torch.dtype) -> None:
    rng = np.random.default_rng(1)
    tensors = [torch.tensor(rng.normal(size=shape)).to(dtype) for shape in ((3, 4), (1,), (50,))]
    tensors[0][1] = 0

    found = norms(tensors, order)

    want = [np.linalg.norm(t.double().numpy().ravel(), order) for t in tensors]
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found.numpy(), want, rtol=1e-6)


@pytest.mark.parametrize("order", [2, math.inf, 0])
def test_a_gradient_of_no_elements_has_a_norm_of_zero(order: float) -> None:
    found = norms([torch.ones(4), torch.ones(0)], order)

    assert found.tolist() == [{2: 2.0, math.inf: 1.0, 0: 4.0}[order], 0.0]
    assert norms([], order).tolist() == []


def test_norms_of_float64_beyond_the_range_of_float32_do_not_wrap() -> None:
    tensors = [torch.full((4,), 1e-30, dtype=torch.float64), torch.ones(4)]

    assert norms(tensors, 2).tolist() == pytest.approx([2e-30, 2.0])


def test_inner_products_are_pair_by_pair() -> None:
    first = [torch.arange(6.0).view(2, 3), torch.tensor([2.0])]
    second = [torch.ones(2, 3), torch.tensor([-4.0])]

    assert dots(first, second).tolist() == [15.0, -8.0]


@pytest.mark.parametrize("sizes", [(3001, 7, 1000), (64,), (1, 9, 1001)])
def test_compiled_loops_sketch_what_torch_sketches(
    sizes: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All elements of small rows and a subset of large ones, whatever their number is."""
    monkeypatch.setattr(measure, "MOST_SKETCHED", 1000)
    names = [f"layers.{i}.weight" for i in range(len(sizes))]
    parameters = [torch.nn.Parameter(torch.zeros(size)) for size in sizes]
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape)
    gradients = [parameter.grad for parameter in parameters]
    lot = FlatLot(0, range(len(sizes)), names, parameters, True, False)

    part = lot.take(whole=False, counted=False)

    assert part is not None
    assert part.block is not None
    wanted = Sketcher(names, sizes, "cpu")(gradients, norms(gradients, 2), range(len(sizes)))
    np.testing.assert_allclose(part.block[part.slot, :, len(CELLS) :], wanted, atol=1e-6)
