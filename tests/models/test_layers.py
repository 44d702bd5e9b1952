"""Which layers a model has, what reaches them, and the one that ``auto`` takes."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from architectures import resnet18
from torch import Tensor, nn

from gradscope.errors import UsageError
from gradscope.models.forms import as_model
from gradscope.models.layers import Layer, auto_layer, choose, shortlist, survey
from gradscope.models.layout import Layout
from gradscope.models.probe import held


class Net(nn.Module):
    """A rectifier that is used twice, a half of the maps that the head does not read."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.act = nn.ReLU()
        self.block = nn.Sequential(nn.Conv2d(4, 5, 3, padding=1), nn.ReLU())
        self.pool = nn.AvgPool2d(2)
        self.unused = nn.Linear(2, 2)
        self.head = nn.Linear(5 * 4 * 2, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.conv(x)) + 1
        x = self.pool(self.block(self.act(x)))
        return self.head(x[:, :, :, :2].flatten(1))


def seen(net: nn.Module, target: int | None = None, side: int = 8) -> dict[str, Layer]:
    x = torch.randn((2, 3, side, side), generator=torch.Generator().manual_seed(0))
    model = as_model(net)
    with held(model.module):
        return {layer.name: layer for layer in survey(model, x, target)}


def test_a_survey_has_every_layer_that_was_called_in_order() -> None:
    torch.manual_seed(0)

    layers = seen(Net())

    assert list(layers) == ["conv", "act", "block.0", "block.1", "block", "pool", "head"]
    assert {name: layer.calls for name, layer in layers.items() if layer.calls > 1} == {"act": 2}
    assert layers["conv"].shape == (1, 4, 8, 8)
    assert layers["conv"].layout == Layout("maps", (8, 8))
    assert layers["head"].layout is None
    assert layers["head"].receives is None
    assert "conv" in layers["block.0"].operator
    assert "relu" in layers["act"].operator
    assert layers["block"].tensor == layers["block.1"].tensor != layers["block.0"].tensor


def test_a_layer_receives_where_the_scores_gradient_is_not_zero() -> None:
    net = Net()
    with torch.no_grad():
        net.head.weight[0] = 0
        net.head.weight[1] = 1

    assert seen(net, target=1)["pool"].receives == 0.5
    assert seen(net, target=0)["pool"].receives == 0
    alike = {target: seen(net, target)["pool"].receives for target in (None, 1)}
    net.head.bias.data[1] = 100
    assert seen(net)["pool"].receives == alike[1]


def layer(name: str, operator: str = "relu", **more: object) -> Layer:
    made = Layer(name, (1, 4, 7, 7), Layout("maps", (7, 7)), 1, operator, 1.0)
    return replace(made, **more)


TOKENS = Layout("tokens", (7, 7), 1)


@pytest.mark.parametrize(
    ("layers", "wanted", "reason"),
    [
        ([layer("a"), layer("b")], "b", "the last layer with maps that the score"),
        ([layer("a"), layer("b", layout=Layout("maps", (1, 1)))], "a", "maps"),
        ([layer("a"), layer("b", layout=Layout("maps", (1, 2)))], "b", "maps"),
        ([layer("a"), layer("b", layout=None)], "a", "maps"),
        ([layer("a"), layer("b", "adaptive_avg_pool2d"), layer("c", "mean")], "a", "maps"),
        ([layer("a"), layer("b", "upsample_bilinear2d"), layer("c", "_softmax")], "a", "maps"),
        ([layer("a"), layer("b", receives=0.0)], "a", r"reaches \(b gets none\)"),
        ([layer("a"), layer("b", receives=None)], "a", r"reaches \(b gets none\)"),
        ([layer("a", receives=0.0), layer("b", receives=0.0)], "b", "reaches none of them"),
        # Of tokens, only the residual stream and its normalised forms.
        ([layer("a", stream=True, layout=TOKENS), layer("b", layout=TOKENS)], "a", "patch tokens"),
        ([layer("a", stream=True, layout=TOKENS), layer("b")], "b", "maps"),
        # The values of an attention that pools maps.
        ([layer("a", stream=True), layer("b", layout=TOKENS)], "a", "maps"),
        ([layer("a", layout=TOKENS), layer("b", layout=TOKENS)], "b", "patch tokens"),
        # What was made last counts, not what is returned last.
        ([layer("a", made_by=2), layer("b", made_by=1, above=2)], "a", "maps"),
        ([layer("a", made_by=1, above=2), layer("b", made_by=2, above=4)], "b",
         r"one of several branches, a is the last of another"),
        ([layer("a", made_by=1, above=2), layer("b", made_by=2, above=6)], "b", "reaches$"),
    ],
)  # fmt: skip
def test_auto_is_the_last_layer_with_positions_that_the_gradient_reaches(
    layers: list[Layer], wanted: str, reason: str
) -> None:
    made = [replace(one, tensor=(number, 0)) for number, one in enumerate(layers)]

    found = choose(made)

    assert found.layer.name == wanted
    assert re.search(reason, found.reason)


