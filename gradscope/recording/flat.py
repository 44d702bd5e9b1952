"""Parameters on the CPU, measured together: their elements side by side, read by compiled loops."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any

import numpy as np
import torch

from gradscope.histories.history import Status
from gradscope.histories.sketching import WIDTH, seed_of
from gradscope.recording import measure
from gradscope.recording.kernels import lengths, sketches, statistics, steps
from gradscope.recording.shards import Part, status_of

Tensor = torch.Tensor
Array = np.ndarray[Any, Any]

#: In the order in which the loops give them.
CELLS = ("grad/l2", "grad/max_abs", "nonzero", "grad/n_nan", "grad/n_inf", "param/l2")
FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def fits(parameter: Tensor) -> bool:
    """Whether a parameter, and a gradient if it has one, can be among them."""
    plain = parameter.device.type == "cpu" and type(parameter.data) is Tensor
    gradient = parameter.grad
    return (
        plain
        and parameter.dtype in FLOATS
        and parameter.layout == torch.strided
        and (gradient is None or gradient.layout == torch.strided)
    )


class FlatLot:
    """Some parameters of one optimizer whose elements lie side by side.

    ``rows`` are theirs in the file. Holds a copy of the gradients, from which sketches and inner
    products are taken (clipping changes the gradients themselves), one of the weights before a
    step, and a byte an element for the sketches.
    """

    sharded = False

    def __init__(
        self, owner: int, rows: Sequence[int], names: Sequence[str],
        parameters: Sequence[Tensor], directions: bool,
    ) -> None:  # fmt: skip
        self.owner, self.rows = owner, np.array(rows, dtype=np.int64)
        self._parameters = list(parameters)
        sizes = [p.numel() for p in parameters]
        self._begin = np.array([0, *accumulate(sizes)], dtype=np.int64)
        wide = any(p.dtype == torch.float64 for p in parameters)
        self._dtype = torch.float64 if wide else torch.float32
        self._gradients, self._views = self._buffer()
        integer = np.int64 if wide else np.int32
        self._bits = self._gradients.view(integer)
        #: The mask that takes the sign off a number's bits, and the bits of infinity.
        self._codes = (
            integer(np.iinfo(integer).max),
            np.array(np.inf, self._gradients.dtype).view(integer)[()],
        )
        self._weights: Array | None = None
        self._copies: list[Tensor] = []
        self._recorded = np.full(len(rows), Status.RECORDED, dtype=np.uint8)
        self._hashes = _Hashes(names, sizes) if directions else None

    def _buffer(self) -> tuple[Array, list[Tensor]]:
        flat = torch.zeros(int(self._begin[-1]), dtype=self._dtype)
        parts = torch.split(flat, np.diff(self._begin).tolist())
        return flat.numpy(), [v.view(p.shape) for v, p in zip(parts, self._parameters, strict=True)]

    def take(self, *, whole: bool, counted: bool, updates: bool) -> Part | None:  # noqa: ARG002
        """The gradients' statistics as they are now; None when one is no longer plain.

        Only norms and directions unless ``whole``; the weights are kept for ``after`` when
        ``updates``. NaN and infinite elements are counted in any case.
        """
        gradients = [p.grad for p in self._parameters]
        there = [g for g in gradients if g is not None]
        if any(g.layout is not torch.strided for g in there):
            return None
        missing = len(there) < len(gradients)
        self._copy(gradients, there, whole)
        out = np.empty((len(self.rows), 6))
        statistics(self._gradients, self._bits, *self._codes, self._begin, out)
        status = status_of(self._parameters) if missing else self._recorded
        part = Part(self.owner, self.rows, status)
        if whole:
            lengths(self._weights, self._begin, out[:, 5])
        if missing:
            out[status != Status.RECORDED] = np.nan
        names = CELLS if whole else CELLS[:1]
        part.cells = dict(zip(names, out.T, strict=False))
        if self._hashes is not None:
            part.sketch = self._hashes.sketches(self._gradients, self._begin, out[:, 0])
        if whole and updates:
            part.measured = self
        return part

    def _copy(self, gradients: Sequence[Tensor | None], there: list[Tensor], weights: bool) -> None:
        """The gradients, zero where there is none, and the weights, in one call."""
        views = self._views
        if len(there) < len(gradients):
            views = [v for v, g in zip(views, gradients, strict=True) if g is not None]
            torch._foreach_zero_(self._views)
        if weights and self._weights is None:
            self._weights, self._copies = self._buffer()
        if weights:
            views, there = [*views, *self._copies], [*there, *self._parameters]
        if there:
            torch._foreach_copy_(views, there)

    def after(self, part: Part) -> None:
        """Add what the step changed to a record's part."""
        # In place: minus the change, whose cosine with the gradient is that with its negative.
        torch._foreach_sub_(self._copies, self._parameters)
        out = np.empty((len(self.rows), 2))
        steps(self._weights, self._gradients, self._begin, part.cells["grad/l2"], out)
        if part.status is not self._recorded:
            out[part.status != Status.RECORDED] = np.nan
        part.cells["update/l2"], part.cells["update/grad_cos"] = out.T


class _Hashes:
    """A bucket for each element that is sketched."""

    def __init__(self, names: Sequence[str], sizes: Sequence[int]) -> None:
        subsets = [measure.subset(name, size) for name, size in zip(names, sizes, strict=True)]
        counts = [n if s is None else len(s) for n, s in zip(sizes, subsets, strict=True)]
        self._at = np.array([0, *accumulate(counts)], dtype=np.int64)
        parted = [0 if s is None else len(s) for s in subsets]
        self._chosen_at = np.array([0, *accumulate(parted)], dtype=np.int64)
        whole = [s.numpy() for s in subsets if s is not None]
        self._chosen = np.concatenate(whole) if whole else np.empty(0, np.int64)
        self._buckets = np.empty(int(self._at[-1]), np.uint8)
        for row, (name, size) in enumerate(zip(names, sizes, strict=True)):
            first = int(self._at[row])
            for begin, index in _pieces(subsets[row], size):
                place = slice(first + begin, first + begin + len(index))
                self._buckets[place] = measure.buckets(index, seed_of(name))

    def sketches(self, gradients: Array, begin: Array, norms: Array) -> Array:
        """Float32 [rows, k], of unit gradients; zero where there is no direction."""
        out = np.empty((len(norms), WIDTH), np.float32)
        sketches(
            gradients, begin, self._buckets, self._at, self._chosen, self._chosen_at, norms, out
        )
        return out


#: Elements hashed at a time.
_PIECE = 1 << 20


def _pieces(chosen: Tensor | None, size: int) -> Iterator[tuple[int, Array]]:
    count = size if chosen is None else len(chosen)
    for begin in range(0, count, _PIECE):
        end = min(begin + _PIECE, count)
        yield begin, np.arange(begin, end) if chosen is None else chosen[begin:end].numpy()
