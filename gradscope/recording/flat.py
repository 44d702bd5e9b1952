"""Parameters on the CPU, measured together: read where they are, by compiled loops."""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any

import numpy as np
import torch

from gradscope.histories.history import Status
from gradscope.histories.sketching import WIDTH, seed_of
from gradscope.recording import measure
from gradscope.recording.kernels import changed, taken
from gradscope.recording.shards import Part, status_of

Tensor = torch.Tensor
Array = np.ndarray[Any, Any]

#: In the order in which the loops give them.
CELLS = (
    "grad/l2", "grad/max_abs", "nonzero", "grad/n_nan", "grad/n_inf", "param/l2", "update/l2",
    "update/grad_cos",
)  # fmt: skip
#: Numbers in a block of records, unless one has more.
_BLOCK = 1 << 18
FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def fits(parameter: Tensor) -> bool:
    """Whether a parameter, and a gradient if it has one, can be among them."""
    plain = parameter.device.type == "cpu" and type(parameter.data) is Tensor
    gradient = parameter.grad
    return (
        plain
        and parameter.dtype in FLOATS
        and parameter.layout == torch.strided
        and (gradient is None or _has(gradient, parameter.numel()))
    )


def _has(tensor: Tensor, size: int) -> bool:
    return tensor.numel() == size and tensor.layout is torch.strided


