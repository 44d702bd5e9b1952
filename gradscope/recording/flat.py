"""Parameters on the CPU, measured together: read where they are, by compiled loops."""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from gradscope.histories.history import Status
from gradscope.histories.sketching import WIDTH
from gradscope.recording.buckets import Buckets
from gradscope.recording.kernels import changed, taken
from gradscope.recording.records import Part, status_of

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
    gradient = parameter.grad
    return (
        parameter.device.type == "cpu"
        and type(parameter.data) is Tensor
        and parameter.dtype in FLOATS
        and parameter.layout == torch.strided
        and (gradient is None or gradient.layout == torch.strided)
    )


class FlatLot:
    """Some parameters of one optimizer that are plain numbers in this host's memory.

    ``rows`` are theirs in the file. Holds a byte an element for the sketches, room for a copy of
    the gradients (clipping changes them before the step whose cosine with them is taken) and of the
    weights before a step. What the loops cannot read where it is, being of half precision or out of
    order, is copied once more while it is measured.
    """

    sharded = False

    def __init__(
        self, owner: int, rows: Sequence[int], names: Sequence[str],
        parameters: Sequence[Tensor], directions: bool, updates: bool,
    ) -> None:  # fmt: skip
        self.owner, self.rows = owner, np.array(rows, dtype=np.int64)
        self._parameters, sizes = list(parameters), [p.numel() for p in parameters]
        #: Of gradients, then of weights.
        self._sizes = [*sizes, *sizes]
        wide = any(p.dtype == torch.float64 for p in parameters)
        self._dtype = torch.float64 if wide else torch.float32
        self._nothing = np.empty(0, np.float64 if wide else np.float32)
        self._updates = updates
        #: Gradients and weights as they were before a step.
        self._kept = self._before = self._nothing
        #: The bits of infinity, as an integer that is as wide as the numbers.
        bits = np.array([np.inf], self._nothing.dtype).view(f"i{self._nothing.itemsize}")
        self._infinity = bits[0]
        self._recorded = np.full(len(rows), Status.RECORDED, dtype=np.uint8)
        #: The addresses of gradients, then of weights; an array.array is quickest to fill.
        self._addresses = array("q", bytes(16 * len(rows)))
        self._places = np.frombuffer(self._addresses, np.int64).reshape(2, -1)
        self._block, self._slot = np.empty((0, 0, 0), np.float32), -1
        self._buckets = Buckets(names, sizes, WIDTH if directions else 0)

    def take(self, whole: bool, counted: bool) -> Part | None:  # noqa: ARG002
        """The gradients' statistics as they are now; None when they no longer fit.

        NaN and infinite elements are counted in any case.
        """
        gradients = [p.grad for p in self._parameters]
        copies = self._find([*gradients, *self._parameters] if whole else gradients, 0)
        if copies is None:
            return None
        kept = whole and self._updates
        if kept and self._kept is self._nothing:
            self._kept, self._before = np.empty((2, sum(self._sizes) // 2), self._nothing.dtype)
        if self._slot + 1 >= len(self._block):
            self._make_room()
        self._slot += 1
        lacking = taken(
            self._places, self._buckets.begin, self._kept, self._before, self._infinity,
            self._buckets.words, self._buckets.chosen, whole, kept, self._block, self._slot,
        )  # fmt: skip
        status = status_of(self._parameters) if lacking else self._recorded
        part = Part(self.owner, self.rows, status, self._block, self._slot, self if kept else None)
        if lacking:
            _blank(part)
        return part

    def after(self, part: Part) -> None:
        """Add what the step changed to a record's part."""
        copies = self._find(self._parameters, len(self._parameters))
        if copies is None or part.block is None:
            return
        changed(
            self._places, self._buckets.begin, self._kept, self._before, part.block, part.slot
        )  # fmt: skip
        if part.status is not self._recorded:
            _blank(part)

    def _make_room(self) -> None:
        """A block for the next records."""
        shape = len(self.rows), len(CELLS) + self._buckets.width
        self._block = np.empty((max(1, _BLOCK // math.prod(shape)), *shape), np.float32)
        self._slot = -1

    def _find(self, tensors: Sequence[Tensor | None], first: int) -> list[Tensor] | None:
        """Set where tensors are, from a place on; None when one is not what it was.

        What is returned is to be held on to while the loops read.
        """
        kind, places, copies = self._dtype, self._addresses, []
        for i, (tensor, size) in enumerate(zip(tensors, self._sizes, strict=False), first):
            if tensor is None:
                places[i] = 0
                continue
            if tensor.numel() != size:
                return None
            if tensor.dtype is not kind or not tensor.is_contiguous():
                if tensor.layout is not torch.strided:
                    return None
                tensor = tensor.detach().to(kind).contiguous()
                copies.append(tensor)
            places[i] = tensor.data_ptr()
        return copies


def _blank(part: Part) -> None:
    """Take out the numbers of rows without a gradient."""
    assert part.block is not None
    part.block[part.slot, part.status != Status.RECORDED, : len(CELLS)] = np.nan
