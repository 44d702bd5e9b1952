"""TorchScript programs: what their arguments may be."""

from __future__ import annotations

import io
import warnings

import pytest
import torch
from torch import Tensor, nn

from gradscope import attribute
from gradscope.errors import UsageError
from gradscope.models.forms import as_model


class Masked(nn.Module):
    """What follows the image may be left out."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.head = nn.Linear(4, 5)

    def forward(
        self, x: Tensor, mask: Tensor | None = None, scale: float = 2.0, flip: bool = False
    ) -> Tensor:
        x = self.conv(x).relu()
        if mask is not None:
            x = x * mask
        if flip:
            x = -x
        return self.head(x.mean((2, 3))) * scale


class MaskedWithoutDefault(Masked):
    """An optional argument that nothing stands for; it may be None."""

    def forward(self, x: Tensor, mask: Tensor | None, scale: float = 2.0) -> Tensor:  # type: ignore[override]
        x = self.conv(x).relu()
        if mask is not None:
            x = x * mask
        return self.head(x.mean((2, 3))) * scale


class Two(Masked):
    def forward(self, x: Tensor, other: Tensor) -> Tensor:  # type: ignore[override]
        return self.head((self.conv(x) + other).mean((2, 3)))


class Counted(Masked):
    def forward(self, x: Tensor, times: int) -> Tensor:  # type: ignore[override]
        return self.head(self.conv(x).mean((2, 3))) * times


def scripted(module: nn.Module, *, frozen: bool = False) -> torch.jit.ScriptModule:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        script = torch.jit.script(module.eval())
        file = io.BytesIO()
        torch.jit.save(torch.jit.freeze(script) if frozen else script, file)
        file.seek(0)
        return torch.jit.load(file)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("kind", [Masked, MaskedWithoutDefault])
def test_arguments_that_need_not_be_given_are_left_out(kind: type[Masked], frozen: bool) -> None:
    net = kind().eval()
    x = torch.randn(2, 3, 8, 8)

    found = attribute(scripted(net, frozen=frozen), x, "saliency", target=[1, 3])

    leaf = x.clone().requires_grad_()
    answer = net(leaf, None)
    wanted = torch.autograd.grad(answer[0, 1] + answer[1, 3], leaf)[0]
    torch.testing.assert_close(found.values, wanted)
    answered = answer.detach()
    assert found.diagnostics["scores"] == pytest.approx(answered[[0, 1], [1, 3]].tolist())


@pytest.mark.parametrize(("kind", "lacking"), [(Two, "other: Tensor"), (Counted, "times: int")])
def test_a_program_that_needs_more_than_images_says_what(kind: type[Masked], lacking: str) -> None:
    with pytest.raises(UsageError, match=f"this program takes .*{lacking}"):
        as_model(scripted(kind()))
