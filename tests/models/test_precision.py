"""Models in half precision, in every form, compute what the same weights do in float32."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gradscope.attribution.attribute import attribute
from gradscope.errors import UsageError
from gradscope.models.forms import as_model
from gradscope.models.load import load_model
from gradscope.models.probe import held, run


class Net(nn.Module):
    """With what half precision leaves in code: casts, factories and constants of its type."""

    def __init__(self, dtype: torch.dtype, says: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 8, 3)
        self.norm = nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 4)
        self.dtype, self.says = dtype, says

    def forward(self, x: Tensor) -> Tensor:
        if self.says:
            x = x.to(self.dtype) + torch.full((3, 1, 1), 0.1, dtype=self.dtype)
        x = torch.relu(self.norm(self.conv(x))).float().mean((2, 3))
        return self.head(x.to(self.head.weight.dtype))


TYPES = [torch.float16, torch.bfloat16]
X = torch.randn((2, 3, 8, 8), generator=torch.Generator().manual_seed(1))


def half(dtype: torch.dtype, says: bool = True) -> Net:
    return Net(dtype, says).eval().to(dtype)


def wanted(dtype: torch.dtype, says: bool = True) -> Tensor:
    """The gradient of the first class in float32, of the weights as they are stored."""
    net = half(dtype, says).float()
    net.dtype = torch.float32
    x = X.clone().requires_grad_()
    return torch.autograd.grad(net(x)[:, 0].sum(), x)[0]


def formed(form: str, dtype: torch.dtype) -> Any:
    net = half(dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if form == "module":
            return net
        if form == "exported":
            return torch.export.export(net, (X.to(dtype),))
        traced = torch.jit.trace(net, X.to(dtype))
        return torch.jit.freeze(traced) if form == "frozen" else traced


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("form", ["module", "traced", "frozen", "exported"])
def test_gradients_of_a_model_in_half_precision_are_those_of_float32(
    form: str, dtype: torch.dtype
) -> None:
    model = formed(form, dtype)

    found = attribute(model, X, "saliency", target=0)
    given_in_half = attribute(model, X.to(dtype), "saliency", target=0)

    torch.testing.assert_close(found.values, wanted(dtype), rtol=1e-4, atol=1e-7)
    assert given_in_half.values.dtype == torch.float32
    name = str(dtype).removeprefix("torch.")
    assert as_model(model).notes == (f"{name} in the model: it is computed in float32",)


def test_a_model_in_memory_stays_in_half_precision() -> None:
    net = half(torch.float16)
    before = {name: value.clone() for name, value in net.state_dict().items()}

    attribute(net, X, "saliency", target=0)

    for name, value in net.state_dict().items():
        assert value.dtype == before[name].dtype
        assert torch.equal(value, before[name])


@pytest.mark.parametrize("form", ["module", "traced", "frozen", "exported"])
def test_what_is_saved_in_half_precision_is_told(tmp_path: Path, form: str) -> None:
    path, model = tmp_path / "m.pt", formed(form, torch.float16)
    save = {"module": torch.save, "exported": torch.export.save}.get(form, torch.jit.save)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        save(nn.Sequential(nn.Conv2d(3, 4, 3)).half() if form == "module" else model, path)

    found = load_model(str(path), trust=frozenset({"pickle"}))

    assert any("float16 in the model" in note for note in found.notes)


def test_float32_and_double_are_left_alone() -> None:
    for dtype in (torch.float32, torch.float64):
        net = Net(dtype).eval().to(dtype)
        model = as_model(net)
        assert model.module is net
        assert not model.notes
        with held(net):
            assert run(model, X.to(dtype)).logits.dtype == dtype


def test_what_cannot_be_copied_says_how_to_go_on() -> None:
    net = half(torch.float16)
    net.made = (n for n in range(3))  # type: ignore[assignment]

    with pytest.raises(UsageError, match=r"cannot be copied .*explain model\.float\(\)"):
        as_model(net)
