"""What a map is worth: curves by hand, ranks by SciPy, sensitivity by captum."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import stats
from torch import Tensor, nn

from gradscope.attribution import evaluation
from gradscope.attribution.blur import gaussian_blur
from gradscope.attribution.subject import Subject
from gradscope.models.forms import as_model


class Additive(nn.Module):
    """The "yes" logit of a picture is made so that its probability is a sum over pixels."""

    def __init__(self, weights: Tensor) -> None:
        super().__init__()
        self.weights = nn.Parameter(weights)

    def forward(self, x: Tensor) -> Tensor:
        share = (x[:, 0] * self.weights).sum((1, 2)).clamp(0, 1)
        return torch.stack([1 - share, share], 1)


def subject(weights: Tensor, image: Tensor) -> Subject:
    made = as_model(Additive(weights).requires_grad_(False))
    return Subject(made, image[None, None], torch.tensor([1]))


def test_four_pixels_give_the_curves_that_can_be_written_down() -> None:
    weights = torch.tensor([[0.1, 0.2], [0.3, 0.4]])
    image = torch.ones(2, 2)

    insertion, deletion = evaluation.insertion_deletion(
        subject(weights, image), torch.tensor([3, 2, 1, 0]), steps=4
    )

    # A constant picture is its own blur, so insertion changes nothing.
    assert insertion == pytest.approx([1, 1, 1, 1, 1])
    assert deletion == pytest.approx([1, 0.6, 0.3, 0.1, 0])
    assert evaluation.area(deletion) == pytest.approx((0.5 + 0.6 + 0.3 + 0.1) / 4)
    assert evaluation.area(deletion) == pytest.approx(np.trapezoid(deletion, np.linspace(0, 1, 5)))


def test_the_best_order_beats_its_reverse_on_both_curves() -> None:
    generator = torch.Generator().manual_seed(0)
    image = (torch.rand((16, 16), generator=generator) > 0.9).float()
    weights = torch.rand((16, 16), generator=generator) * image
    weights = weights / (weights * image).sum()
    seen = subject(weights, image)

    best, worst = (evaluation.areas(seen, values, 0) for values in (weights, -weights))

    assert best[0] > worst[0] + 0.05
    assert best[1] < worst[1] - 0.05
    control = evaluation.random_control(seen, weights, 0)
    assert best[0] > control.insertion_auc + 2 * control.insertion_spread
    assert best[1] < control.deletion_auc - 2 * control.deletion_spread


def test_a_constant_map_is_as_good_as_its_control() -> None:
    """Ties in raster order would give the upper left corner a meaning."""
    image = torch.ones(16, 16)
    weights = torch.zeros(16, 16)
    weights[:8] = 1 / 128
    seen = subject(weights, image)

    _, deletion, _, spread = evaluation.areas(seen, torch.zeros(16, 16), 0)
    control = evaluation.random_control(seen, torch.zeros(16, 16), 0)

    assert spread > 0
    assert deletion == pytest.approx(0.5, abs=0.05)
    assert abs(deletion - control.deletion_auc) < 3 * control.deletion_spread + 0.02


def test_equal_pixels_come_in_random_and_others_in_descending_order() -> None:
    values = torch.tensor([[1.0, 3.0, 1.0, 1.0], [1.0, 2.0, 1.0, 1.0]])

    orders = [
        evaluation.ordered(values, torch.Generator().manual_seed(seed)).tolist() for seed in (1, 2)
    ]

    assert [order[:2] for order in orders] == [[1, 5], [1, 5]]
    assert orders[0] != orders[1]
    assert sorted(orders[0]) == list(range(8))


maps = hnp.arrays(np.float64, (4, 5), elements=st.integers(-3, 3).map(float))


@given(maps, maps)
def test_rank_correlation_is_scipys_and_zero_for_constant_maps(a: Any, b: Any) -> None:
    found = evaluation.spearman(torch.from_numpy(a), torch.from_numpy(b))

    if np.ptp(a) == 0 or np.ptp(b) == 0:
        assert found == 0
    else:
        assert found == pytest.approx(stats.spearmanr(a.ravel(), b.ravel()).statistic, abs=1e-12)


def trained() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 2)
    ).eval()


def test_the_cascade_goes_from_the_output_to_the_input_and_puts_all_back() -> None:
    net = trained()
    with torch.no_grad():
        net[1].running_mean.fill_(3)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    seen: list[dict[str, Tensor]] = []

    def attribute() -> Tensor:
        seen.append({name: tensor.clone() for name, tensor in net.state_dict().items()})
        return torch.arange(16.0).view(4, 4)

    found = evaluation.randomisation(net, attribute, torch.arange(16.0).view(4, 4), seed=0)

    assert [point.layer for point in found] == ["4", "1", "0"]
    assert [point.correlation for point in found] == [1, 1, 1]
    assert not torch.equal(seen[0]["4.weight"], before["4.weight"])
    assert torch.equal(seen[0]["0.weight"], before["0.weight"])
    assert not torch.equal(seen[2]["0.weight"], before["0.weight"])
    assert seen[1]["1.running_mean"].eq(0).all()
    drawn = seen[2]["4.weight"]
    assert float(drawn.std()) == pytest.approx(float(before["4.weight"].std()), rel=0.15)
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())


def test_drawn_parameters_keep_their_mean_and_running_variances_become_one() -> None:
    net = nn.Sequential(nn.BatchNorm2d(2), nn.Linear(100, 100), nn.Linear(100, 100)).eval()
    with torch.no_grad():
        net[0].running_var.fill_(7)
        for layer in (net[1], net[2]):
            layer.weight.copy_(5 + torch.arange(10_000.0).view(100, 100) / 10_000)
    seen: list[dict[str, Tensor]] = []

    def attribute() -> Tensor:
        seen.append({name: tensor.clone() for name, tensor in net.state_dict().items()})
        return torch.zeros(2, 2)

    evaluation.randomisation(net, attribute, torch.zeros(2, 2), seed=0)

    last = seen[-1]
    # A mean of 10,000 draws with a spread of 0.29 strays by 0.003.
    assert float(last["1.weight"].mean()) == pytest.approx(5.5, abs=0.02)
    assert last["0.running_var"].eq(1).all()
    assert not torch.equal(last["1.weight"], last["2.weight"])


def test_buffers_that_are_no_weights_are_not_drawn_anew() -> None:
    net = nn.Linear(4, 4)
    mask = torch.zeros(4, 4).masked_fill(torch.ones(4, 4).triu(1) > 0, -torch.inf)
    net.register_buffer("mask", mask.clone())
    seen: list[Tensor] = []

    def attribute() -> Tensor:
        seen.append(net.mask.clone())
        return (net(torch.eye(4)) + net.mask).softmax(-1).detach()

    found = evaluation.randomisation(net, attribute, attribute(), seed=0)

    assert all(torch.equal(one, mask) for one in seen)
    assert found[0].magnitude_correlation > 0.5  # what the mask hides stays hidden


def test_values_and_magnitudes_are_compared_apart() -> None:
    original = torch.tensor([[-4.0, -1.0], [2.0, 3.0]])

    (found,) = evaluation.randomisation(nn.Linear(2, 2), lambda: -original, original, seed=0)

    assert (found.correlation, found.magnitude_correlation) == (-1, 1)


def test_insertion_starts_from_the_blurred_picture() -> None:
    from scipy.ndimage import gaussian_filter

    image, weights = torch.zeros(16, 16), torch.zeros(16, 16)
    image[8, 8], weights[8, 9] = 1, 1

    insertion, _ = evaluation.insertion_deletion(subject(weights, image), torch.arange(256))

    blurred = gaussian_filter(image.double().numpy(), 1.0, mode="mirror", radius=3)
    assert insertion[0] == pytest.approx(blurred[8, 9], rel=1e-5)


def test_a_controls_spread_is_that_of_its_places() -> None:
    weights = torch.zeros(16, 16)
    weights[:4, :4] = 1 / 16
    values = torch.arange(256.0).view(16, 16)

    control = evaluation.random_control(subject(weights, torch.ones(16, 16)), values, 0)

    assert control.deletion_spread > 0.01
    assert control.insertion_spread == pytest.approx(0, abs=1e-6)  # a constant picture


def test_the_cascade_puts_all_back_after_an_error_too() -> None:
    net = trained()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}

    def failing() -> Tensor:
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        evaluation.randomisation(net, failing, torch.zeros(2, 2), seed=0)
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())


def test_sensitivity_is_captums() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from captum import metrics
    net, x = trained(), torch.randn((1, 1, 8, 8), generator=torch.Generator().manual_seed(1))

    def gradient(inputs: Tensor) -> Tensor:
        leaf = inputs.detach().clone().requires_grad_()
        # The square makes the gradient depend on the input.
        with torch.enable_grad():
            return torch.autograd.grad((net(leaf)[:, 1] ** 2).sum(), leaf)[0]

    generator = torch.Generator().manual_seed(0 + 2)
    noise = [2 * torch.rand(x.shape, generator=generator) - 1 for _ in range(6)]
    radius = torch.tensor(0.05).view(1, 1, 1)

    def perturbed(inputs: tuple[Tensor]) -> tuple[Tensor]:
        return (inputs[0] + torch.cat(noise) * radius,)

    theirs = metrics.sensitivity_max(
        lambda inputs: (gradient(inputs[0]),), x, perturb_func=perturbed, n_perturb_samples=6
    )
    ours = evaluation.sensitivity(gradient, x, gradient(x), radius, seed=0)

    assert ours == pytest.approx(float(theirs[0]), rel=1e-5)
    assert evaluation.sensitivity(gradient, x, torch.zeros_like(x), radius, seed=0) is None


def test_a_map_that_becomes_nan_is_not_called_still() -> None:
    one, radius = torch.ones(1, 1, 2, 2), torch.ones(1, 1, 1)

    found = evaluation.sensitivity(lambda x: x * torch.nan, one, one, radius, seed=0)

    assert found is None


def test_concentration_is_the_share_of_the_strongest_tenth() -> None:
    assert evaluation.concentration(torch.ones(10, 10)) == pytest.approx(0.1)
    point = torch.zeros(10, 10)
    point[3, 4] = -2
    assert evaluation.concentration(point) == 1
    assert evaluation.concentration(torch.zeros(10, 10)) is None
    assert evaluation.concentration(torch.full((2, 2), torch.nan)) is None


def test_agreement_compares_what_speaks_for_the_target() -> None:
    a = torch.tensor([[1.0, 2.0], [-3.0, 0.0]])

    found = evaluation.agreement({"x": a, "y": a.clamp(min=0), "z": -a})

    assert found["x"]["y"] == pytest.approx(1)
    assert found["x"]["z"] < 0
    assert set(found["z"]) == {"x", "y"}


@pytest.mark.parametrize("sigma", [1.0, 2.0])
@pytest.mark.parametrize("shape", [(20, 31), (5, 4), (1, 1)])
def test_a_blur_is_scipys_gaussian_with_reflected_borders(
    shape: tuple[int, int], sigma: float
) -> None:
    from scipy.ndimage import gaussian_filter

    image = torch.rand((3, *shape), generator=torch.Generator().manual_seed(0)).double()

    found = gaussian_blur(image, sigma)

    reach = round(3 * sigma)
    if min(shape) > reach:
        wanted = [gaussian_filter(c, sigma, mode="mirror", radius=reach) for c in image.numpy()]
        np.testing.assert_allclose(found, np.stack(wanted), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(gaussian_blur(torch.ones(2, *shape), 2.0), torch.ones(2, *shape))
