"""Reference inputs of integrated gradients and their relatives, by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from gradscope.attribution.formulas.blur import gaussian_blur
from gradscope.attribution.subject import Subject
from gradscope.errors import UsageError


def references(
    subject: Subject, wanted: str | Tensor | Sequence[Tensor], draws: int = 1
) -> list[Tensor]:
    """Inputs [N, C, H, W] to start from: those given, or ``draws`` of them where they are random.

    Names describe pixels, which are then normalised: ``black`` 0, ``white`` 1, ``mean`` the image
    that becomes zeros, ``blurred`` the image itself under a Gaussian, ``random`` uniform noise.

    Raises UsageError for an unknown name, a tensor of another shape, and a name that needs a
    normalisation that is not known.
    """
    if not isinstance(wanted, str):
        several = [wanted] if isinstance(wanted, Tensor) else wanted
        return [_fitting(subject, one) for one in several]
    if wanted not in _NAMED:
        offered = ", ".join(_NAMED)
        raise UsageError(f"unknown reference {wanted!r}; it is one of {offered}, or an image")
    if draws < 1:
        raise UsageError("draws has to be at least 1")
    return [_NAMED[wanted](subject, draw) for draw in range(draws if wanted == "random" else 1)]


def _fitting(subject: Subject, given: Tensor) -> Tensor:
    try:
        return given.to(subject.inputs).expand_as(subject.inputs)
    except RuntimeError:
        raise UsageError(
            f"the reference has shape {list(given.shape)}, the inputs {list(subject.inputs.shape)}"
        ) from None


def _normalised(subject: Subject, pixels: Tensor) -> Tensor:
    if subject.mean is None or subject.std is None:
        raise UsageError(
            "which input is black, white or random depends on the normalisation: give mean= and "
            "std=, or the reference as a tensor"
        )
    mean, std = (t.to(subject.inputs).view(-1, 1, 1) for t in (subject.mean, subject.std))
    return (pixels.to(subject.inputs) - mean) / std


def pixel_range(subject: Subject) -> tuple[Tensor, Tensor]:
    """Black and white [1, C, H, W]: the least and the greatest inputs that a picture can become.

    Raises UsageError where the normalisation is not known.
    """
    return _black(subject, 0)[:1], _white(subject, 0)[:1]


def _black(subject: Subject, _draw: int) -> Tensor:
    return _normalised(subject, torch.zeros_like(subject.inputs))


def _white(subject: Subject, _draw: int) -> Tensor:
    return _normalised(subject, torch.ones_like(subject.inputs))


def _mean(subject: Subject, _draw: int) -> Tensor:
    return torch.zeros_like(subject.inputs)


def _blurred(subject: Subject, _draw: int) -> Tensor:
    # A blur is linear and keeps constants, so it may follow the normalisation. A twentieth of the
    # side leaves colours and no shapes.
    return gaussian_blur(subject.inputs, sigma=max(1.0, min(subject.inputs.shape[2:]) / 20))


def _random(subject: Subject, draw: int) -> Tensor:
    generator = torch.Generator().manual_seed(subject.seed * 1_000_003 + draw)
    # The same for every image: which images share a batch changes no map.
    drawn = torch.rand(subject.inputs.shape[1:], generator=generator)
    return _normalised(subject, drawn.expand_as(subject.inputs))


_NAMED: Mapping[str, Callable[[Subject, int], Tensor]] = {
    "black": _black,
    "white": _white,
    "mean": _mean,
    "blurred": _blurred,
    "random": _random,
}

#: The names that ``--reference`` takes.
NAMES = tuple(_NAMED)
