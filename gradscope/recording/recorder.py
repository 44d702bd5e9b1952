"""``GradientRecorder``: three lines in a training loop, and the run can be diagnosed afterwards."""

from __future__ import annotations

import atexit
import os
import time
import uuid
import warnings
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import numpy as np
import torch

from gradscope.histories.history import Status
from gradscope.histories.sketching import WIDTH
from gradscope.recording.measure import MOST_SKETCHED, local
from gradscope.recording.rows import Rows
from gradscope.recording.shards import Record, drained, folder_for, save
from gradscope.recording.topology import Topology, modules_of, topology

Tensor = torch.Tensor


class GradientRecorder:
    """Records a model's gradients into a folder that ``gradscope flow`` reads.

    ::

        with GradientRecorder(model, optimizer, "runs/a", every=10) as recorder:
            for step, batch in enumerate(loader):
                loss = compute(batch)
                loss.backward()
                recorder.capture(step, loss=loss)  # after backward, before clipping
                optimizer.step()
                optimizer.zero_grad()

    Every ``every``-th step each parameter's gradient norm, greatest magnitude, share of zeros and
    count-sketch are taken, as well as weight and update norms, loss, learning rates and the loss
    scale, and from the first shard with non-finite gradients on the number of NaN and infinite
    elements; with ``directions`` the norm and sketch of the step after it too, because only
    successive steps show overshooting. Nothing waits for the device until there are ``capacity``
    records or the recorder is closed; then one shard is written, whole or not at all. Without any
    ``capture`` call gradients are taken in the optimizer's pre-step hook, that is after clipping,
    and the file says so.

    ``batch_size`` makes the gradient noise scale computable; ``stage`` is for callers that can
    only capture after clipping ("pre_step").

    Parameters are read through the model, so wrap (DDP, FSDP2, torch.compile) first. With several
    processes rank 0 writes; sharded gradients are reduced, which every rank must take part in. The
    model, its gradients and the random state are left as they are.

    Raises UsageError when the folder holds another run and ``resume`` is False.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer | None = None,
        folder: str | os.PathLike[str] = "gradients",
        *,
        every: int = 10,
        directions: bool = True,
        updates: bool = True,
        capacity: int = 64,
        batch_size: float | None = None,
        resume: bool = False,
        run_id: str | None = None,
        stage: str = "pre_clip",
    ) -> None:
        if every < 1 or capacity < 1:
            raise ValueError(f"every and capacity must be at least 1, not {every} and {capacity}")
        self._model, self._optimizer = model, optimizer
        self._every, self._capacity = every, capacity
        self._directions, self._updates = directions, updates and optimizer is not None
        self._writes = _rank() == 0
        self._folder, self._shard = (
            folder_for(folder, resume) if self._writes else (os.fspath(folder), 0)
        )
        self._batch_size, self._run = batch_size, run_id or uuid.uuid4().hex[:12]
        self._stage = self._given_stage = stage
        self._called = self._closed = self._warned = False
        self._count = False
        self._steps = 0
        self._rows: Rows | None = None
        self._records: list[Record] = []
        self._topology: Topology | None = None
        self._pending: _Pending | None = None
        self._hooks = [*self._watch_optimizer(), *self._watch_forward()]
        self._finalizer = atexit.register(_close, weakref.ref(self))

    # --- the loop -----------------------------------------------------------------------------

    def capture(
        self,
        step: int | None = None,
        *,
        loss: Tensor | float | None = None,
        scaler: Any = None,
        loss_scale: Tensor | float | None = None,
        clip_coefficient: Tensor | float | None = None,
    ) -> None:
        """Record this optimizer step, if it is one of those to record.

        Call it once a step, after ``backward`` (all of them, when gradients are accumulated) and
        after ``scaler.unscale_``, before clipping and ``zero_grad``. ``step`` counts optimizer
        steps and may be left out; ``scaler`` is a GradScaler, so that steps it skips are known.
        """
        self._called, self._stage = True, self._given_stage
        self._settle()
        number = self._steps if step is None else int(step)
        self._steps = number + 1
        if not self._wanted(number):
            return
        if scaler is not None and loss_scale is None:
            loss_scale = getattr(scaler, "_scale", None)
        scalars = {"loss": loss, "loss_scale": loss_scale, "clip_coef": clip_coefficient}
        self._record(number, scalars, may_skip=loss_scale is not None)

    def flush(self) -> None:
        """Write what has been recorded so far as a shard. Waits for the device."""
        self._settle()
        rows, records = self._rows, self._records
        if rows is None or not records:
            return
        self._records = []
        arrays = drained(records, len(rows))
        # Counting elements costs a pass each, which a finite run can be spared.
        recorded = arrays["grad/status"] == Status.RECORDED
        self._count |= not bool(np.isfinite(arrays["grad/l2"][recorded]).all())
        if self._writes:
            path = os.path.join(self._folder, f"{self._shard:05d}.npz")
            save(path, arrays, rows.arrays(self._topology), self._meta(rows))
            self._shard += 1

    def close(self) -> None:
        """Write what is left and let go of the model. Safe to call twice."""
        if self._closed:
            return
        self._closed = True
        try:
            self.flush()
        finally:
            for hook in self._hooks:
                hook.remove()
            # Rows hold process groups, which must not outlive their destruction.
            self._hooks, self._rows, self._records, self._pending = [], None, [], None
            atexit.unregister(self._finalizer)

    def __enter__(self) -> GradientRecorder:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _wanted(self, step: int) -> bool:
        return step % self._every == 0 or (self._directions and step % self._every == 1)

    # --- hooks --------------------------------------------------------------------------------

    def _watch_optimizer(self) -> list[Any]:
        if self._optimizer is None:
            return []
        me = weakref.ref(self)

        def before(*_: Any) -> None:
            if (recorder := me()) is not None:
                recorder._before_step()

        def after(*_: Any) -> None:
            if (recorder := me()) is not None:
                recorder._after_step()

        return [
            self._optimizer.register_step_pre_hook(before),
            self._optimizer.register_step_post_hook(after),
        ]

    def _before_step(self) -> None:
        """The fallback: no capture call, so gradients are what the optimizer is about to use."""
        if self._called or self._closed:
            return
        self._stage = "pre_step"
        number, self._steps = self._steps, self._steps + 1
        if self._wanted(number):
            self._record(number, {}, may_skip=False)

    def _after_step(self) -> None:
        pending = self._pending
        if pending is not None:
            pending.stepped = True
            if pending.before:
                with torch.no_grad():
                    pending.rows.measure_update(pending.record, pending.before, pending.gradients)
            pending.before = []

    def _watch_forward(self) -> list[Any]:
        """One look at the first output that can be differentiated; then the hook is gone."""
        me = weakref.ref(self)

        def seen(_module: Any, _inputs: Any, output: Any) -> None:
            recorder = me()
            if recorder is None or not torch.is_grad_enabled() or torch.compiler.is_compiling():
                return
            recorder._look(output)

        return [self._model.register_forward_hook(seen)]

    def _look(self, output: Any) -> None:
        self._hooks.pop().remove()
        owner = {id(p): module for _, module, p in modules_of(_inner(self._model))}
        self._topology = topology(output, owner)

    # --- one record ---------------------------------------------------------------------------

    def _record(self, step: int, scalars: Mapping[str, Any], may_skip: bool) -> None:
        rows = self._current_rows(step)
        found = rows.gradients()
        status = rows.status()
        if not found and Status.NONE in status:
            self._warn_once()
        record = Record(step, status, self._rates(), tuple(found))
        self._records.append(record)
        whole = step % self._every == 0
        with torch.no_grad():
            record.scalars |= _known(scalars)
            if found:
                rows.measure(record, found, whole=whole, counted=self._count)
            before = rows.copies(found) if self._updates and whole else []
        gradients = [local(g) for g in found.values()] if before else []
        self._pending = _Pending(record, rows, before, gradients, may_skip)

    def _settle(self) -> None:
        """The record before is complete: whether its step was taken is known only now."""
        pending, self._pending = self._pending, None
        if pending is None:
            return
        pending.record.skipped = (
            pending.may_skip and not pending.stepped and self._optimizer is not None
        )

    def _current_rows(self, step: int) -> Rows:
        """The parameters as they are now; a change of them, or of the order, begins a shard."""
        parameters = list(_inner(self._model).parameters())
        known = self._rows is not None and self._rows.same(parameters)
        records = self._records
        room = len(records) < self._capacity and (not records or records[-1].step < step)
        if not known or not room:
            self.flush()
        if not known or self._rows is None:
            self._rows = Rows(
                _inner(self._model), self._optimizer, self._topology, self._directions
            )
        return self._rows

    def _warn_once(self) -> None:
        if self._warned:
            return
        self._warned = True
        warnings.warn(
            "no parameter has a gradient: call capture() after backward() and before zero_grad()",
            stacklevel=4,
        )

    def _rates(self) -> list[float]:
        """Learning rates that the host knows; one kept on the device is not waited for."""
        if self._optimizer is None:
            return []
        rates = [group.get("lr", float("nan")) for group in self._optimizer.param_groups]
        return [
            float("nan") if isinstance(r, Tensor) and r.device.type != "cpu" else float(r)
            for r in rates
        ]

    def _meta(self, rows: Rows) -> dict[str, Any]:
        return {
            "writer": "gradscope",
            "torch": torch.__version__,
            "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "run_id": self._run,
            "stage": self._stage,
            "reduction": "global",
            "rank": _rank(),
            "sketch": {"k": WIDTH, "hash": "murmur3 finaliser", "most": MOST_SKETCHED},
            "optimizer": _described(self._optimizer),
            "precision": dict.fromkeys(("grad", "param"), str(rows.dtype).removeprefix("torch.")),
            "topology": {"source": "assumed-chain" if self._topology is None else "recorded"},
            **({} if self._batch_size is None else {"batch_size": float(self._batch_size)}),
        }  # fmt: skip


def _known(scalars: Mapping[str, Any]) -> dict[str, Tensor | float]:
    """What was given, tensors left where they are."""
    return {
        name: value.detach().float().mean() if isinstance(value, Tensor) else float(value)
        for name, value in scalars.items()
        if value is not None
    }


@dataclass(slots=True)
class _Pending:
    """A record whose step has not been seen yet."""

    record: Record
    rows: Rows
    #: The weights before the step and the gradients, where the step is to be measured.
    before: list[Tensor]
    gradients: list[Tensor]
    may_skip: bool
    stepped: bool = False


def _inner(model: torch.nn.Module) -> torch.nn.Module:
    """The module itself inside torch.compile's and data parallel wrappers."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and type(model).__name__ in ("DistributedDataParallel", "DataParallel"):
            inner = getattr(model, "module", None)
        if not isinstance(inner, torch.nn.Module):
            return model
        model = inner


def _rank() -> int:
    available = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_rank() if available else 0


def _described(optimizer: torch.optim.Optimizer | None) -> dict[str, Any] | None:
    if optimizer is None:
        return None
    first = optimizer.param_groups[0] if optimizer.param_groups else {}
    facts: dict[str, Any] = {"class": type(optimizer).__name__}
    for name in ("eps", "momentum", "weight_decay"):
        if isinstance(first.get(name), int | float):
            facts[name] = first[name]
    if isinstance(first.get("betas"), tuple):
        facts["betas"] = [float(b) for b in first["betas"]]
    return facts


def _close(recorder: weakref.ref[GradientRecorder]) -> None:
    found = recorder()
    if found is not None:
        found.close()
