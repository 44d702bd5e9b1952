"""Dependence on parameters and pictures: what the cascade does, and oracles of what it compares."""

from __future__ import annotations

import importlib.util
import warnings

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from gradscope.attribution.diagnostics import Randomised
from gradscope.attribution.evaluation.sanity import (
    Others,
    cascade,
    compared,
    complexity_rise,
    other_pictures,
    similarity,
)
from gradscope.attribution.evaluation.similarity import Ranked


def trained() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 2)
    ).eval()


def states(net: nn.Module) -> tuple[list[str], list[dict[str, Tensor]]]:
    """The layers of the cascade, and what the parameters were at each."""
    with cascade(net, 0) as layers:
        pairs = [(name, {k: v.clone() for k, v in net.state_dict().items()}) for name in layers]
    return [name for name, _ in pairs], [state for _, state in pairs]


def test_the_cascade_goes_from_the_output_to_the_input_and_puts_all_back() -> None:
    net = trained()
    with torch.no_grad():
        net[1].running_mean.fill_(3)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}

    names, seen = states(net)

    assert names == ["4", "1", "0"]
    assert not torch.equal(seen[0]["4.weight"], before["4.weight"])
    assert torch.equal(seen[0]["0.weight"], before["0.weight"])
    assert not torch.equal(seen[2]["0.weight"], before["0.weight"])
    assert seen[1]["1.running_mean"].eq(0).all()
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())


def test_a_deep_cascade_has_five_points_and_ends_with_all() -> None:
    net = nn.Sequential(*(nn.Linear(2, 2) for _ in range(20)))

    names, seen = states(net)

    assert names == ["19", "14", "9", "5", "0"] or (len(names) == 5 and names[-1] == "0")
    assert not any(torch.equal(seen[-1][name], tensor) for name, tensor in net.state_dict().items())


def test_layers_become_what_they_were_before_training() -> None:
    net = nn.Sequential(
        nn.Conv2d(8, 64, 3), nn.BatchNorm2d(64), nn.PReLU(64), nn.LayerNorm(6), nn.Linear(100, 200)
    )
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(2)
        net[1].running_var.fill_(7)
        net[2].weight.normal_(0.25, 0.1)

    last = states(net)[1][-1]

    assert float(last["0.weight"].std()) == pytest.approx((2 / 72) ** 0.5, rel=0.05)
    assert float(last["4.weight"].std()) == pytest.approx((2 / 100) ** 0.5, rel=0.05)
    assert float(last["4.weight"].mean()) == pytest.approx(0, abs=0.01)
    assert all(last[f"{i}.bias"].eq(0).all() for i in (0, 1, 3, 4))
    assert all(last[name].eq(1).all() for name in ("1.weight", "3.weight", "1.running_var"))
    # A slope of one would make the network linear.
    assert float(last["2.weight"].mean()) == pytest.approx(0.25, abs=0.05)
    assert float(last["2.weight"].std()) == pytest.approx(0.1, rel=0.4)


def test_a_deep_network_still_sees_its_picture_with_random_parameters() -> None:
    """With the spreads of trained parameters, whose norms undo them, activations die out."""
    torch.manual_seed(0)
    blocks = [
        part
        for _ in range(15)
        for part in (nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
    ]
    net = nn.Sequential(nn.Conv2d(3, 8, 3), *blocks).eval()
    with torch.no_grad():
        for module in net:
            if isinstance(module, nn.Conv2d):
                module.weight.mul_(0.1)
                module.bias.fill_(1)

    with cascade(net, 0) as layers, torch.no_grad():
        for _ in layers:
            found = net(torch.randn(2, 3, 16, 16))

    assert float((found[0] - found[1]).std() / found.std()) > 0.1


def test_buffers_that_are_no_weights_are_not_drawn_anew() -> None:
    net = nn.Linear(4, 4)
    mask = torch.zeros(4, 4).masked_fill(torch.ones(4, 4).triu(1) > 0, -torch.inf)
    net.register_buffer("mask", mask.clone())

    assert all(torch.equal(state["mask"], mask) for state in states(net)[1])


def test_the_cascade_puts_all_back_after_an_error_too() -> None:
    net = trained()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}

    with pytest.raises(RuntimeError, match="no"), cascade(net, 0) as layers:  # noqa: PT012
        next(layers)
        raise RuntimeError("no")
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())


def test_a_module_without_parameters_has_no_cascade() -> None:
    assert states(nn.ReLU()) == ([], [])


def test_values_and_magnitudes_are_compared_apart() -> None:
    original = torch.tensor([[-4.0, -1.0], [2.0, 3.0]])

    found = compared("a", -original, Ranked(original))

    assert (found.correlation, found.magnitude_correlation, found.constant) == (-1, 1, False)


def at(correlation: float, constant: bool = False) -> Randomised:
    return Randomised(
        layer="a", correlation=correlation, magnitude_correlation=0, constant=constant
    )