class FlatLot:
    """Some parameters of one optimizer that are plain numbers in this host's memory.

    ``rows`` are theirs in the file. Holds a byte an element for the sketches, room for a copy of
    the gradients (clipping changes them before the step whose cosine with them is taken) and of the
    weights before a step. Weights that the loops cannot read, being of half precision or out of
    order, are copied once more while they are measured.
    """

    sharded = False

    def __init__(
        self, owner: int, rows: Sequence[int], names: Sequence[str],
        parameters: Sequence[Tensor], directions: bool,
    ) -> None:  # fmt: skip
        self.owner, self.rows = owner, np.array(rows, dtype=np.int64)
        self._parameters, self._sizes = list(parameters), [p.numel() for p in parameters]
        wide = any(p.dtype == torch.float64 for p in parameters)
        self._dtype = torch.float64 if wide else torch.float32
        self._gradients = np.zeros(sum(self._sizes), np.float64 if wide else np.float32)
        self._weights = self._gradients[:0]
        pieces = np.split(self._gradients, np.cumsum(self._sizes)[:-1])
        self._views = [
            torch.from_numpy(piece).view(p.shape)
            for piece, p in zip(pieces, parameters, strict=True)
        ]
        #: The bits of infinity, as an integer that is as wide as the numbers.
        self._infinity = np.array(np.inf, self._weights.dtype).view(f"i{self._weights.itemsize}")[
            ()
        ]
        self._recorded = np.full(len(rows), Status.RECORDED, dtype=np.uint8)
        #: The addresses of gradients, then of weights; an array.array is quickest to fill.
        self._addresses = array("q", bytes(16 * len(rows)))
        self._places = np.frombuffer(self._addresses, np.int64).reshape(2, -1)
        self._block, self._slot = np.empty((0, 0, 0), np.float32), 0
        self._hashes = Hashes(names, self._sizes, WIDTH if directions else 0)

    def take(self, *, whole: bool, counted: bool, updates: bool) -> Part | None:  # noqa: ARG002
        """The gradients' statistics as they are now; None when they no longer fit.

        Only norms and directions unless ``whole``; gradients and weights are kept for ``after``
        when ``updates``. NaN and infinite elements are counted in any case.
        """
        there = self._find_gradients()
        copies = self._find_weights() if whole else []
        if there is None or copies is None:
            return None
        kept = whole and updates
        if kept and len(self._weights) < len(self._gradients):
            self._weights = np.empty_like(self._gradients)
        block, slot = self._room()
        taken(
            self._places, self._hashes.begin, self._gradients, self._weights, self._infinity,
            self._hashes.buckets, self._hashes.chosen, whole, kept, block, slot,
        )  # fmt: skip
        status = self._recorded
        if not there:
            status = status_of(self._parameters)
            block[slot, status != Status.RECORDED, : len(CELLS)] = np.nan
        measured = self if kept else None
        return Part(self.owner, self.rows, status, block=(CELLS, block, slot), measured=measured)

    def after(self, part: Part) -> None:
        """Add what the step changed to a record's part."""
        copies = self._find_weights()
        if copies is not None and part.block is not None:
            _, block, slot = part.block
            changed(self._places, self._hashes.begin, self._gradients, self._weights, block, slot)
            if part.status is not self._recorded:
                block[slot, part.status != Status.RECORDED, : len(CELLS)] = np.nan

    def _room(self) -> tuple[Array, int]:
        """Where the next record goes: a block of records, and a place in it."""
        self._slot += 1
        if self._slot >= len(self._block):
            shape = len(self.rows), len(CELLS) + self._hashes.width
            self._block = np.empty((max(1, _BLOCK // math.prod(shape)), *shape), np.float32)
            self._slot = 0
        return self._block, self._slot

    def _find_gradients(self) -> bool | None:
        """Set where gradients are; whether there are all of them. None when one does not fit."""
        kind, places, there = self._dtype, self._addresses, True
        for i, parameter in enumerate(self._parameters):
            gradient = parameter.grad
            if gradient is None:
                places[i], there = 0, False
            elif not _has(gradient, self._sizes[i]):
                return None
            elif gradient.dtype is kind and gradient.is_contiguous():
                places[i] = gradient.data_ptr()
            else:
                places[i] = self._views[i].copy_(gradient.detach()).data_ptr()
        return there

    def _find_weights(self) -> list[Tensor] | None:
        """Set where weights are, or those copies that are to be held on to. None as above."""
        kind, copies = self._dtype, []
        for i, weight in enumerate(self._parameters):
            if not _has(weight, self._sizes[i]):
                return None
            if not (weight.dtype is kind and weight.is_contiguous()):
                weight = weight.detach().to(kind).contiguous()
                copies.append(weight)
            self._addresses[len(self._sizes) + i] = weight.data_ptr()
        return copies


class Hashes:
    """A bucket for each element that is sketched, in ``width`` numbers; none when that is 0.

    ``begin`` [3, R + 1] is where each row's elements, buckets and chosen elements begin.
    """

    def __init__(self, names: Sequence[str], sizes: Sequence[int], width: int) -> None:
        rows = list(zip(names, sizes, strict=True))
        self.width = width
        subsets = [measure.subset(*row) if width else torch.empty(0) for row in rows]
        counts = [size if s is None else len(s) for size, s in zip(sizes, subsets, strict=True)]
        parted = [0 if s is None else len(s) for s in subsets]
        self.begin = np.array([[0, *accumulate(of)] for of in (sizes, counts, parted)], np.int64)
        whole = [s.numpy() for s in subsets if s is not None and len(s)]
        self.chosen = np.concatenate(whole) if whole else np.empty(0, np.int64)
        self.buckets = np.empty(int(self.begin[1, -1]), np.uint8)
        for (name, size), subset, first in zip(rows, subsets, self.begin[1], strict=False):
            for begin, index in _pieces(subset, size):
                place = slice(first + begin, first + begin + len(index))
                self.buckets[place] = measure.buckets(index, seed_of(name))


#: Elements hashed at a time.
_PIECE = 1 << 20


def _pieces(chosen: Tensor | None, size: int) -> Iterator[tuple[int, Array]]:
    count = size if chosen is None else len(chosen)
    for begin in range(0, count, _PIECE):
        end = min(begin + _PIECE, count)
        yield begin, np.arange(begin, end) if chosen is None else chosen[begin:end].numpy()
