"""A model's parameters as rows of the file, and the lots in which they are measured."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from operator import is_
from typing import Any

import numpy as np
import torch

from gradscope.histories.history import Kind
from gradscope.recording.lots import Lot, lots
from gradscope.recording.modules import modules_of
from gradscope.recording.optimizers import Optimizers
from gradscope.recording.records import Part, status_of
from gradscope.recording.topology import Topology

Tensor = torch.Tensor


class Rows:
    """The parameters of a model as rows of the file, in the order of their use.

    ``order`` is None where it could not be read; ``directions`` asks for sketches, ``updates`` for
    what steps change.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        optimizers: Optimizers,
        order: Topology | None,
        directions: bool,
        updates: bool,
    ) -> None:
        found = list(modules_of(model))
        place = {module: i for i, module in enumerate(order.order)} if order else {}
        found.sort(key=lambda row: place.get(row[1], len(place)))
        self._names = [name for name, _, _ in found]
        self._modules = [module for _, module, _ in found]
        self._parameters = [parameter for _, _, parameter in found]
        self._held = _held(model)
        self._counts = list(map(len, self._held))
        #: Views of what is held, which change with it, and what they showed.
        self._there = [each.values() for each in self._held if each]
        self._known = list(chain.from_iterable(self._there))
        self._types = dict(model.named_modules())
        self._optimizers = optimizers
        self._directions, self._updates = directions, updates
        self._lots: list[Lot] = []
        #: Rows that had no gradient yet, by optimizer; they are measured from their first one on.
        self._idle = list(range(len(found)))
        self.dtype = self._parameters[0].dtype if self._parameters else torch.float32

    def __len__(self) -> int:
        return len(self._names)

    def same(self) -> bool:
        """Whether the model still has these modules and parameters."""
        there = chain.from_iterable(self._there)
        return self._counts == list(map(len, self._held)) and all(map(is_, there, self._known))

    @property
    def sharded(self) -> bool:
        """Whether ranks take part in each other's records."""
        return any(lot.sharded for lot in self._lots)

    def take(self, owners: Sequence[int], *, whole: bool, counted: bool) -> list[Part]:
        """The statistics of some optimizers' parameters as they are now.

        Only norms and directions unless ``whole``; ``counted`` is whether NaN and infinite elements
        are, where that costs something.
        """
        if self._idle:
            self._admit()
        parts = []
        for lot in self._lots:
            if lot.owner in owners:
                part = lot.take(whole, counted)
                if part is None:  # a gradient became sparse
                    self._lots, self._idle = [], list(range(len(self._names)))
                    return self.take(owners, whole=whole, counted=counted)
                parts.append(part)
        return [*parts, *self._absent(owners)] if self._idle else parts

    def _admit(self) -> None:
        """Give rows a lot that have their first gradient."""
        new = [row for row in self._idle if self._parameters[row].grad is not None]
        if new:
            taken = set(new)
            self._idle = [row for row in self._idle if row not in taken]
            self._lots += lots(
                new, self._names, self._parameters, self._owners(), self._directions, self._updates
            )

    def _absent(self, owners: Sequence[int]) -> list[Part]:
        """Why the others have no gradient, by optimizer."""
        by_owner: dict[int, list[int]] = {}
        belongs = self._owners()
        for row in self._idle:
            if belongs[row] in owners:
                by_owner.setdefault(belongs[row], []).append(row)
        return [
            Part(owner, np.array(rows), status_of([self._parameters[row] for row in rows]))
            for owner, rows in by_owner.items()
        ]

    def _owners(self) -> list[int]:
        """The optimizer that each row is measured with.

        A row that is in none goes with the one before it, or else with the first that is in one.
        """
        if len(self._optimizers) < 2:
            return [0] * len(self._parameters)
        known = self._optimizers.groups()
        found = [known.get(id(p), (None, -1))[0] for p in self._parameters]
        last = next((owner for owner in found if owner is not None), 0)
        for i, owner in enumerate(found):
            found[i] = last = last if owner is None else owner
        return [owner or 0 for owner in found]

    def arrays(self, order: Topology | None) -> dict[str, np.ndarray[Any, Any]]:
        """The keys of the file that describe rows and edges."""
        known = self._optimizers.groups()
        groups = [known.get(id(p), (-1, -1)) for p in self._parameters]
        arrays = {
            "layer/name": np.array(self._names, dtype=str),
            "layer/module": np.array(self._modules, dtype=str),
            "layer/kind": np.array([self._kind(i) for i in range(len(self._names))], dtype=str),
            "layer/numel": np.array([p.numel() for p in self._parameters], dtype=np.int64),
            "layer/group": np.array([column for _, column in groups], dtype=np.int64),
        }  # fmt: skip
        if len(self._optimizers) > 1:
            arrays["layer/optimizer"] = np.array([owner for owner, _ in groups], dtype=np.int64)
        if order is not None:
            arrays["graph/edges"] = self._edges(order)
        return arrays

    def _edges(self, order: Topology) -> np.ndarray[Any, Any]:
        """Modules by their first row; -1 the input, L the loss."""
        first: dict[str, int] = {}
        for row, module in enumerate(self._modules):
            first.setdefault(module, row)
        pairs = [
            (-1 if u is None else first[u], len(self._names) if v is None else first[v])
            for u, v in order.edges
            if (u is None or u in first) and (v is None or v in first)
        ]
        return np.array(pairs, dtype=np.int64).reshape(-1, 2)

    def _kind(self, row: int) -> Kind:
        parameter, last = self._parameters[row], self._names[row].rpartition(".")[2]
        found = self._types.get(self._modules[row])
        module = str(
            getattr(found, "original_name", type(found).__name__)
        ).lower()  # of TorchScript
        if "norm" in module:
            return "norm"
        if "embedding" in module:
            return "embedding"
        if last.startswith("bias") or last.endswith("_bias") or parameter.dim() < 2:
            return "bias"
        return "conv" if parameter.dim() > 2 and "conv" in module else "matrix"


def _held(model: torch.nn.Module) -> list[dict[str, Any]]:
    """Where modules keep their parameters and children: what changes when a model does."""
    modules = list(model.modules())
    return [m._parameters for m in modules] + [m._modules for m in modules]