def test_the_whole_curve_counts_and_one_constant_map_excuses_none() -> None:
    original = torch.arange(4.0)

    assert similarity([at(0.9), at(0.8), at(0.1)], original) == pytest.approx(0.6)
    assert similarity([at(0.9), at(0.8), at(0, True)], original) == pytest.approx(0.85)
    assert similarity([at(0, True), at(0, True)], original) == 0
    assert similarity([], original) is None
    assert similarity([at(0)], torch.ones(4)) is None


@pytest.mark.parametrize("value", [0.0, 1.7, -3.0])
def test_a_map_that_is_constant_up_to_rounding_is_constant(value: float) -> None:
    noisy = torch.full((4, 4), value)
    noisy[1, 1] *= 1 + 3e-7

    assert compared("a", noisy, Ranked(torch.arange(16.0).view(4, 4))).constant
    noisy[1, 1] += 1e-3
    assert not compared("a", noisy, Ranked(torch.arange(16.0).view(4, 4))).constant


def quadratic(net: nn.Module, inputs: Tensor) -> Tensor:
    """A gradient that depends on the input."""
    leaf = inputs.detach().clone().requires_grad_()
    with torch.enable_grad():
        return torch.autograd.grad((net(leaf)[:, 1] ** 2).sum(), leaf)[0]


def test_sensitivity_is_captums() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from captum import metrics
    net, x = trained(), torch.randn((1, 1, 8, 8), generator=torch.Generator().manual_seed(1))
    pictures = other_pictures(x, torch.tensor(0.05).view(1, 1, 1), seed=0)

    theirs = metrics.sensitivity_max(
        lambda inputs: (quadratic(net, inputs[0]),),
        x,
        perturb_func=lambda _inputs: (pictures[:-1],),
        n_perturb_samples=len(pictures) - 1,
    )
    found = Others(quadratic(net, pictures)[:-1], quadratic(net, pictures)[-1])

    assert found.sensitivity(quadratic(net, x)[0]) == pytest.approx(float(theirs[0]), rel=1e-5)
    assert found.sensitivity(torch.zeros(1, 8, 8)) is None
    assert 0.5 < found.repeatability(Ranked(quadratic(net, x)[0])) < 1


def test_copies_stay_within_the_radius_and_noise_is_no_copy() -> None:
    x = torch.rand((1, 3, 9, 9), generator=torch.Generator().manual_seed(0))

    *copies, noise = other_pictures(x, torch.tensor([0.1, 0.2, 0.3]).view(-1, 1, 1), seed=0)

    change = torch.stack(copies) - x
    for channel, radius in enumerate((0.1, 0.2, 0.3)):
        assert 0.9 * radius < float(change[:, channel].abs().max()) <= radius
    assert float((noise - x[0]).abs().mean()) > 0.2
    assert torch.equal(noise, other_pictures(x, torch.tensor(0.0), seed=0)[-1])


def test_a_map_that_becomes_nan_is_not_called_still() -> None:
    one = torch.ones(2, 1, 2, 2)

    assert Others(one * torch.nan, one[0]).sensitivity(one[0]) is None


def test_a_map_of_the_model_alone_is_unmoved_by_noise() -> None:
    values = torch.arange(8.0).view(1, 8)

    assert Others(values[None], values).unmoved(Ranked(values)) == 1
    assert Others(values[None], -values).unmoved(Ranked(values)) == -1


def test_the_rise_of_complexity_is_that_of_entropies() -> None:
    from scipy import stats

    a, b = (torch.randn((30, 30), generator=torch.Generator().manual_seed(s)) for s in (0, 1))
    b = b**3
    before, after = (stats.entropy(np.histogram(v.numpy(), 100)[0]) for v in (a, b))

    assert complexity_rise(a, b) == pytest.approx((after - before) / before, rel=1e-12)
    assert complexity_rise(torch.ones(3), a) is None


@pytest.mark.skipif(
    importlib.util.find_spec("quantus") is None, reason="quantus is not installed (extra: quantus)"
)
def test_the_rise_of_complexity_is_quantus_efficient_mprt() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import quantus

        net = trained()
        x = torch.randn((1, 1, 8, 8), generator=torch.Generator().manual_seed(1))
        maps: list[np.ndarray] = []

        def explain(model: nn.Module, inputs: np.ndarray, **_more: object) -> np.ndarray:
            maps.append(quadratic(model, torch.as_tensor(inputs)).numpy())
            return maps[-1]

        metric = quantus.EfficientMPRT(disable_warnings=True, normalise=False, abs=False)
        metric(model=net, x_batch=x.numpy(), y_batch=np.array([1]), explain_func=explain,
               a_batch=explain(net, x.numpy()), device="cpu")  # fmt: skip
    theirs = metric.evaluation_scores[0]

    assert complexity_rise(torch.tensor(maps[0]), torch.tensor(maps[-1])) == pytest.approx(theirs)
