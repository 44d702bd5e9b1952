"""``GradientRecorder``: three lines in a training loop, and the run can be diagnosed afterwards."""

from __future__ import annotations

import os
import time
import uuid
import warnings
import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from functools import wraps
from types import TracebackType
from typing import Any, Concatenate, ParamSpec

import numpy as np
import torch

from gradscope.histories.history import Status
from gradscope.histories.sketching import WIDTH
from gradscope.recording import endings
from gradscope.recording.measure import MOST_SKETCHED
from gradscope.recording.optimizers import Given, Optimizers
from gradscope.recording.pending import CompiledCall, Pending, carried, inner, known, rank
from gradscope.recording.rows import Rows
from gradscope.recording.shards import Number, Part, Record, drained, folder_for, save
from gradscope.recording.topology import Topology, compiled_topology, merged, modules_of, topology
from gradscope.recording.turns import Turns
from gradscope.text import plural

Tensor = torch.Tensor
P = ParamSpec("P")

#: The first shard has this many records, the next four times as many, up to the capacity.
FIRST_SHARD = 4
#: Records wait no longer than this to be written, however few they are.
SECONDS = 30.0
#: Bytes that records may take where they wait, when no capacity is given, and how many at most.
_WAITING_BYTES = 1 << 24
_MOST_RECORDS = 1024


