"""The smallest fault of every rule, as a command line: what fires it, and how severe that is.

Those of ``weights`` and ``flow`` are the ones that their rules are tested with.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

import gradscope
from gradscope.fingerprints.document import written as manifest_text
from gradscope.histories.format import KEYS, write
from gradscope.histories.history import History
from gradscope.report.rules import load_rules
from gradscope.weights.result import Need

from ..drift.pairs import model, written
from ..flow.test_rules import FIRING
from ..weights.test_rules import CASES

#: Writes the faulty input into a folder: the inputs, then the options.
Plant = Callable[[Path], tuple[Sequence[str], Sequence[str]]]


@dataclass(frozen=True)
class Fault:
    """What a rule finds, and what the run ends with where that is an error."""

    plant: Plant
    severity: str
    #: 3 where the input can be read in part only: no --fail-on makes such a run pass.
    code: int = 1


# --- weights and flow -----------------------------------------------------------------------------

_UNREADABLE = ("index-mismatch", "missing-shard", "truncated-file")


def _checkpoint(name: str, folder: Path) -> tuple[list[str], list[str]]:
    options = ["--spectral"] if _NEEDS[name] is Need.SPECTRA else []
    return [str(CASES[name].fires(folder))], options


def _history(name: str, folder: Path) -> tuple[list[str], list[str]]:
    return [str(_saved(FIRING[name][0](), folder / "run.npz"))], []


def _saved(history: History, path: Path) -> Path:
    """A history as a file of the native format."""
    layers = history.layers
    arrays: dict[str, Any] = {
        "steps": history.steps,
        "layer/name": np.array([layer.name for layer in layers]),
        "layer/kind": np.array([layer.kind for layer in layers]),
        "layer/numel": np.array([layer.numel for layer in layers]),
        "grad/l2": history.l2,
        "grad/status": history.status,
    }
    if any(layer.group is not None for layer in layers):
        arrays["layer/group"] = np.array([-1 if (g := x.group) is None else g for x in layers])
        arrays["lr"] = np.full((len(history.steps), 1), 0.1)
    if history.sketches is not None:
        arrays["grad/sketch"] = history.sketches.values
        arrays["grad/sketch_index"] = history.sketches.index
    for name, key in KEYS.items():
        if key.field is not None and (found := getattr(history, key.field)) is not None:
            arrays[name] = np.asarray(found)
    write(path, arrays, history.meta)
    return path


# --- drift and verify -----------------------------------------------------------------------------

_Q = "layers.1.q_proj.weight"


def _pair(
    change: Callable[[dict[str, Tensor]], object], *options: str
) -> Callable[[Path], tuple[list[str], list[str]]]:
    """The model, and a copy that is changed."""

    def plant(folder: Path) -> tuple[list[str], list[str]]:
        base, new = model(), model()
        change(new)
        paths = [written(folder / "a.safetensors", base), written(folder / "b.safetensors", new)]
        return paths, list(options)

    return plant


def _moved(state: dict[str, Tensor]) -> None:
    state[_Q] = state[_Q] + 0.2 * model(seed=1)[_Q]


def _anew(state: dict[str, Tensor]) -> None:
    state |= {name: t for name, t in model(seed=1).items() if name.startswith("layers.")}


def _forged(folder: Path) -> tuple[list[str], list[str]]:
    (_, new), _ = _pair(_moved)(folder)
    manifest = folder / "m.json"
    manifest.write_text(manifest_text(gradscope.manifest(folder / "a.safetensors")))
    return [new], ["--manifest", str(manifest)]


# --- explain --------------------------------------------------------------------------------------

_SIDE = 16
_PREPROCESS = ("--preprocess", f"size={_SIDE}x{_SIDE},image_mean=0.5/0.5/0.5,image_std=1/1/1")


class Net(nn.Module):
    """Three scores of a picture, by a function of the means over two halves of its pixels."""

    def __init__(self, scores: Callable[[Tensor, Tensor], Any], bright: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.register_buffer("bright", bright)
        self.scores = scores

    def forward(self, x: Tensor) -> Any:
        x = self.weight * x
        means = (2 * (x * part).mean((1, 2, 3)) for part in (self.bright, ~self.bright))
        return self.scores(*means)


def _stacked(*scores: Tensor) -> Tensor:
    return torch.stack(scores, 1)


def _linear(bright: Tensor, dark: Tensor) -> Tensor:
    return _stacked(bright, dark, -bright)


def _saturated(bright: Tensor, dark: Tensor) -> Tensor:
    """The answer is where it is bright and the gradient small; elsewhere it is only steep."""
    answer = 5 * torch.tanh(20 * bright) + 0.01 * torch.sin(1000 * dark)
    return _stacked(answer, 0.1 * dark, 0 * bright)


def _heads(bright: Tensor, dark: Tensor) -> dict[str, Tensor]:
    return {"kind": _linear(bright, dark), "colour": _linear(dark.square(), bright.square())}


def _explained(
    scores: Callable[[Tensor, Tensor], Any], *options: str
) -> Callable[[Path], tuple[list[str], list[str]]]:
    def plant(folder: Path) -> tuple[list[str], list[str]]:
        draw = np.random.default_rng(0)
        pixels = draw.integers(0, 128, (_SIDE, _SIDE, 3), dtype=np.uint8)
        bright = draw.permutation(_SIDE * _SIDE).reshape(_SIDE, _SIDE) % 2 == 1
        pixels[bright] |= 128
        Image.fromarray(pixels).save(folder / "i.png")
        net, x = Net(scores, torch.from_numpy(bright)).eval(), torch.zeros(1, 3, _SIDE, _SIDE)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.jit.trace(net, x, strict=False).save(folder / "m.jit")
        inputs = [str(folder / "m.jit"), str(folder / "i.png")]
        return inputs, ["-o", str(folder / "out"), *options]

    return plant


def _saliency(
    scores: Callable[[Tensor, Tensor], Any], target: int = 0, *options: str
) -> Callable[[Path], tuple[list[str], list[str]]]:
    return _explained(scores, *_PREPROCESS, "-m", "saliency", "--target", str(target), *options)


def _faults() -> Mapping[str, Fault]:
    codes = dict.fromkeys(_UNREADABLE, 3)
    return {
        **{
            name: Fault(partial(_checkpoint, name), case.severity, codes.get(name, 1))
            for name, case in CASES.items()
        },
        **{
            name: Fault(partial(_history, name), severity)
            for name, (_, severity, _) in FIRING.items()
        },
        "weight-drift": Fault(_pair(_moved), "medium"),
        "unexpected-change": Fault(_pair(_moved, "--expect-frozen", "layers.1.*"), "high"),
        "missing-change": Fault(_pair(_moved, "--expect-changed", "layers.2.*"), "high"),
        "reinitialized": Fault(_pair(_anew), "high"),
        "tensor-set-changed": Fault(_pair(lambda state: state.pop(_Q)), "medium"),
        "manifest-mismatch": Fault(_forged, "high"),
        "incomplete-attribution": Fault(
            _explained(
                _saturated, *_PREPROCESS, "-m", "integrated-gradients", "--target", "0",
                "--steps", "1",
            ),
            "high",
        ),
        "degenerate-map": Fault(_saliency(_saturated, 2), "medium"),
        "unfaithful": Fault(_saliency(_saturated, 0, "--evaluate"), "high"),
        "sanity-check-failed": Fault(_saliency(_linear, 0, "--evaluate"), "medium"),
        "low-confidence": Fault(_saliency(_saturated, 1), "low"),
        "assumed-preprocessing": Fault(_explained(_linear, "-m", "saliency"), "low"),
        "non-finite-output": Fault(
            _saliency(lambda bright, dark: _stacked(bright, dark / 0, bright)), "critical"
        ),
        "ambiguous-output": Fault(_saliency(_heads), "medium"),
    }  # fmt: skip


_NEEDS = {rule.name: rule.needs for rule in load_rules().values()}
FAULTS = _faults()
