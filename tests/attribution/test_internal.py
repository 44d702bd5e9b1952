"""Conductance and internal influence against captum and their definitions."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gradscope import attribute_layer, attribute_neuron
from gradscope.errors import InputError, UsageError

from .forms import FORMS, images, model, saved

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import captum.attr as captum

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:captum")


def smooth() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, stride=2), nn.Tanh(), nn.Conv2d(6, 4, 3), nn.Tanh(), nn.Flatten(),
        nn.Linear(100, 5),
    ).double()  # fmt: skip


X = images("rectifiers").double()
BASE = 0.3 * X.flip(3)
TARGET: Any = [1, 3]


def close(found: Tensor, wanted: Tensor, tolerance: float = 1e-6) -> None:
    scale = float(wanted.detach().abs().max())
    assert scale > 0
    torch.testing.assert_close(found, wanted.detach(), rtol=0, atol=tolerance * scale)


def test_internal_influence_is_captums() -> None:
    net = smooth()
    wanted = captum.InternalInfluence(net, net[2]).attribute(
        X, BASE, target=TARGET, n_steps=9, method="riemann_middle"
    )

    found = attribute_layer(
        net, X, "2", "internal-influence", target=TARGET, reference=BASE, steps=9
    )

    close(found.values, wanted)
    assert (found.layer, found.target) == ("2", (1, 3))


def test_a_layers_conductance_is_captums_where_both_have_converged() -> None:
    net = smooth()
    wanted = captum.LayerConductance(net, net[0]).attribute(
        X, BASE, target=TARGET, n_steps=800, method="riemann_middle"
    )

    found = attribute_layer(net, X, "0", target=TARGET, reference=BASE, steps=60)

    close(found.values, wanted, 5e-3)


@pytest.mark.parametrize("layer", ["0", "1", "2", "4"])
def test_every_layers_conductance_adds_up_to_the_change_of_the_score(layer: str) -> None:
    net = smooth()
    change = (net(X) - net(BASE)).detach()[[0, 1], TARGET]

    coarse, fine = (
        attribute_layer(net, X, layer, target=TARGET, reference=BASE, steps=n) for n in (8, 64)
    )

    torch.testing.assert_close(fine.values.flatten(1).sum(1), change, rtol=1e-3, atol=0)
    # Trapezoids: eight times the steps, a sixty-fourth of the error.
    for worse, better in zip(
        coarse.diagnostics["relative_delta"], fine.diagnostics["relative_delta"], strict=True
    ):
        assert better < max(0.05 * worse, 1e-12)


@pytest.mark.parametrize("neuron", [(2, 1, 3), (0, 0, 0)])
def test_a_neurons_conductance_is_captums(neuron: tuple[int, ...]) -> None:
    net = smooth()
    wanted = captum.NeuronConductance(net, net[2]).attribute(
        X, neuron, BASE, target=TARGET, n_steps=7, method="riemann_middle"
    )

    found = attribute_neuron(net, X, "2", neuron, target=TARGET, reference=BASE, steps=7)

    close(found.values, wanted)


def test_a_neurons_own_gradients_are_captums() -> None:
    net = smooth()
    gradient = captum.NeuronGradient(net, net[2]).attribute(X.clone().requires_grad_(), (1, 2, 2))
    integrated = captum.NeuronIntegratedGradients(net, net[2]).attribute(
        X, (1, 2, 2), BASE, n_steps=7, method="riemann_middle"
    )

    found = attribute_neuron(net, X, "2", (1, 2, 2), "gradient", target=1)
    close(found.values, gradient)
    found = attribute_neuron(
        net, X, "2", (1, 2, 2), "integrated-gradients", reference=BASE, steps=7
    )
    close(found.values, integrated)


def test_a_channel_is_the_sum_of_its_neurons() -> None:
    net = smooth()

    def conductance(*neuron: int) -> Tensor:
        return attribute_neuron(net, X, "2", neuron, target=1, steps=3).values

    wanted = sum(conductance(1, row, column) for row in range(5) for column in range(5))
    close(attribute_neuron(net, X, "2", 1, target=1, steps=3).values, torch.as_tensor(wanted))


@pytest.mark.parametrize("form", [f for f in FORMS if f != "frozen"])
def test_every_form_gives_what_the_module_gives(form: str) -> None:
    net, x = model("rectifiers").double(), X
    other = saved(net, form, x[: 1 + ("dynamic" in form)])

    for method in ("conductance", "internal-influence"):
        wanted, found = (
            attribute_layer(m, x, "last", method, target=TARGET, steps=4) for m in (net, other)
        )
        close(found.values, wanted.values)
    wanted, found = (
        attribute_neuron(m, x, "last", 2, target=TARGET, steps=4) for m in (net, other)
    )
    close(found.values, wanted.values)


def test_the_model_is_left_as_it_was() -> None:
    net = smooth().train()

    attribute_layer(net, X, "2", steps=2)

    assert net.training
    assert all(p.requires_grad and p.grad is None for p in net.parameters())


def test_what_is_not_there_is_refused() -> None:
    net = smooth()

    with pytest.raises(UsageError, match="there are conductance, internal-influence"):
        attribute_layer(net, X, "2", "influence")
    with pytest.raises(UsageError, match="no layer"):
        attribute_layer(net, X, "9")
    with pytest.raises(UsageError, match=r"has no neuron \[4, 0, 0\]"):
        attribute_neuron(net, X, "2", (4, 0, 0))
    with pytest.raises(UsageError, match="has no neuron"):
        attribute_neuron(net, X, "2", (0, 0, 0, 0))
    with pytest.raises(UsageError, match="steps has to be at least 1"):
        attribute_layer(net, X, "2", steps=0)
    with pytest.raises(InputError, match="not finite"):
        attribute_layer(net, X / 0, "2")