def test_of_several_names_for_one_tensor_the_innermost_block_is_taken() -> None:
    """A stage, its last block and that block's activation."""
    made = [
        layer("stage.0.conv", "convolution", tensor=(1, 0)),
        layer("stage.0.act", tensor=(2, 0)),
        layer("stage.0", tensor=(2, 0)),
        layer("stage", tensor=(2, 0)),
        layer("whole", tensor=(2, 0), layout=None),
    ]

    assert choose(made).layer.name == "stage.0"
    assert choose(made[1:]).layer.name == "stage.0.act"


def test_a_gate_over_channels_is_no_block() -> None:
    """Squeeze and excitation, whose convolutions have no positions, ends a block."""
    made = [
        layer("stage.0.conv", "convolution", tensor=(1, 0)),
        layer("stage.0.gate.fc", "convolution", tensor=(2, 0), layout=Layout("maps", (1, 1))),
        layer("stage.0.gate", "mul", tensor=(3, 0)),
        layer("stage.0", "mul", tensor=(3, 0)),
        layer("stage", "mul", tensor=(3, 0)),
    ]

    assert choose(made).layer.name == "stage.0"


def test_a_model_without_positions_has_no_auto_layer() -> None:
    with pytest.raises(UsageError, match="no layer returns maps or patch tokens"):
        choose([layer("head", "addmm", layout=None)])


def test_auto_is_found_once_for_each_size_of_image() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    model = as_model(net)
    passes: list[int] = []
    net.register_forward_hook(lambda _m, _i, _o: passes.append(1))

    with held(net):
        first = auto_layer(model, torch.randn(1, 3, 8, 8))
        again = auto_layer(model, torch.randn(5, 3, 8, 8))
        assert len(passes) == 1
        auto_layer(model, torch.randn(1, 3, 9, 9))

    assert first is again
    assert first.layer.name == "0"
    assert len(passes) == 2


def test_a_shortlist_begins_with_autos_choice_and_has_the_last_blocks_of_each_grid() -> None:
    found = list(seen(resnet18(10), side=64).values())
    choice = choose(found)

    short = [layer.name for layer in shortlist(found, choice)]

    assert short[0] == choice.layer.name
    assert len(short) == len(set(short)) <= 10
    assert [name for name in short if name.startswith("layer")] == [
        "layer4.1", "layer4.0", "layer3", "layer3.0", "layer2", "layer2.0", "layer1", "layer1.0",
    ]  # fmt: skip


def test_a_shortlist_of_a_plain_stack_has_one_layer_a_grid() -> None:
    torch.manual_seed(0)
    found = list(seen(Net()).values())

    assert [layer.name for layer in shortlist(found, choose(found))] == ["block"]
    assert [layer.name for layer in shortlist(found, None)] == ["block"]
