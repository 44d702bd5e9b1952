"""Whether a map depends on the model's parameters and on the picture.

Parameters are drawn anew from the output down (Adebayo et al. 2018, arXiv:1810.03292). What counts
is how alike the raw signed values stay over the whole cascade (Sixt et al. 2020, arXiv:1912.09818),
against how alike they are when the picture changes by what nobody sees: a noisy method differs from
itself, too. Beside it the rise of the map's complexity under random parameters (Hedström et al.
2024, arXiv:2401.06465), and the map's sensitivity (Yeh et al. 2019, arXiv:1901.09392).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from gradscope.attribution.diagnostics import Randomised
from gradscope.attribution.evaluation.similarity import Ranked, complexity

_POINTS = 5
_COPIES = 3
#: What the picture changes by, of the range 0..1.
RADIUS = 0.02


# --- random parameters ----------------------------------------------------------------------------


@contextmanager
def cascade(module: nn.Module, seed: int) -> Iterator[Iterator[str]]:
    """Layer by layer, the last first, with all so far randomised; five times, the last is all.

    Each layer is as before training: matrices and kernels He-normal (a variance of 2 over the
    inputs), biases 0, norms 1, running statistics 0 and 1. With the spread of trained ones a deep
    model's activations die out, and every map is that of its biases. Other parameters (tokens,
    positions, scales) are Gaussian with their own mean and spread, other buffers stay. All are
    restored bit for bit. Nothing is yielded for a module without parameters, such as a frozen
    TorchScript program.
    """
    with _kept(module):
        yield _randomised(_layers(module), seed)


def _randomised(layers: Sequence[tuple[str, dict[str, Tensor]]], seed: int) -> Iterator[str]:
    wanted = set(np.unique(np.linspace(0, len(layers) - 1, _POINTS).round().astype(int)).tolist())
    for number, (name, tensors) in enumerate(layers):
        _redraw(tensors, torch.Generator().manual_seed(seed * 1_000_003 + number))
        if number in wanted:
            yield name


_STATISTICS = ("running_mean", "running_var")


def _layers(module: nn.Module) -> list[tuple[str, dict[str, Tensor]]]:
    """Parameters and running statistics by their module, the last defined first."""
    found: dict[str, dict[str, Tensor]] = {}
    # Other buffers are not weights: a randomised mask of -inf would make every map NaN.
    statistics = ((n, t) for n, t in module.named_buffers() if n.endswith(_STATISTICS))
    for name, tensor in (*module.named_parameters(), *statistics):
        owner, _, role = name.rpartition(".")
        if tensor.is_floating_point():
            found.setdefault(owner, {})[role] = tensor
    return list(reversed(found.items()))


def _redraw(tensors: dict[str, Tensor], generator: torch.Generator) -> None:
    flat = all(tensor.dim() == 1 for tensor in tensors.values())
    norm = flat and {"weight", "bias"} <= tensors.keys()
    for role, tensor in tensors.items():
        if role == "running_mean" or role.endswith("bias"):
            tensor.data.zero_()
        elif role == "running_var" or (norm and role == "weight"):
            tensor.data.fill_(1)
        else:
            drawn = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
            mean, spread = _moments(role, tensor)
            tensor.data.copy_((drawn * spread + mean).to(tensor))


def _moments(role: str, tensor: Tensor) -> tuple[float, float]:
    if role.endswith("weight") and tensor.dim() > 1:
        return 0.0, (2 / tensor[0].numel()) ** 0.5
    values = tensor.detach().double()
    return float(values.mean()), float(values.std()) if tensor.numel() > 1 else 0.0


@contextmanager
def _kept(module: nn.Module) -> Iterator[None]:
    before = [(t, t.detach().clone()) for t in (*module.parameters(), *module.buffers())]
    try:
        yield
    finally:
        for tensor, values in before:
            tensor.data.copy_(values)


def compared(layer: str, values: Tensor, original: Ranked) -> Randomised:
    """A map of the cascade beside the original; correlations are 0 where one is constant."""
    values = torch.nan_to_num(values)
    found = Ranked(values)
    return Randomised(
        layer=layer,
        correlation=found.correlation(original),
        magnitude_correlation=found.magnitudes.correlation(original.magnitudes),
        constant=is_constant(values),
    )


def is_constant(values: Tensor, rounding: float = 1e-6) -> bool:
    """Whether a map's range is within rounding of its greatest magnitude."""
    low, high = float(values.min()), float(values.max())
    return not high - low > rounding * max(abs(low), abs(high))


def similarity(cascade: Sequence[Randomised], original: Tensor) -> float | None:
    """The mean correlation over the cascade's maps.

    Constant ones are left out: they come from a network that random parameters have silenced, and
    would excuse the others. 0 where all are. None for a map that is constant itself, and without a
    cascade.
    """
    if not cascade or is_constant(original):
        return None
    told = [point.correlation for point in cascade if not point.constant]
    return float(np.mean(told)) if told else 0.0


def complexity_rise(original: Tensor, randomised: Tensor) -> float | None:
    """(H(randomised) - H(original)) / H(original), H the entropy of a map's histogram.

    None where the original is constant.
    """
    before = complexity(original)
    return (complexity(randomised) - before) / before if before > 0 else None


# --- other pictures -------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False, slots=True)
class Others:
    """Maps of other pictures: copies that nobody could tell apart, and one of noise."""

    copies: Tensor
    noise: Tensor

    def repeatability(self, original: Ranked) -> float:
        """The mean rank correlation of the map with those of the copies."""
        return float(np.mean([Ranked(copy).correlation(original) for copy in self.copies]))

    def unmoved(self, original: Ranked) -> float:
        """The rank correlation of the map with that of noise: 1 if the picture does not matter."""
        return Ranked(self.noise).correlation(original)

    def sensitivity(self, original: Tensor) -> float | None:
        """The greatest |phi(x + e) - phi(x)| / |phi(x)| (L2) over the copies.

        None where the map is all zeros, or a map is not finite.
        """
        size = float(torch.linalg.vector_norm(original.double()))
        if size == 0:
            return None
        change = (self.copies.double() - original.double()).flatten(1)
        worst = torch.linalg.vector_norm(change, dim=1).max() / size
        return float(worst) if torch.isfinite(worst) else None


def other_pictures(inputs: Tensor, radius: Tensor, seed: int) -> Tensor:
    """Copies of a picture [1, C, H, W] within ``radius`` [C, 1, 1], uniform; the last is noise.

    The noise has each channel's mean and spread.
    """
    generator = torch.Generator().manual_seed(seed + 2)
    shape = (_COPIES, *inputs.shape[1:])
    change = (2 * torch.rand(shape, generator=generator) - 1).to(inputs) * radius
    noise = torch.randn(inputs.shape, generator=generator).to(inputs)
    spread, mean = torch.std_mean(inputs, (2, 3), keepdim=True)
    return torch.cat([inputs + change, noise * spread.nan_to_num() + mean])
