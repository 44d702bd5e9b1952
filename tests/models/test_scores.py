"""Which of a model's outputs is its answer, and what kind of numbers that holds."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from gradscope.errors import UsageError
from gradscope.models.scores import Answering, answering

Heads = Callable[[Any, Tensor], Any]


class Net(nn.Module):
    """A trunk, whose features several heads read; what is returned is given."""

    def __init__(self, answer: Heads = lambda net, z: net.classes(z)) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.trunk = nn.Sequential(
            nn.Conv2d(3, 128, 3), nn.BatchNorm2d(128), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        )  # fmt: skip
        self.classes, self.colours = nn.Linear(128, 10), nn.Linear(128, 7)
        self.one, self.wide = nn.Linear(128, 1), nn.Linear(128, 192)
        self.projection = nn.Linear(128, 192, bias=False)
        self.pool = nn.MultiheadAttention(128, 4, batch_first=True)
        self.answer = answer

    def forward(self, x: Tensor) -> Any:
        return self.answer(self, self.trunk(x))


class Named(NamedTuple):
    features: Tensor
    classifier: Tensor


@dataclass
class Fields:
    latent: Tensor
    scores: Tensor


def asked(answer: Heads, wanted: str | None = None, names: int = 0, **config: Any) -> Answering:
    net = Net(answer).eval().requires_grad_(False)
    if config:
        net.config = SimpleNamespace(**config)  # type: ignore[assignment]
    return answering(net(image().requires_grad_()), wanted, names, net)


def image() -> Tensor:
    return torch.randn((2, 3, 8, 8), generator=torch.Generator().manual_seed(1))


# --- which output ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "name", "competing"),
    [
        (lambda n, z: n.classes(z), "", ()),
        # Features come before the scores that are made from them, at whatever position.
        (lambda n, z: (z, n.classes(z)), "1", ()),
        (lambda n, z: (n.classes(z), z), "0", ()),
        (lambda n, z: [z, (z * 2, n.classes(z))], "1.1", ()),
        # A copy for the caller hides that; its numbers do not.
        (lambda n, z: (functional.normalize(z), n.classes(z)), "1", ()),
        (lambda n, z: {"features": z, "classifier": n.classes(z)}, "classifier", ()),
        (lambda n, z: {"embedding": n.wide(z), "x": n.classes(z)}, "x", ()),
        (lambda n, z: {"aux": n.colours(z), "logits": n.classes(z)}, "logits", ()),
        (lambda n, z: Named(z, n.classes(z)), "classifier", ()),
        (lambda n, z: Fields(z.clone(), n.classes(z)), "scores", ()),
        (lambda n, z: SimpleNamespace(logits=n.classes(z)), "logits", ()),
        # What is shown are the logits, not the probabilities that are made from them.
        (lambda n, z: (lambda y: (y, y.softmax(1)))(n.classes(z)), "0", ()),
        (lambda n, z: (lambda y: (y.softmax(1), y))(n.classes(z)), "1", ()),
        # Tensors of another form do not compete.
        (lambda n, z: (z[:, :, None, None].expand(-1, -1, 4, 4), n.classes(z)), "1", ()),
        (lambda n, z: (n.classes(z), z.argmax(1), None), "0", ()),
        # Two heads side by side are both answers.
        (lambda n, z: (n.classes(z), n.colours(z)), "0", ("1",)),
        (lambda n, z: {"a_logits": n.classes(z), "b_logits": n.colours(z), "features": z},
         "a_logits", ("b_logits",)),
    ],
)  # fmt: skip
def test_the_answer_is_found_by_meaning(
    answer: Heads, name: str, competing: tuple[str, ...]
) -> None:
    found = asked(answer).choice

    assert (found.name, found.competing) == (name, competing)


def two_heads(net: Net, z: Tensor) -> Any:
    return {"kind": net.classes(z), "colour": net.colours(z)}


def test_of_two_heads_the_one_whose_classes_have_names_is_meant() -> None:
    assert asked(two_heads, names=7).choice.name == "colour"
    assert asked(two_heads, names=7).choice.competing == ()
    assert asked(two_heads, names=5).choice.competing == ("colour",)


def test_an_output_can_be_asked_for_by_name_or_position() -> None:
    assert asked(two_heads, "colour").choice.name == "colour"
    assert asked(two_heads, "1").choice.name == "colour"
    assert asked(two_heads, "1").choice.competing == ()
    with pytest.raises(UsageError, match=r"--output-name shape: .*'kind' \[2, 10\], 'colour'"):
        asked(two_heads, "shape")
    with pytest.raises(UsageError, match="--output-name 2: the model returns no such output"):
        asked(two_heads, "2")
    with pytest.raises(UsageError, match=r"--output-name 0: its shape \[2, 3, 4, 4\] does not fit"):
        asked(lambda n, z: (z[:, :3, None, None].expand(-1, -1, 4, 4), n.classes(z)), "0")


def test_what_holds_no_scores_is_described() -> None:
    with pytest.raises(
        UsageError, match=r"returns \[2, 128, 2, 2\], scores at every position: --target mask"
    ):
        asked(lambda _n, z: z[:, :, None, None].expand(-1, -1, 2, 2))
    with pytest.raises(UsageError, match="returns a str without scores"):
        asked(lambda _n, _z: "cat")


# --- what kind of numbers -------------------------------------------------------------------------


def ensemble(net: Net, z: Tensor) -> Tensor:
    return (net.classes(z).sigmoid() + net.classes(2 * z).sigmoid()) / 2


def pooled(net: Net, z: Tensor) -> Tensor:
    """The end of CLIP's ResNets: the mean asks, and what it got is projected, with a bias."""
    found: Tensor = net.pool(
        z[:, None], z[:, None].expand(-1, 2, -1), z[:, None].expand(-1, 2, -1)
    )[0]
    return found[:, 0]


