"""How much a map can be trusted, measured on its model.

Insertion and deletion (Petsiuk et al. 2018, arXiv:1806.07421), sensitivity (Yeh et al. 2019,
arXiv:1901.09392) and parameter randomisation (Adebayo et al. 2018, arXiv:1810.03292). An area
under a curve means nothing by itself, so each has a control: the same map at random positions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from gradscope.attribution.blur import gaussian_blur
from gradscope.attribution.result import Control, Randomised
from gradscope.attribution.subject import Subject

_STEPS = 16
#: Random orders of equal pixels, and random positions of the control.
_TIES, _PLACES = 3, 5
_POINTS = 6
_SAMPLES = 6
_STATISTICS = ("running_mean", "running_var")
#: Of the image's range 0..1.
RADIUS = 0.02


# --- insertion and deletion -----------------------------------------------------------------------


def ordered(values: Tensor, generator: torch.Generator) -> Tensor:
    """Indices of the flattened map [H, W], greatest value first; equal values in random order."""
    mixed = torch.randperm(values.numel(), generator=generator)
    by_value = torch.argsort(values.flatten()[mixed], descending=True, stable=True)
    return mixed[by_value]


def area(curve: Sequence[float]) -> float:
    """The trapezoid rule over 0..1, the fraction of pixels; independent of the number of steps."""
    return float(np.trapezoid(curve, dx=1 / (len(curve) - 1)))


def insertion_deletion(
    subject: Subject, order: Tensor, steps: int = _STEPS
) -> tuple[list[float], list[float]]:
    """The target's probability while an image's pixels are inserted, and while they are deleted.

    Pixels come in ``order``; they replace the blurred image, or are replaced by the mean colour.
    Each curve has ``steps`` + 1 points, from no pixel to all.
    """
    image = subject.inputs[0]
    height, width = image.shape[1:]
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order))
    rank = rank.view(height, width).to(image.device)
    counts = torch.linspace(0, len(order), steps + 1).round().long().to(image.device)
    side = min(height, width) / 224
    blurred = gaussian_blur(image, sigma=max(1.0, 5 * side))
    nothing = torch.zeros_like(image)

    def points(which: Tensor, _images: Tensor) -> Tensor:
        inserting = (which <= steps)[:, None, None, None]
        moved = (rank < counts[which % (steps + 1), None, None])[:, None]
        return torch.where(
            inserting, torch.where(moved, image, blurred), torch.where(moved, nothing, image)
        )

    found = subject.scores(points, 2 * (steps + 1), subject.probability)
    answers = torch.cat([scores for _, _, scores in found]).double().tolist()
    return answers[: steps + 1], answers[steps + 1 :]


def areas(subject: Subject, values: Tensor, seed: int) -> tuple[float, float, float, float]:
    """Insertion and deletion areas of a map [H, W], and their spreads over orders of ties."""
    generator = torch.Generator().manual_seed(seed)
    flat = values.detach().float().cpu()
    # A few ties move a curve by less than one step.
    orders = _TIES if flat.unique().numel() < 0.99 * flat.numel() else 1
    curves = [insertion_deletion(subject, ordered(flat, generator)) for _ in range(orders)]
    insertion, deletion = (np.array([area(c[i]) for c in curves]) for i in (0, 1))
    return insertion.mean(), deletion.mean(), insertion.std(), deletion.std()


def random_control(subject: Subject, values: Tensor, seed: int) -> Control:
    """The areas of the map at random positions: shifted around the border, and mirrored.

    This keeps the map's texture, which a random order of pixels would not: scattered holes destroy
    a picture faster than any region.
    """
    generator = torch.Generator().manual_seed(seed + 1)
    flat = values.detach().float().cpu()
    found = []
    for _ in range(_PLACES):
        down, across, mirrored = (
            int(torch.randint(0, n, (), generator=generator)) for n in (*flat.shape, 2)
        )
        moved = flat.roll((down, across), (0, 1))
        order = ordered(moved.flip(1) if mirrored else moved, generator)
        found.append([area(curve) for curve in insertion_deletion(subject, order)])
    (insertion, deletion), (i_spread, d_spread) = np.mean(found, 0), np.std(found, 0, ddof=1)
    return Control(
        insertion_auc=insertion,
        deletion_auc=deletion,
        insertion_spread=i_spread,
        deletion_spread=d_spread,
        rankings=_PLACES,
    )


# --- dependence on the model, sensitivity to the input --------------------------------------------


def spearman(a: Tensor, b: Tensor) -> float:
    """Rank correlation, ties sharing their mean rank; 0 where a map is constant."""
    x, y = (_ranks(values) for values in (a, b))
    x, y = x - x.mean(), y - y.mean()
    below = float(np.sqrt((x @ x) * (y @ y)))
    return float(np.clip((x @ y) / below, -1, 1)) if below > 0 else 0.0


def _ranks(values: Tensor) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    flat = values.detach().double().flatten().cpu().numpy()
    _, inverse, counts = np.unique(flat, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    found: np.ndarray[tuple[int], np.dtype[np.float64]] = ((2 * last - counts - 1) / 2)[inverse]
    return found


def randomisation(
    module: nn.Module, attribute: Callable[[], Tensor], original: Tensor, seed: int
) -> tuple[Randomised, ...]:
    """How similar to ``original`` the map stays while layers are randomised, from the output down.

    Each layer's parameters become Gaussian with their own mean and standard deviation, running
    statistics 0 and 1; other buffers stay. All are restored bit for bit, after an exception too.
    Empty for a module without parameters, such as a frozen TorchScript program.
    """
    layers = _layers(module)
    wanted = set(np.unique(np.linspace(0, len(layers) - 1, _POINTS).round().astype(int)).tolist())
    found = []
    with _kept(module):
        for number, (name, tensors) in enumerate(layers):
            generator = torch.Generator().manual_seed(seed * 1_000_003 + number)
            for role, tensor in tensors.items():
                _redraw(role, tensor, generator)
            if number in wanted:
                found.append(_compared(name, attribute(), original))
    return tuple(found)


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


def _redraw(role: str, tensor: Tensor, generator: torch.Generator) -> None:
    if role == "running_mean":
        tensor.data.zero_()
    elif role == "running_var":
        tensor.data.fill_(1)
    else:
        spread = tensor.double().std() if tensor.numel() > 1 else torch.zeros(())
        drawn = torch.randn(tensor.shape, generator=generator).to(tensor)
        tensor.data.copy_(drawn * spread.to(tensor) + tensor.double().mean().to(tensor))


@contextmanager
def _kept(module: nn.Module) -> Iterator[None]:
    before = [(t, t.detach().clone()) for t in (*module.parameters(), *module.buffers())]
    try:
        yield
    finally:
        for tensor, values in before:
            tensor.data.copy_(values)


def _compared(layer: str, values: Tensor, original: Tensor) -> Randomised:
    values = torch.nan_to_num(values)
    return Randomised(
        layer=layer,
        correlation=spearman(values, original),
        magnitude_correlation=spearman(values.abs(), original.abs()),
    )


def sensitivity(
    attribute: Callable[[Tensor], Tensor],
    inputs: Tensor,
    original: Tensor,
    radius: Tensor,
    seed: int,
) -> float | None:
    """The greatest |phi(x + e) - phi(x)| / |phi(x)| (L2) for e uniform within ``radius`` [C, 1, 1].

    None where the map is all zeros, or a map is not finite.
    """
    size = float(torch.linalg.vector_norm(original.double()))
    if size == 0:
        return None
    generator = torch.Generator().manual_seed(seed + 2)
    worst = original.new_zeros((), dtype=torch.float64)
    for _ in range(_SAMPLES):
        noise = (2 * torch.rand(inputs.shape, generator=generator) - 1).to(inputs) * radius
        change = attribute(inputs + noise).double() - original.double()
        # Python's max() would skip NaN and call the map perfectly stable.
        worst = torch.maximum(worst, torch.linalg.vector_norm(change) / size)
    return float(worst) if torch.isfinite(worst) else None


# --- one map, several maps ------------------------------------------------------------------------


def concentration(values: Tensor) -> float | None:
    """The share of |map| in the strongest tenth of the pixels; None where the map is all zeros."""
    size = values.detach().double().abs().flatten()
    total = float(size.sum())
    if not np.isfinite(total) or total == 0:
        return None
    return float(size.topk(max(1, round(size.numel() / 10))).values.sum()) / total


def agreement(maps: Mapping[str, Tensor]) -> dict[str, dict[str, float]]:
    """Rank correlations between one image's maps, of their positive parts."""
    shown = {name: values.clamp(min=0) for name, values in maps.items()}
    return {
        name: {other: spearman(a, b) for other, b in shown.items() if other != name}
        for name, a in shown.items()
    }