def guarded(method: Callable[Concatenate[GradientRecorder, P], None]) -> Callable[..., None]:
    """A failure inside stops the recording, not the training; a SIGTERM inside waits for the end.

    Once recording has stopped, nothing happens.
    """

    @wraps(method)
    def call(self: GradientRecorder, *args: P.args, **options: P.kwargs) -> None:
        if self._stopped:
            return
        outer, self.busy = self.busy, True
        try:
            method(self, *args, **options)
        except Exception as error:
            self._fail(error)
        finally:
            self.busy = outer
            if not outer:
                endings.settle()

    return call


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
    scale, and the number of NaN and infinite elements (on other devices than the CPU from the first
    shard with non-finite gradients on); with ``directions`` the norm and sketch of the step after
    it too, because only successive steps show overshooting. Nothing waits for the device until
    records are written, as one shard, whole or not at all: the first after a few records, later
    ones when ``capacity`` is reached (by default what fits into 16 MB), when half a minute has
    passed, on SIGTERM, at exit and when the recorder is closed. Without any ``capture`` call
    gradients are taken in the optimizer's pre-step hook, that is after clipping, and the file says
    so.

    Several optimizers are given as a list, or as a dict by name. A record holds the parameters of
    those that stepped; ``every`` counts the steps of each, and so does the direction.

    ``batch_size`` makes the gradient noise scale computable; ``accumulation`` is how many
    micro-batches make a step, for the file; ``stage`` is for callers that can only capture after
    clipping ("pre_step").

    Parameters are read through the model, so wrap (DDP, FSDP2, torch.compile) first. With several
    processes rank 0 writes; sharded gradients are reduced, which every rank must take part in. The
    model, its gradients and the random state are left as they are. Should recording fail (a full
    disk, no memory left), one warning says so, what was written stays, and training goes on.

    Raises UsageError when the folder holds another run and ``resume`` is False.
    """

    #: Whether the recorder's own code is running.
    busy = False
    _stopped = True

    def __init__(
        self,
        model: torch.nn.Module,
        optimizer: Given | None = None,
        folder: str | os.PathLike[str] = "gradients",
        *,
        every: int = 10,
        directions: bool = True,
        updates: bool = True,
        capacity: int | None = None,
        batch_size: float | None = None,
        accumulation: int | None = None,
        resume: bool = False,
        run_id: str | None = None,
        stage: str = "pre_clip",
    ) -> None:
        if every < 1 or (capacity is not None and capacity < 1):
            raise ValueError(f"every and capacity must be at least 1, not {every} and {capacity}")
        self._model, self._optimizers = model, Optimizers(optimizer)
        self._turns = Turns(max(1, len(self._optimizers)), every, directions)
        self._directions, self._updates = directions, updates and len(self._optimizers) > 0
        self._capacity, self._limit = capacity, FIRST_SHARD
        self._writes = rank() == 0
        self._folder, self._shard = (
            folder_for(folder, resume) if self._writes else (os.fspath(folder), 0)
        )
        self._written = 0
        self._facts: dict[str, Any] = {
            "run_id": run_id or uuid.uuid4().hex[:12],
            "started": datetime.now(UTC).isoformat(),
            **({} if batch_size is None else {"batch_size": float(batch_size)}),
            **({} if accumulation is None else {"accumulation": int(accumulation)}),
        }
        self.stage = stage
        self._fallback = False
        self._called = self._without_gradient = self._uncounted = self._count = False
        self._rows: Rows | None = None
        self._records: list[Record] = []
        self._since = time.monotonic()
        self._topology: Topology | None = None
        self._pending: Pending | None = None
        self._unseen = max(1, len(self._optimizers))
        self._hooks = [*self._watch_optimizers(), *self._watch_forward()]
        self._stopped = False
        endings.watch(self)

    # --- the loop -----------------------------------------------------------------------------

    def capture(
        self,
        step: int | None = None,
        *,
        loss: Number | None = None,
        scaler: Any = None,
        loss_scale: Number | None = None,
        clip_coefficient: Number | None = None,
        max_norm: float | None = None,
        optimizer: Any = None,
    ) -> None:
        """Record this optimizer step, if it is one of those to record.

        Call it once a step, after ``backward`` (all of them, when gradients are accumulated),
        before clipping and ``zero_grad``. ``step`` counts optimizer steps and may be left out;
        ``scaler`` is a GradScaler, so that steps it skips are known and gradients that it has not
        unscaled yet are; ``max_norm`` is what they will be clipped to. ``optimizer``, one of
        several or its name, is the one whose step this is; without it every one is recorded that
        steps before the next call.

        Raises UsageError for an optimizer that the recorder does not have.
        """
        settled = self._called and self._pending is None and not self._unseen
        plain = optimizer is None and scaler is None and loss_scale is None
        if settled and plain and (self._stopped or self._turns.passes(step)):
            return
        owner = None if optimizer is None else self._optimizers.index(optimizer)
        if loss_scale is None:
            loss_scale = getattr(scaler, "_scale", None)
        given = {"loss_scale": loss_scale, "clip_coef": clip_coefficient, "max_norm": max_norm}
        self._capture(step, loss, given, scaler, owner)

    @guarded
    def _capture(
        self, step: int | None, loss: Any, given: dict[str, Any], scaler: Any, owner: int | None
    ) -> None:
        self._forget_fallback()
        self._called, self._fallback = True, False
        may_skip = given["loss_scale"] is not None
        self._notice(self._turns.capture(may_skip))
        self._take(step, loss, given, owner, may_skip, scaler)

    @guarded
    def flush(self) -> None:
        """Write what has been recorded so far as a shard. Waits for the device."""
        self._settle()
        self._write()

    drain = flush

    @guarded
    def close(self) -> None:
        """Write what is left and let go of the model. Safe to call twice."""
        self._settle()
        self._write()
        self._stop()

    def __enter__(self) -> GradientRecorder:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __del__(self) -> None:
        with suppress(Exception):
            self.close()

    # --- ending -------------------------------------------------------------------------------

    def _stop(self) -> None:
        """Let go of everything; rows hold process groups, which must not outlive their end."""
        self._stopped = True
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._rows, self._records, self._pending = [], None, [], None
        endings.unwatch(self)

    def _fail(self, error: Exception) -> None:
        """Say what failed, save what can be saved, and leave the training alone."""
        with suppress(Exception):
            self._pending = None
            if not isinstance(error, OSError):
                self._write()
        self._stop()
        self._say_failed(error)

    def _say_failed(self, error: Exception) -> None:
        kept = f"the {plural(self._written, 'shard')} written" if self._written else "nothing"
        warnings.warn(
            f"gradient recording stopped ({type(error).__name__}: {error}); training goes on, and "
            f"{kept} can be read in {self._folder}",
            RuntimeWarning,
            stacklevel=2,
        )

    # --- hooks --------------------------------------------------------------------------------

    def _watch_optimizers(self) -> list[Any]:
        me = weakref.ref(self)

        def before(owner: int) -> Callable[..., None]:
            def hook(*_: Any) -> None:
                if (recorder := me()) is not None and not recorder._called:
                    recorder._before_step(owner)

            return hook

        def after(owner: int) -> Callable[..., None]:
            def hook(*_: Any) -> None:
                if (recorder := me()) is not None:
                    recorder._turns.stepped()
                    if recorder._pending is not None:
                        recorder._after_step(owner)

            return hook

        found: list[Any] = []
        for i, optimizer in enumerate(self._optimizers.all):
            # What an optimizer of another library lacks is not asked of it.
            if hasattr(optimizer, "register_step_post_hook"):
                found.append(optimizer.register_step_pre_hook(before(i)))
                found.append(optimizer.register_step_post_hook(after(i)))
        return found

    @guarded
    def _before_step(self, owner: int) -> None:
        """The fallback: no capture call, so gradients are what the optimizer is about to use."""
        self._fallback = True
        self._turns.capture(False)
        self._take(None, None, {}, owner, False, None)

    def _forget_fallback(self) -> None:
        """A capture inside the step (of a closure): the hook before it had nothing to see."""
        if not self._called and self._pending is not None and not self._pending.stepped:
            self._pending = None
            self._turns.undo()

    @guarded
    def _after_step(self, owner: int) -> None:
        pending = self._pending
        if pending is None:
            return
        pending.stepped.append(owner)
        for part in pending.parts:
            if part.owner == owner and part.measured is not None:
                with torch.no_grad():
                    part.measured.after(part)
                part.measured, part.gradients = None, []

    def _watch_forward(self) -> list[Any]:
        """One look at the first output that can be differentiated; then the hook is gone."""
        me = weakref.ref(self)

        def seen(_module: Any, inputs: Any, named: Any, output: Any) -> None:
            recorder = me()
            if recorder is None or not torch.is_grad_enabled() or torch.compiler.is_compiling():
                return
            recorder._look_once(output, inputs, named)

        if getattr(self._model, "_compiled_call_impl", None) is not None:
            return [CompiledCall(self._model, seen)]
        return [self._model.register_forward_hook(seen, with_kwargs=True)]

    @guarded
    def _look_once(self, output: Any, inputs: Any, named: Any) -> None:
        self._hooks.pop().remove()
        self._look(output)
        if self._topology is None:
            self._topology = compiled_topology(inner(self._model), output, inputs, named)

    @guarded
    def look(self, loss: Any) -> None:
        """Read from a loss which modules feed which, where no forward pass has told it.

        ``capture`` does it with the loss it is given; of use to those who detach it first.
        """
        if getattr(loss, "grad_fn", None) is not None and self._unseen:
            self._look(loss)

    def _look(self, output: Any) -> None:
        """Several optimizers may have several losses, each of which shows a part."""
        self._unseen = max(0, self._unseen - 1)
        owner = {id(p): module for _, module, p in modules_of(inner(self._model))}
        self._topology = merged(self._topology, topology(output, owner))

    # --- one record ---------------------------------------------------------------------------

    def _take(
        self, step: int | None, loss: Any, given: dict[str, Any], owner: int | None,
        may_skip: bool, scaler: Any,
    ) -> None:  # fmt: skip
        """Measure the gradients of those optimizers whose turn it is to be recorded."""
        self._settle()
        if self._unseen and loss is not None:
            self.look(loss)
        turn = self._turns.turn(step, owner)
        if not turn.wanted:
            self._pending = (turn.unseen and Pending(turn.step, owner, may_skip)) or None
            return
        rows = self._current_rows(turn.step)
        with torch.no_grad():
            parts = rows.take(
                turn.wanted, whole=turn.whole, counted=self._count, updates=self._updates
            )
            pending = Pending(turn.step, owner, may_skip, parts)
            for part in parts:
                part.scale = carried(scaler, self._optimizers, part.owner)
            pending.scalars = {k: known(v) for k, v in given.items() if v is not None}
            pending.loss = None if loss is None else known(loss)
        self._pending = pending
        self._warn_without_gradient(parts)

    def _settle(self) -> None:
        """The record before is complete: who stepped, and whether it was skipped, is known now."""
        pending, self._pending = self._pending, None
        if pending is None:
            return
        place = self._turns.settle(pending.step, pending.owner, pending.stepped, pending.may_skip)
        parts = [part for part in pending.parts if part.owner in place.owners]
        if not parts:
            return
        record = self._records[-1] if self._records else None
        if record is None or record.step != place.step:
            record = Record(place.step, self._optimizers.rates())
            self._records.append(record)
        fresh = not record.parts or {p.owner for p in record.parts} <= set(place.owners)
        record.whole = fresh and len(place.owners) >= len(self._optimizers)
        record.parts = [p for p in record.parts if p.owner not in place.owners] + parts
        record.scalars |= pending.scalars
        if pending.loss is not None:
            record.losses |= dict.fromkeys(place.owners, pending.loss)
        record.skipped = place.skipped or (record.skipped and not fresh)

    def _current_rows(self, step: int | None) -> Rows:
        """The parameters as they are now; a change of them, or of the order, begins a shard."""
        same = self._rows is not None and self._rows.same()
        records = self._records
        backwards = bool(records) and step is not None and records[-1].step > step
        if not same or backwards:
            self._write()
        elif self._full():
            # Of several optimizers, one whose turn is still to come may join the last record.
            self._write(held=int(len(self._optimizers) > 1))
        if not same or self._rows is None:
            self._rows = Rows(
                inner(self._model), self._optimizers, self._topology, self._directions
            )
        return self._rows

    def _full(self) -> bool:
        count = len(self._records)
        late = count > 0 and time.monotonic() - self._since > SECONDS
        return late or count >= min(self._limit, self._most())

    def _most(self) -> int:
        """How many records may wait, by the bytes they take."""
        if self._capacity is not None:
            return self._capacity
        each = 600 * (len(self._rows) if self._rows else 0) + 1
        return max(FIRST_SHARD, min(_MOST_RECORDS, _WAITING_BYTES // each))

    def _write(self, held: int = 0) -> None:
        """Write the records that wait as a shard, but the last ``held``."""
        rows, records = self._rows, self._records[: len(self._records) - held]
        if rows is None or not records:
            return
        self._records, self._since = self._records[len(records) :], time.monotonic()
        self._limit *= 4
        arrays = drained(records, len(rows), len(self._optimizers))
        # Counting elements costs a pass each, which a finite run can be spared.
        recorded = arrays["grad/status"] == Status.RECORDED
        self._count |= not bool(np.isfinite(arrays["grad/l2"][recorded]).all())
        if not self._writes:
            return
        try:
            number = save(
                self._folder, self._shard, arrays, rows.arrays(self._topology), self._meta(rows)
            )
        except Exception as error:
            if not rows.sharded:
                raise
            # The other ranks wait for this one at every record.
            self._writes = False
            self._say_failed(error)
        else:
            self._shard, self._written = number + 1, self._written + 1

    def _meta(self, rows: Rows) -> dict[str, Any]:
        return {
            "writer": "gradscope",
            "torch": torch.__version__,
            "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "stage": "pre_step" if self._fallback else self.stage,
            "reduction": "global",
            "rank": rank(),
            "sketch": {"k": WIDTH, "hash": "murmur3 finaliser", "most": MOST_SKETCHED,
                       "subset": "without replacement"},
            **self._optimizers.described(),
            "precision": dict.fromkeys(("grad", "param"), str(rows.dtype).removeprefix("torch.")),
            "topology": {"source": "assumed-chain" if self._topology is None else "recorded"},
            **({"captures": self._turns.captures, "optimizer_steps": self._turns.steps}
               if len(self._optimizers) else {}),
            **self._facts,
        }  # fmt: skip

    # --- what the caller should know ------------------------------------------------------------

    def _notice(self, uncounted: bool) -> None:
        if uncounted and not self._uncounted and self._hooks:
            self._uncounted = True
            said = (
                f"capture() was called {self._turns.captures} times for "
                f"{plural(self._turns.steps, 'step')} of the optimizer: call it once a step, after "
                "the last micro-batch; norms of unfinished gradients are not those of the step"
            )
            warnings.warn(said, stacklevel=4)

    def _warn_without_gradient(self, parts: Sequence[Part]) -> None:
        if self._without_gradient or self._fallback or any(p.cells for p in parts):
            return
        if any(Status.NONE in p.status for p in parts) and len(self._optimizers) < 2:
            self._without_gradient = True
            warnings.warn(
                "no parameter has a gradient: call capture() after backward() and before "
                "zero_grad()",
                stacklevel=5,
            )
