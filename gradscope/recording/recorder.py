"""``GradientRecorder``: three lines in a training loop, and the run can be diagnosed afterwards."""

from __future__ import annotations

import os
import time
import uuid
import warnings
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
from gradscope.recording import endings, hooks
from gradscope.recording.measure import MOST_SKETCHED
from gradscope.recording.optimizers import Given, Optimizers
from gradscope.recording.pending import Pending, carried, inner, known, rank
from gradscope.recording.rows import Rows
from gradscope.recording.shards import Number, Part
from gradscope.recording.spool import Spool
from gradscope.recording.topology import Topology, compiled_topology, merged, modules_of, topology
from gradscope.recording.turns import Turns
from gradscope.text import plural

Tensor = torch.Tensor
P = ParamSpec("P")


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
        self._spool = Spool(folder, resume, capacity, writes=rank() == 0)
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
        self._topology: Topology | None = None
        self._pending: Pending | None = None
        self._unseen = max(1, len(self._optimizers))
        self._hooks = [*hooks.of_steps(self._optimizers.all, self)]
        self._hooks.append(hooks.of_forward(model, self))
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
        settled = self._pending is None and self._called and not self._unseen
        plain = scaler is None and loss_scale is None and optimizer is None
        if settled and plain and self._turns.passes(step):
            return
        owner = None if optimizer is None else self._optimizers.index(optimizer)
        if loss_scale is None and scaler is not None:
            loss_scale = getattr(scaler, "_scale", None)
        given: dict[str, Any] = {}
        if loss_scale is not None:
            given["loss_scale"] = loss_scale
        if clip_coefficient is not None:
            given["clip_coef"] = clip_coefficient
        if max_norm is not None:
            given["max_norm"] = max_norm
        self._capture(step, loss, given, scaler, owner)

    @guarded
    def _capture(
        self, step: int | None, loss: Any, given: dict[str, Any], scaler: Any, owner: int | None
    ) -> None:
        self._forget_fallback()
        self._called, self._fallback = True, False
        may_skip = "loss_scale" in given
        if self._turns.capture(may_skip):
            self._warn_uncounted()
        self._take(step, loss, given, owner, may_skip, scaler)

    @guarded
    def flush(self) -> None:
        """Write what has been recorded so far as a shard. Waits for the device."""
        self._settle()
        self._write(len(self._spool))

    drain = flush

    @guarded
    def close(self) -> None:
        """Write what is left and let go of the model. Safe to call twice."""
        self._settle()
        self._write(len(self._spool))
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
        self._hooks, self._rows, self._pending = [], None, None
        self._spool.clear()
        endings.unwatch(self)

    def _fail(self, error: Exception) -> None:
        """Say what failed, save what can be saved, and leave the training alone."""
        with suppress(Exception):
            self._pending = None
            if not isinstance(error, OSError):
                self._write(len(self._spool))
        self._stop()
        self._say_failed(error)

    def _say_failed(self, error: Exception) -> None:
        written = self._spool.written
        kept = f"the {plural(written, 'shard')} written" if written else "nothing"
        warnings.warn(
            f"gradient recording stopped ({type(error).__name__}: {error}); training goes on, and "
            f"{kept} can be read in {self._spool.folder}",
            RuntimeWarning,
            stacklevel=2,
        )

    # --- hooks --------------------------------------------------------------------------------

    def before_step(self, owner: int) -> None:
        """For the hook before a step: without a capture call it is the time to measure."""
        if not self._called:
            self._before_step(owner)

    def after_step(self, owner: int) -> None:
        """For the hook after a step."""
        if self._turns.open:
            self._turns.stepped()
        if self._pending is not None:
            self._after_step(owner)

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
                part.measured.after(part)
                part.measured, part.gradients = None, []
        if len(self._optimizers) == 1:
            self._settle()

    @guarded
    def look_once(self, output: Any, inputs: Any, named: Any) -> None:
        """For the hook of the forward pass, which is then gone."""
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
        if self._pending is not None:
            self._settle()
        if self._unseen and loss is not None:
            self.look(loss)
        turn = self._turns.turn(step, owner)
        if not turn.wanted:
            self._pending = (turn.unseen and Pending(turn.step, owner, may_skip)) or None
            return
        parts = self._current_rows(turn.step).take(
            turn.wanted, whole=turn.whole, counted=self._count, updates=self._updates
        )
        pending = Pending(turn.step, owner, may_skip, self._optimizers.rates(), parts)
        if scaler is not None:
            for part in parts:
                part.scale = carried(scaler, self._optimizers, part.owner)
        if given:
            pending.scalars = {k: known(v) for k, v in given.items()}
        if loss is not None:
            pending.loss = known(loss)
        self._pending = pending
        if not (parts and parts[0].valued):
            self._warn_without_gradient(parts)

    def _settle(self) -> None:
        """The record before is complete: who stepped, and whether it was skipped, is known now."""
        pending, self._pending = self._pending, None
        if pending is not None:
            stepped = pending.stepped
            place = self._turns.settle(pending.step, pending.owner, stepped, pending.may_skip)
            if pending.parts:
                self._spool.add(pending, place, len(self._optimizers))

    def _current_rows(self, step: int | None) -> Rows:
        """The parameters as they are now; a change of them, or of the order, begins a shard."""
        rows = self._rows
        if rows is None or not rows.same():
            self._write(len(self._spool))
            model = inner(self._model)
            rows = Rows(model, self._optimizers, self._topology, self._directions)
            self._rows = rows
            self._spool.fit(len(rows))
        # Of several optimizers, one whose turn is still to come may join the last record.
        elif due := self._spool.due(step, held=int(len(self._optimizers) > 1)):
            self._write(due)
        return rows

    def _write(self, count: int) -> None:
        """Write the first ``count`` records that wait as a shard."""
        rows = self._rows
        if rows is None or count == 0:
            return
        arrays = self._spool.taken(count, len(rows), len(self._optimizers))
        # Counting elements costs a pass each, which a finite run can be spared.
        recorded = arrays["grad/status"] == Status.RECORDED
        self._count |= not bool(np.isfinite(arrays["grad/l2"][recorded]).all())
        if not self._spool.writes:
            return
        try:
            self._spool.save(arrays, rows.arrays(self._topology), self._meta(rows))
        except Exception as error:
            if not rows.sharded:
                raise
            # The other ranks wait for this one at every record.
            self._spool.writes = False
            self._say_failed(error)

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

    def _warn_uncounted(self) -> None:
        if not self._uncounted and self._hooks:
            self._uncounted = True
            said = (
                f"capture() was called {self._turns.captures} times for "
                f"{plural(self._turns.steps, 'step')} of the optimizer: call it once a step, after "
                "the last micro-batch; norms of unfinished gradients are not those of the step"
            )
            warnings.warn(said, stacklevel=4)

    def _warn_without_gradient(self, parts: Sequence[Part]) -> None:
        if self._without_gradient or self._fallback or any(p.valued for p in parts):
            return
        if any(Status.NONE in p.status for p in parts) and len(self._optimizers) < 2:
            self._without_gradient = True
            warnings.warn(
                "no parameter has a gradient: call capture() after backward() and before "
                "zero_grad()",
                stacklevel=5,
            )
