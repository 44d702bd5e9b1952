"""One model in every form in which people save it."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable

import torch
from architectures import channels_last, vit_registers, vit_small
from torch import Tensor, nn

FORMS = ("traced", "traced without gradients", "scripted", "frozen", "export", "dynamic export")


class Rectifiers(nn.Module):
    """A pre-activation skip; rectifiers as a module used twice, as a function, and in place."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.act = nn.ReLU()
        self.conv = nn.Conv2d(6, 6, 3, padding=1)
        self.last = nn.Conv2d(6, 8, 3, stride=2)
        self.head = nn.Linear(8 * 7 * 7, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.stem(x))
        # What arrives at this rectifier's input comes through the skip as well.
        x = x + self.conv(self.act(self.norm(x)))
        x = torch.relu(x)
        x = self.last(x).relu_()
        return self.head(x.flatten(1))


SIZES = {"rectifiers": (16, 16), "vit": (32, 32), "registers": (32, 48), "channels last": (32, 32)}
_MADE: dict[str, Callable[[], nn.Module]] = {
    "rectifiers": Rectifiers,
    "vit": vit_small,
    "registers": vit_registers,
    "channels last": channels_last,
}


def model(name: str) -> nn.Module:
    """A network with weights large enough that classes differ."""
    torch.manual_seed(3)
    made = _MADE[name]()
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.dim() > 1:
                parameter.mul_(1.5)
        for module in made.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(std=0.2)
                module.running_var.uniform_(0.5, 2)
    return made.eval()


def images(name: str, count: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(4)
    return torch.randn((count, 3, *SIZES[name]), generator=generator)


def saved(module: nn.Module, form: str, x: Tensor) -> object:
    """The module as it comes back from a file."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return _exported(module, form, x) if "export" in form else _script(module, form, x)


def _exported(module: nn.Module, form: str, x: Tensor) -> object:
    batch = torch.export.Dim("batch", min=1, max=512)
    shapes = ({0: batch},) if "dynamic" in form else None
    program = torch.export.export(module, (x,), dynamic_shapes=shapes)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    return torch.export.load(file)


def _script(module: nn.Module, form: str, x: Tensor) -> object:
    if form == "scripted":
        script = torch.jit.script(module)
    elif form == "traced without gradients":
        with torch.no_grad():
            script = torch.jit.trace(module, x, check_trace=False)
    else:
        script = torch.jit.trace(module, x, check_trace=False)
    if form == "frozen":
        script = torch.jit.freeze(script)
    file = io.BytesIO()
    torch.jit.save(script, file)
    file.seek(0)
    return torch.jit.load(file)
