"""How a layer's output lies over the image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

Kind = Literal["maps", "channels-last", "tokens", "tokens-first"]

#: Class, distillation and register tokens are no more than this.
_MOST_PREFIX_TOKENS = 16


@dataclass(frozen=True, slots=True)
class Layout:
    """How a layer's output lies over the image.

    ``maps`` is [N, C, h, w], ``channels-last`` [N, h, w, C], ``tokens`` [N, prefix + h w, C] and
    ``tokens-first`` [prefix + h w, N, C]; prefix tokens (class, registers) have no position.
    """

    kind: Kind
    grid: tuple[int, int]
    prefix: int = 0

    @property
    def channel_dim(self) -> int:
        """The dimension of the channels."""
        return 1 if self.kind == "maps" else -1

    @property
    def batch_dim(self) -> int:
        """The dimension of the images."""
        return 1 if self.kind == "tokens-first" else 0

    def maps(self, values: Tensor) -> Tensor:
        """An output of the layer as [N, C, h, w]."""
        if self.kind == "maps":
            return values
        if self.kind == "channels-last":
            return values.movedim(-1, 1)
        tokens = values.transpose(0, 1) if self.kind == "tokens-first" else values
        tokens = tokens[:, self.prefix :].transpose(1, 2)
        return tokens.reshape(*tokens.shape[:2], *self.grid)

    def __str__(self) -> str:
        grid = f"{self.grid[0]}×{self.grid[1]}"
        if self.kind == "maps":
            return f"maps {grid}"
        if self.kind == "channels-last":
            return f"maps {grid}, channels last"
        return f"tokens {grid}" + (f" + {self.prefix} without a position" if self.prefix else "")


def layout_of(shape: Sequence[int], images: Sequence[int]) -> Layout | None:
    """How an output of ``shape`` lies over inputs [N, C, H, W]; None where it does not."""
    count, _, height, width = images
    if len(shape) == 4 and shape[0] == count:
        if _covers(shape[2], shape[3], height, width):
            return Layout("maps", (shape[2], shape[3]))
        if _covers(shape[1], shape[2], height, width):
            return Layout("channels-last", (shape[1], shape[2]))
    if len(shape) == 3:
        for kind, batch, length in (("tokens", 0, 1), ("tokens-first", 1, 0)):
            found = _grid(shape[length], height, width) if shape[batch] == count else None
            if found is not None:
                return Layout(kind, found, shape[length] - found[0] * found[1])  # type: ignore[arg-type]
    return None


def _covers(h: int, w: int, height: int, width: int) -> bool:
    """Whether a grid has the image's aspect, as far as rounding and borders allow."""
    if not (1 <= h <= height and 1 <= w <= width):
        return False
    down, across = height / h, width / w
    return abs(down - across) <= 0.3 * max(down, across) or abs(h - w * height / width) <= 1


def _grid(tokens: int, height: int, width: int) -> tuple[int, int] | None:
    """The grid of square patches with the fewest tokens left over for the prefix."""
    best: tuple[int, tuple[int, int]] | None = None
    for patch in range(1, min(height, width) // 2 + 1):
        for grid in {(height // patch, width // patch), (-(-height // patch), -(-width // patch))}:
            prefix = tokens - grid[0] * grid[1]
            if 0 <= prefix <= min(_MOST_PREFIX_TOKENS, tokens // 2) and (
                not best or prefix < best[0]
            ):
                best = (prefix, grid)
    return best[1] if best else None
