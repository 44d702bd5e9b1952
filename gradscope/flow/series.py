"""The series that are analysed: a history's rows as layers, without scale where there is one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from gradscope.flow.robust import Array, nanmedian
from gradscope.histories.history import Exact, History, Kind, Layer, Sketches, Status

Mask = NDArray[np.bool_]

#: Gradients of different kinds differ by what they are summed over, so a layer is compared with
#: its own kind; weights of any shape are one kind.
GROUPS: Mapping[Kind, str] = {
    "matrix": "weight",
    "conv": "weight",
    "other": "weight",
    "bias": "bias",
    "norm": "norm",
    "embedding": "embedding",
}
_RECORDS = 64
ADAPTIVE = ("adam", "adamw", "adamax", "nadam", "radam", "rmsprop", "adagrad", "adadelta", "lamb")


@dataclass(frozen=True, eq=False)
class Series:
    """T records of L layers, float64 [T, L], NaN where there is no finite value.

    ``norm`` is the gradient's L2 norm, ``rms`` that over the root of the number of elements (or
    the norm itself when ``per_element`` is False: sizes are unknown), ``update_ratio`` the norm of
    a step's change over that of the weights.
    """

    history: History
    layers: tuple[Layer, ...]
    steps: NDArray[np.int64]
    norm: Array
    rms: Array
    per_element: bool
    status: NDArray[np.uint8]
    #: Gradients with NaN or Inf elements.
    nonfinite: Mask
    zero_fraction: Array | None
    update_ratio: Array | None
    edges: NDArray[np.int64] | None
    sketches: Sketches | None
    exact: Exact | None
    #: The history's rows that each layer is joined from.
    parts: tuple[tuple[int, ...], ...] = ()

    @cached_property
    def log_rms(self) -> Array:
        """Natural logarithm of ``rms``; minus infinity for a gradient of zero."""
        with np.errstate(divide="ignore"):
            logs: Array = np.log(self.rms)
        return logs

    @cached_property
    def finite_log(self) -> Array:
        """``log_rms`` with NaN for gradients of zero."""
        infinite = np.isinf(self.log_rms)
        return np.where(infinite, np.nan, self.log_rms) if infinite.any() else self.log_rms

    @cached_property
    def median_log(self) -> Array:
        """Median over the layers of ``finite_log``, [T]: how the network as a whole does."""
        median: Array = nanmedian(self.finite_log, axis=1)
        return median

    @cached_property
    def total(self) -> Array:
        """L2 norm of all known layers together, [T]; a few records at a time stay in the cache."""
        squares = np.empty(len(self.norm))
        for first in range(0, len(squares), _RECORDS):
            part = slice(first, first + _RECORDS)
            squares[part] = np.nansum(self.norm[part] ** 2, axis=1)
        return np.sqrt(squares)

    @cached_property
    def median_update(self) -> Array | None:
        """Median over the layers of ``update_ratio``, [T]; None without update norms."""
        return None if self.update_ratio is None else nanmedian(self.update_ratio, axis=1)

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The layers' names."""
        return tuple(layer.name for layer in self.layers)

    @property
    def skipped(self) -> Mask:
        """Records whose step mixed precision skipped, [T]."""
        flags = self.history.skipped
        return np.zeros(len(self.steps), bool) if flags is None else flags.astype(bool)

    @cached_property
    def recorded(self) -> Mask:
        """Where a gradient was there, whatever its value."""
        result: Mask = self.status == Status.RECORDED
        return result

    @cached_property
    def gap(self) -> int:
        """The commonest distance of two records, in steps."""
        if len(self.steps) < 2:
            return 1
        gaps, counts = np.unique(np.diff(self.steps), return_counts=True)
        return int(gaps[np.argmax(counts)])

    @property
    def warm_up(self) -> int:
        """Records at the start that none is compared with: 20 or 5 %, at most a quarter."""
        total = len(self.steps)
        return min(max(20, total // 20), total // 4)

    def group(self, row: int) -> str:
        """What a layer is compared with."""
        return GROUPS[self.layers[row].kind]

    def numel(self, rows: Iterable[int]) -> int | None:
        """Elements of some layers, each storage once; None when the file does not say."""
        sizes = [self.layers[row].numel for row in rows if self.layers[row].tied_to is None]
        return None if any(size is None for size in sizes) else sum(size or 0 for size in sizes)

    @property
    def adaptive_epsilon(self) -> float | None:
        """Epsilon of an optimizer that divides by the gradient's size; None for any other."""
        optimizer = self.history.meta.get("optimizer")
        if not isinstance(optimizer, Mapping):
            return None
        name, eps = str(optimizer.get("class", "")).lower(), optimizer.get("eps")
        known = any(name.endswith(adaptive) for adaptive in ADAPTIVE)
        return float(eps) if known and isinstance(eps, int | float) and eps > 0 else None

    @property
    def half_gradients(self) -> bool:
        """Whether gradients are float16; bfloat16 has the exponents of float32."""
        precision = self.history.meta.get("precision")
        kind = precision.get("grad") if isinstance(precision, Mapping) else None
        return str(kind).removeprefix("torch.") in ("float16", "half", "fp16")

    @property
    def plain_descent(self) -> bool:
        """Whether steps are gradients times a rate: SGD without momentum."""
        return self.proportional and not self.history.meta["optimizer"].get("momentum")

    @property
    def proportional(self) -> bool:
        """Whether steps are as long as the gradients: SGD, also with momentum."""
        optimizer = self.history.meta.get("optimizer")
        if not isinstance(optimizer, Mapping):
            return False
        return str(optimizer.get("class", "")).upper() == "SGD"
