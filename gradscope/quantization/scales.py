"""What scales are called, and the scale of the scales."""

from __future__ import annotations

from dataclasses import dataclass

from gradscope.checkpoints.tensors import TensorRef
from gradscope.quantization.decoding import Factor, Grid
from gradscope.quantization.site import Site

#: What a scale is called after the name of the weight, and beside a tensor called weight.
AFTER = ("_scale_inv", "_scale", "_weight_scale_inv", "_weight_scale", "_scales")
BESIDE = ("scale_weight", "scale_inv", "scale", "scales", "weight_scales")


def weight_scale(site: Site) -> TensorRef | None:
    """The scale of a tensor, or the grid of them."""
    stem = site.leaf.removesuffix("_packed")
    return (
        site.after(*AFTER)
        or site.beside(f"{stem}_scale")
        or (site.beside(*BESIDE) if owns_names(site) else None)
    )


def owns_names(site: Site) -> bool:
    """Whether what is called ``scale`` beside a tensor is its own."""
    return site.leaf in ("weight", "kernel", "w")


@dataclass(frozen=True, slots=True)
class Second:
    """The scale of the scales: one for a tensor, or for each expert."""

    ref: TensorRef
    inverse: bool

    def factor(self, shape: tuple[int, ...]) -> Factor | None:
        """As a factor over a weight of this shape; None where it does not fit."""
        if self.ref.numel == 1:
            grid = Grid(1, own=False)
        elif len(shape) == 3 and self.ref.numel == shape[0] == self.ref.shape[0]:
            grid = Grid(shape[1], shape[1])
        else:
            return None
        return Factor(self.ref, grid, 1, inverse=self.inverse)


def second_scale(site: Site) -> Second | None:
    """ModelOpt stores the factor, compressed-tensors its reciprocal."""
    stem = site.leaf.removesuffix("_packed")
    plain = site.beside(f"{stem}_scale_2", f"{stem}_weight_scale_2")
    if plain is not None:
        return Second(plain, inverse=False)
    inverse = site.beside(f"{stem}_global_scale")
    return None if inverse is None else Second(inverse, inverse=True)
