"""Parameters that are measured together: of one optimizer, on one device, sharded alike."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch

from gradscope.recording.flat import FlatLot, fits
from gradscope.recording.measure import Sketcher, dots, elements, local, magnitudes, norms
from gradscope.recording.records import Part, Table, status_of

Tensor = torch.Tensor


class Lot(Protocol):
    """What is measured in one go."""

    owner: int
    rows: np.ndarray[Any, Any]
    sharded: bool

    def take(self, whole: bool, counted: bool) -> Part | None:
        """The statistics of the gradients as they are now; None when they no longer fit.

        Only norms and directions unless ``whole``; ``counted`` is whether NaN and infinite elements
        must be. A part's ``awaits`` is this lot where ``after`` is to be called after the step.
        """

    def after(self, part: Part) -> None:
        """Add what the step changed."""


def lots(
    rows: Sequence[int], names: Sequence[str], parameters: Sequence[Tensor],
    owners: Sequence[int], directions: bool, updates: bool,
) -> Iterator[Lot]:  # fmt: skip
    """The lots of some rows. Sharded gradients have no sketches: each rank has a part of them."""
    found: dict[tuple[Any, ...], list[int]] = {}
    for row in rows:
        parameter = parameters[row]
        if parameter.device.type != "meta":  # there are no values
            flat, shards = fits(parameter), _shards(parameter)
            found.setdefault((owners[row], parameter.device, flat, shards), []).append(row)
    for (owner, device, flat, shards), members in found.items():
        labels, chosen = [names[row] for row in members], [parameters[row] for row in members]
        if flat:
            yield FlatLot(owner, members, labels, chosen, directions, updates)
        else:
            yield DeviceLot(
                owner, members, labels, chosen, device, shards, directions and not shards, updates
            )


class DeviceLot:
    """Some parameters of one optimizer, measured by torch where they are; nothing is waited for."""

    def __init__(
        self, owner: int, rows: Sequence[int], names: Sequence[str], parameters: Sequence[Tensor],
        device: torch.device, shards: Sequence[Any], directions: bool, updates: bool,
    ) -> None:  # fmt: skip
        self.owner, self.rows = owner, np.array(rows, dtype=np.int64)
        self._parameters, self._shards = list(parameters), tuple(shards)
        self.sharded = bool(shards)
        sizes = [p.numel() * (2 if p.is_complex() else 1) for p in parameters]
        self._sketcher = Sketcher(names, sizes, device) if directions else None
        self._updates = updates
        #: Weights and gradients before a step.
        self._copies: list[Tensor] = []
        self._gradients: list[Tensor] = []

    @torch.no_grad()
    def take(self, whole: bool, counted: bool) -> Part:
        """The gradients' statistics as they are now; counting costs a pass."""
        found = {i: _whole(p.grad) for i, p in enumerate(self._parameters) if p.grad is not None}
        part = Part(self.owner, self.rows, status_of(self._parameters), place=list(found))
        if not found:
            return part
        values = [elements(g) for g in found.values()]
        lengths = self._joined(norms(values, 2), "square")
        cells = {"grad/l2": lengths}
        if whole:
            cells |= self._measured(part, list(found.values()), counted)
            if self._updates:
                self._gradients, part.awaits = list(found.values()), self
        part.tables = (_table(cells),)
        if self._sketcher is not None:
            part.sketch = self._sketcher(list(found.values()), lengths, part.place).half()
        return part

    def _measured(
        self, part: Part, gradients: Sequence[Tensor], counted: bool
    ) -> dict[str, Tensor]:
        sizes = [magnitudes(g) for g in gradients]
        cells = {
            "grad/max_abs": self._joined(norms(sizes, math.inf), "max"),
            "nonzero": self._joined(norms(sizes, 0), "sum"),
        }
        # Ranks must agree on what they reduce, and only one of them sees the file.
        if counted or self.sharded:
            nans = torch.stack([torch.isnan(g).sum() for g in sizes])
            infinite = torch.stack([torch.isinf(g).sum() for g in sizes])
            cells["grad/n_nan"] = self._joined(nans.float(), "sum")
            cells["grad/n_inf"] = self._joined(infinite.float(), "sum")
        now = self._weights(part)
        cells["param/l2"] = self._joined(norms(now, 2), "square")
        if [(c.shape, c.dtype) for c in self._copies] != [(n.shape, n.dtype) for n in now]:
            self._copies = [torch.empty_like(n) for n in now]
        torch._foreach_copy_(self._copies, now)
        return cells

    def _weights(self, part: Part) -> list[Tensor]:
        found = [local(self._parameters[i]) for i in part.place]
        return [torch.view_as_real(w) if w.is_complex() else w for w in found]

    @torch.no_grad()
    def after(self, part: Part) -> None:
        """Add what the step changed; the gradients may have been clipped since."""
        torch._foreach_sub_(self._copies, self._weights(part))
        size = self._joined(norms(self._copies, 2), "square")
        values = [elements(g) for g in self._gradients]
        own = self._joined(norms(values, 2), "square")
        turned = [
            _at(c, g) if g.is_sparse else c
            for c, g in zip(self._copies, self._gradients, strict=True)
        ]
        inner = self._joined(dots(turned, values), "sum")
        part.tables += (_table({"update/l2": size, "update/grad_cos": inner / (size * own)}),)
        self._gradients = []

    def _joined(self, values: Tensor, how: str) -> Tensor:
        """Values of sharded rows joined over their shards: [rows] in, the same out."""
        if not self._shards:
            return values
        part = values**2 if how == "square" else values.clone()
        reduce = torch.distributed.ReduceOp.MAX if how == "max" else torch.distributed.ReduceOp.SUM
        for group in self._shards:
            torch.distributed.all_reduce(part, reduce, group=group)
        return part.sqrt() if how == "square" else part


def _table(cells: Mapping[str, Tensor]) -> Table:
    return tuple(cells), torch.stack(list(cells.values()), dim=-1)


def _at(dense: Tensor, gradient: Tensor) -> Tensor:
    """The elements of a dense tensor where a sparse gradient has its own."""
    index = gradient.coalesce().indices()
    return dense[tuple(index)]


def _whole(gradient: Tensor) -> Tensor:
    """This rank's part of a gradient; what is still to be summed over ranks is summed first."""
    placements = getattr(gradient, "placements", ())
    if any(p.is_partial() for p in placements):
        from torch.distributed.tensor import Replicate

        wanted = [Replicate() if p.is_partial() else p for p in placements]
        gradient = gradient.redistribute(placements=wanted)  # type: ignore[attr-defined]
    gradient = local(gradient)
    return gradient.coalesce() if gradient.is_sparse else gradient


def _shards(parameter: Tensor) -> tuple[Any, ...]:
    """The process groups over which a parameter is sharded; none when every rank has it whole."""
    placements = getattr(parameter, "placements", ())
    mesh: Any = getattr(parameter, "device_mesh", None)
    return tuple(mesh.get_group(i) for i, p in enumerate(placements) if p.is_shard())
