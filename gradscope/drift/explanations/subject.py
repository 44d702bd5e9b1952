"""What an explanation is sought of: two tensors of one shape, and all that is known of them."""

from __future__ import annotations

from dataclasses import dataclass

from gradscope.checkpoints.tensors import TensorRef
from gradscope.drift import kernels
from gradscope.drift.measures import Measures
from gradscope.quantization.weights import QuantizedWeight
from gradscope.statistics.dtypes import FORMATS

#: Sums of squares that are equal but for the order of summing.
_EQUAL = 1e-9


@dataclass(frozen=True, slots=True)
class Parent:
    """The same tensor in a checkpoint that the new one may be mixed from."""

    label: str
    ref: TensorRef


@dataclass(frozen=True, slots=True)
class Subject:
    """Two tensors of one shape, what was measured of them, and whether either is quantised."""

    base: TensorRef
    new: TensorRef
    measures: Measures
    quantized: QuantizedWeight | None = None
    #: Whether training moves it, and it so has a past that can be lost.
    trained: bool = True
    parents: tuple[Parent, ...] = ()

    @property
    def floats(self) -> bool:
        """Whether both have real floating-point elements."""
        return self.base.dtype in FORMATS and self.new.dtype in FORMATS

    @property
    def coarser(self) -> float:
        """Half the relative distance of the values of the type of fewer mantissa bits."""
        bits = min(FORMATS[r.dtype].mantissa_bits for r in (self.base, self.new))
        return 2.0 ** -(bits + 1)

    @property
    def rearranged(self) -> bool:
        """Whether it may hold the base's elements in other places."""
        m = self.measures
        a, b = m.sums[kernels.SQUARES_BASE], m.sums[kernels.SQUARES_NEW]
        cosine = m.cosine
        return cosine is not None and cosine < 0.999 and abs(a - b) <= _EQUAL * a