def by_hand(net: Net, z: Tensor) -> Tensor:
    """The same, written out."""
    keys = net.wide(z).view(-1, 3, 64)
    found = (keys[:, :1] @ keys.transpose(1, 2)).softmax(-1) @ keys
    return functional.linear(found, torch.ones(256, 64), torch.ones(256))[:, 0]


def block(net: Net, z: Tensor) -> Tensor:
    """The end of SigLIP's pooling: attention, and a block's sum."""
    token = pooled(net, z)
    return token + net.pool.out_proj(functional.gelu(functional.layer_norm(token, (128,))))


HEADS: list[tuple[Heads, str]] = [
    (lambda n, z: n.classes(z), "logits"),
    (lambda n, z: n.wide(z), "logits"),
    (lambda n, z: n.classes(z).softmax(1), "probabilities"),
    (lambda n, z: n.classes(z).sigmoid(), "probabilities"),
    (lambda n, z: functional.hardsigmoid(n.classes(z)), "probabilities"),
    (ensemble, "probabilities"),
    (lambda n, z: n.classes(z).softmax(1)[:, :, None, None], "probabilities"),
    (lambda n, z: n.classes(z).log_softmax(1), "log-probabilities"),
    (lambda n, z: (100 * n.classes(z)).softmax(1).log(), "log-probabilities"),
    (lambda n, z: functional.logsigmoid(n.classes(z)), "log-probabilities"),
    (lambda n, z: n.one(z).sigmoid(), "probabilities"),
    (lambda n, z: n.one(z).sigmoid().squeeze(1), "probabilities"),
    (lambda n, z: n.one(z), "value"),
    (lambda n, z: n.one(z).squeeze(1), "value"),
    # Between 0 and 1 by accident.
    (lambda n, z: 0.5 + 0.01 * n.one(z), "value"),
    (lambda n, z: 100 * n.one(z).sigmoid(), "value"),
    (lambda n, z: 0.5 + 0.01 * n.classes(z), "logits"),
    # Features, a normalised vector, CLIP's projection.
    (lambda _n, z: z, "embedding"),
    (lambda n, z: functional.normalize(n.wide(z)), "embedding"),
    (lambda n, z: functional.layer_norm(n.wide(z), (192,)), "embedding"),
    (lambda n, z: n.projection(z), "embedding"),
    (lambda n, z: {"image_embeds": n.wide(z)}, "embedding"),
    # Attention that pools is no head; a dense layer behind it, and the sum of two heads, are.
    (pooled, "embedding"),
    (by_hand, "embedding"),
    (block, "embedding"),
    (lambda n, z: functional.linear(block(n, z), torch.ones(200, 128), torch.ones(200)), "logits"),
    (lambda n, z: n.wide(functional.relu(pooled(n, z))), "logits"),
    (lambda n, z: (n.wide(z) + n.wide(2 * z)) / 2, "logits"),
    # Few numbers are rather classes, whatever they come from.
    (lambda _n, z: z[:, :20], "logits"),
]


