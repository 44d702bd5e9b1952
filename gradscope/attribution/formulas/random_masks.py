"""RISE's random masks (Petsiuk et al. 2018): coarse grids, upsampled by a cell more, and cropped.

Upsampling is linear along each axis, so that a mask is U C V' with a grid C of cells and one matrix
for each axis and shift: sums over masks, and what is expected of them, are products of small
matrices.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool1d, interpolate

#: Masks whose pixels are held at a time.
_AT_ONCE = 64
#: Blocks along an axis into which masks are summed up, at most.
_BLOCKS = 7


@dataclass(frozen=True, eq=False, slots=True)
class Family:
    """All masks of a grid over images of a size."""

    grid: int
    #: Fraction of the cells that a mask keeps.
    keep: float
    #: [shifts, H, grid] and [shifts, W, grid]: the cells' shares of each row and column.
    rows: Tensor
    columns: Tensor

    def drawn(self, seeds: Sequence[int]) -> Masks:
        """A mask for each seed, drawn on the CPU by a generator of its own."""
        found = [self._cells(seed) for seed in seeds]
        cells, tops, lefts = (torch.stack(part) for part in zip(*found, strict=True))
        device = self.rows.device
        return Masks(self, cells.to(self.rows), tops.to(device), lefts.to(device))

    @property
    def blocks(self) -> tuple[Tensor, Tensor]:
        """The same as ``rows`` and ``columns``, means over blocks of pixels [shifts, B, grid]."""
        most = min(self.grid, _BLOCKS)
        rows, columns = (
            adaptive_avg_pool1d(shares.mT, min(most, shares.shape[1])).mT
            for shares in (self.rows, self.columns)
        )
        return rows, columns

    def expected(self, slopes: Tensor) -> Tensor:
        """E[v M] / keep where v is the blocks of M less keep, times slopes [K, B B]: [K, H, W]."""
        # Cells are independent, and so are the shifts along the axes.
        down, across = (
            torch.einsum("thg,tbg->hb", shares, means) / len(shares)
            for shares, means in zip((self.rows, self.columns), self.blocks, strict=True)
        )
        table = slopes.view(-1, down.shape[1], across.shape[1])
        return (1 - self.keep) * (down @ table @ across.mT)

    def _cells(self, seed: int) -> tuple[Tensor, Tensor, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        cells = torch.rand((self.grid, self.grid), generator=generator) < self.keep
        top = torch.randint(0, len(self.rows), (), generator=generator)
        return cells, top, torch.randint(0, len(self.columns), (), generator=generator)


def family(grid: int, keep: float, like: Tensor) -> Family:
    """The masks of images [N, C, H, W], in their type and on their device."""
    rows, columns = (_shares(grid, length).to(like) for length in like.shape[2:])
    return Family(grid, keep, rows, columns)


def _shares(grid: int, length: int) -> Tensor:
    """How much of each pixel is each cell's, at each shift [shifts, length, grid]."""
    cell = -(-length // grid)
    whole = interpolate(
        torch.eye(grid)[None], size=(grid + 1) * cell, mode="linear", align_corners=False
    )[0]
    return whole.unfold(1, length, 1)[:, :cell].permute(1, 2, 0)


@dataclass(frozen=True, eq=False, slots=True)
class Masks:
    """Masks of a family, as grids of cells [M, grid, grid] and shifts [M] along both axes."""

    family: Family
    cells: Tensor
    tops: Tensor
    lefts: Tensor

    def __getitem__(self, which: Tensor) -> Masks:
        return Masks(self.family, self.cells[which], self.tops[which], self.lefts[which])

    def pixels(self) -> Tensor:
        """What each mask leaves of each pixel [M, H, W], 0 to 1."""
        rows, columns = self.family.rows[self.tops], self.family.columns[self.lefts]
        return rows @ self.cells @ columns.mT

    def blocks(self) -> Tensor:
        """The mean of each mask over blocks of pixels [M, B, B]."""
        rows, columns = self.family.blocks
        return rows[self.tops] @ self.cells @ columns[self.lefts].mT

    def summed_squares(self, weights: Tensor) -> Tensor:
        """The sums of the masks' squares with weights [K, M]: [K, H, W]."""
        size = self.family.rows.shape[1], self.family.columns.shape[1]
        found = weights.new_zeros((len(weights), *size))
        for part in torch.arange(len(self.tops), device=weights.device).split(_AT_ONCE):
            found += torch.tensordot(weights[:, part], self[part].pixels().square(), 1)
        return found

    def summed(self, weights: Tensor) -> Tensor:
        """The masks' sums with weights [K, M]: [K, H, W]."""
        rows, columns = self.family.rows, self.family.columns
        each = weights.new_zeros((len(rows), len(weights), self.family.grid, columns.shape[1]))
        for top in self.tops.unique():
            here = self.tops == top
            wide = self.cells[here] @ columns[self.lefts[here]].mT
            each[top] = torch.tensordot(weights[:, here], wide, 1)
        return torch.einsum("thg,tkgw->khw", rows, each)
