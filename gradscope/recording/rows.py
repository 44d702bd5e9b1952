"""What one record holds: a model's parameters as rows of the file, measured where they are."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from gradscope.histories.history import Kind, Status
from gradscope.recording.measure import Sketcher, dots, local, norms
from gradscope.recording.shards import Record
from gradscope.recording.topology import Topology, modules_of

Tensor = torch.Tensor


class Rows:
    """The parameters of a model as rows of the file, in the order of their use.

    ``order`` is None where it could not be read; ``directions`` asks for sketches, which sharded
    gradients do not have. Statistics are float32 [len(found)], and nothing waits for the device.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer | None,
        order: Topology | None,
        directions: bool,
    ) -> None:
        found = list(modules_of(model))
        place = {module: i for i, module in enumerate(order.order)} if order else {}
        found.sort(key=lambda row: place.get(row[1], len(place)))
        self._names = [name for name, _, _ in found]
        self._modules = [module for _, module, _ in found]
        self._parameters = [parameter for _, _, parameter in found]
        self._ids = [id(p) for p in model.parameters()]
        self._types = dict(model.named_modules())
        self._groups = _groups(optimizer)
        self._device = self._parameters[0].device if self._parameters else torch.device("cpu")
        self.dtype = self._parameters[0].dtype if self._parameters else torch.float32
        self._meshes = [_mesh(p) for p in self._parameters]
        plain = directions and not any(self._meshes)
        self._sketcher: Sketcher | None = None
        if plain and self._parameters:
            self._sketcher = Sketcher(
                self._names, [p.numel() for p in self._parameters], self._device
            )
            self._zeros: dict[int, Tensor] = {}
        self._buffers: list[Tensor] = []

    def __len__(self) -> int:
        return len(self._names)

    def same(self, parameters: Sequence[Tensor]) -> bool:
        """Whether a model still has these parameters."""
        return [id(p) for p in parameters] == self._ids

    def status(self) -> np.ndarray[Any, Any]:
        """``Status`` of each row now, uint8 [L]."""
        return np.array([_status(p) for p in self._parameters], dtype=np.uint8)

    def gradients(self) -> dict[int, Tensor]:
        """The gradients that exist, by row; of sparse ones the stored elements."""
        return {row: _dense(p.grad) for row, p in enumerate(self._parameters) if p.grad is not None}

    def copies(self, found: Mapping[int, Tensor]) -> list[Tensor]:
        """The weights before the step, in buffers that are used again."""
        now = self._weights(found)
        if [b.shape for b in self._buffers] != [n.shape for n in now]:
            self._buffers = [torch.empty_like(n) for n in now]
        if now:
            torch._foreach_copy_(self._buffers, now)
        return self._buffers

    def measure(
        self, record: Record, found: Mapping[int, Tensor], *, whole: bool, counted: bool
    ) -> None:
        """Take a record's statistics of the gradients ``found``; only norms unless ``whole``.

        With ``counted`` NaN and infinite elements are counted, which costs a pass each.
        """
        values = [local(g) for g in found.values()]
        lengths = self._reduced(norms(values, 2), found, "square")
        record.cells["grad/l2"] = lengths
        if whole:
            top = self._reduced(norms(values, math.inf), found, "max")
            record.cells["grad/max_abs"] = top
            if counted:
                nans = torch.stack([torch.isnan(g).sum() for g in values])
                infinite = torch.stack([torch.isinf(g).sum() for g in values])
                record.cells["grad/n_nan"] = self._reduced(nans.float(), found, "sum")
                record.cells["grad/n_inf"] = self._reduced(infinite.float(), found, "sum")
            record.cells["nonzero"] = self._reduced(norms(values, 0), found, "sum")
            record.cells["param/l2"] = self._reduced(
                norms(self._weights(found), 2), found, "square"
            )
            # Scaled by the greatest one, so that finite norms do not overflow in their sum.
            top = lengths.max().clamp_min(torch.finfo(torch.float32).tiny)
            record.scalars["total_l2"] = top * torch.linalg.vector_norm(lengths / top)
        if self._sketcher is not None:
            record.sketch = self._sketched(self._sketcher, found, lengths).half()

    def measure_update(self, record: Record, before: list[Tensor], gradients: list[Tensor]) -> None:
        """Take a record's statistics of the step, from its weights ``before`` and gradients."""
        change = torch._foreach_sub(self._weights(record.rows), before)
        size = self._reduced(norms(change, 2), record.rows, "square")
        inner = self._reduced(dots(change, gradients), record.rows, "sum")
        record.cells["update/l2"] = size
        record.cells["update/grad_cos"] = -inner / (size * record.cells["grad/l2"])

    def _weights(self, rows: Iterable[int]) -> list[Tensor]:
        return [local(self._parameters[row]) for row in rows]

    def _sketched(self, sketcher: Sketcher, found: Mapping[int, Tensor], lengths: Tensor) -> Tensor:
        """Sketches of all rows; of those without a gradient zero."""
        every = [
            found[row] if row in found and found[row].numel() == p.numel() else self._zero(row, p)
            for row, p in enumerate(self._parameters)
        ]
        if len(found) < len(every):
            index = torch.tensor(list(found), dtype=torch.long).to(self._device)
            lengths = torch.zeros(len(every), device=self._device).index_copy(0, index, lengths)
        return sketcher(every, lengths)

    def _zero(self, row: int, parameter: Tensor) -> Tensor:
        if row not in self._zeros:
            self._zeros[row] = torch.zeros_like(parameter, requires_grad=False).detach()
        return self._zeros[row]

    def _reduced(self, values: Tensor, found: Iterable[int], how: str) -> Tensor:
        """Values of sharded rows joined over their shards: [len(found)] in, the same out."""
        meshes = [self._meshes[row] for row in found]
        sharded = [i for i, mesh in enumerate(meshes) if mesh is not None]
        if not sharded:
            return values
        at = torch.tensor(sharded, device=values.device)
        part = values[at] ** 2 if how == "square" else values[at]
        operation = (
            torch.distributed.ReduceOp.MAX if how == "max" else torch.distributed.ReduceOp.SUM
        )
        torch.distributed.all_reduce(part, operation, group=meshes[sharded[0]])
        out = values.clone()
        out[at] = part.sqrt() if how == "square" else part
        return out

    def arrays(self, order: Topology | None) -> dict[str, np.ndarray[Any, Any]]:
        """The keys of the file that describe rows and edges."""
        arrays = {
            "layer/name": np.array(self._names, dtype=str),
            "layer/module": np.array(self._modules, dtype=str),
            "layer/kind": np.array([self._kind(i) for i in range(len(self._names))], dtype=str),
            "layer/numel": np.array([p.numel() for p in self._parameters], dtype=np.int64),
            "layer/group": np.array([self._groups.get(id(p), -1) for p in self._parameters]),
        }  # fmt: skip
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
        module = type(self._types.get(self._modules[row])).__name__.lower()
        if "norm" in module:
            return "norm"
        if "embedding" in module:
            return "embedding"
        if last.startswith("bias") or last.endswith("_bias") or parameter.dim() < 2:
            return "bias"
        return "conv" if parameter.dim() > 2 and "conv" in module else "matrix"


def _status(parameter: Tensor) -> int:
    if parameter.grad is not None:
        return Status.RECORDED
    return Status.NONE if parameter.requires_grad else Status.FROZEN


def _dense(gradient: Tensor) -> Tensor:
    return gradient.coalesce().values() if gradient.is_sparse else gradient


def _mesh(parameter: Tensor) -> Any:
    """The process group over which a parameter is sharded, None when it is whole on every rank."""
    placements = getattr(parameter, "placements", ())
    if not any(p.is_shard() for p in placements):
        return None
    mesh: Any = parameter.device_mesh  # type: ignore[attr-defined]
    shard = next(i for i, p in enumerate(placements) if p.is_shard())
    return mesh.get_group(shard)


def _groups(optimizer: torch.optim.Optimizer | None) -> dict[int, int]:
    if optimizer is None:
        return {}
    return {id(p): i for i, group in enumerate(optimizer.param_groups) for p in group["params"]}