@pytest.mark.parametrize(("answer", "head"), HEADS)
def test_the_kind_of_head_is_measured(answer: Heads, head: str) -> None:
    assert asked(answer).head == head


def test_numbers_with_names_are_classes() -> None:
    assert asked(lambda n, z: n.projection(z), names=192).head == "logits"
    assert asked(lambda n, z: n.one(z), names=2).head == "independent"
    assert asked(lambda n, z: n.one(z), names=1).head == "value"


def test_a_configuration_says_what_the_problem_is() -> None:
    classes: Heads = lambda n, z: n.classes(z)  # noqa: E731
    assert asked(classes, problem_type="regression").head == "value"
    assert asked(classes, problem_type="multi_label_classification").head == "independent"
    assert asked(classes, problem_type="single_label_classification").head == "logits"


@pytest.mark.parametrize(("answer", "head"), HEADS)
def test_probabilities_are_the_models_own(answer: Heads, head: str) -> None:
    net = Net(answer).eval().requires_grad_(False)
    returned = net(image().requires_grad_())

    scores = answering(returned, None, 0, net).read(returned)

    (own,) = returned.values() if isinstance(returned, dict) else (returned,)
    own = own.detach().reshape(2, -1)
    if own.shape[1] == 1 and head == "probabilities":
        own = torch.cat([1 - own, own], 1)
    wanted = {"logits": own.softmax(1), "probabilities": own, "log-probabilities": own.exp()}
    probabilities = scores.probabilities
    assert (probabilities is None) == (head in ("value", "embedding"))
    if probabilities is not None:
        torch.testing.assert_close(probabilities, wanted[head])


def test_a_logit_of_yes_has_a_no_and_both_their_probability() -> None:
    net = Net(lambda n, z: n.one(z)).eval()
    returned = net(image())

    scores = answering(returned, None, 2, net).read(returned)

    torch.testing.assert_close(scores.values, torch.cat([-returned, returned], 1))
    yes = returned.sigmoid()
    torch.testing.assert_close(scores.probabilities, torch.cat([1 - yes, yes], 1))


@pytest.mark.parametrize("form", ["traced", "scripted", "exported", "decomposed"])
@pytest.mark.parametrize(
    ("last", "head"), [(nn.Sigmoid(), "probabilities"), (nn.Identity(), "logits")]
)
def test_the_kind_is_the_same_in_every_form(form: str, last: nn.Module, head: str) -> None:
    net: Any = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 36, 5), last).eval()
    x = image()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if form in ("traced", "scripted"):
            made = torch.jit.trace(net, x) if form == "traced" else torch.jit.script(net)
            file = io.BytesIO()
            torch.jit.save(made, file)
            file.seek(0)
            net = torch.jit.load(file)
        else:
            program = torch.export.export(net, (x,))
            net = (program.run_decompositions() if form == "decomposed" else program).module()
        returned = net(x.requires_grad_())

    assert answering(returned, None, 0, nn.Module()).head == head


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_scores_that_are_not_finite_are_told_from_a_logarithm_of_nothing(value: float) -> None:
    def spoiled(net: Net, z: Tensor) -> Tensor:
        return net.classes(z) + torch.tensor([value] + [0.0] * 9)

    def certain(net: Net, z: Tensor) -> Tensor:
        return (1e4 * net.classes(z)).softmax(1).log()

    net = Net(spoiled).eval()
    assert not answering(net(image()), None, 0, net).read(net(image())).finite
    net = Net(certain).eval()
    scores = answering(net(image()), None, 0, net).read(net(image()))
    assert bool(torch.isinf(scores.values).any())
    assert scores.finite
