"""``GradientRecorder``: three lines in a training loop, and the run can be diagnosed afterwards."""

from __future__ import annotations

import os
from contextlib import suppress
from types import TracebackType
from typing import Any

import torch

from gradscope.recording import endings, hooks
from gradscope.recording.advice import Advice
from gradscope.recording.guard import guarded
from gradscope.recording.meta import facts, meta, rank
from gradscope.recording.modules import inner
from gradscope.recording.optimizers import Given, Optimizers, carried
from gradscope.recording.records import Number, Record, known
from gradscope.recording.rows import Rows
from gradscope.recording.sight import Sight
from gradscope.recording.spool import Spool
from gradscope.recording.turns import Turn, Turns

#: What a value raises that is no number.
_NO_NUMBER = (TypeError, ValueError, RuntimeError)


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

    #: Whether the recorder's own code is running, and whether it no longer does.
    busy = False
    stopped = True

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
        self._count = count = len(self._optimizers)
        self._directions, self._updates = directions, updates and count > 0
        self._spool = Spool(folder, resume, capacity, count, writes=rank() == 0)
        self._facts = facts(run_id, batch_size, accumulation)
        self.stage = stage
        #: Whether capture was ever called, and whether it was not before the last record.
        self._called = self._fallback = False
        #: Whether captures come from closures, and whether one did in the step that is under way.
        self._inside = self._evaluated = False
        #: Whether nothing is left to do at a step that is not recorded.
        self._settled = False
        self._rows: Rows | None = None
        self._pending: Record | None = None
        self._sight = Sight(model, max(1, count))
        self._advice = Advice()
        self._before = [*hooks.before_steps(self._optimizers.all, self)]
        self._after = [*hooks.after_steps(self._optimizers.all, self)]
        self._forward = hooks.of_forward(model, self)
        self._turns = Turns(max(1, count), every, directions, bool(self._after))
        self.stopped = False
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
        steps before the next call. Of a closure that a step calls several times (as of LBFGS) the
        first evaluation is recorded: the gradient that the step began with.

        Raises UsageError for an optimizer that the recorder does not have.
        """
        if self._inside:
            if self._evaluated:
                return
            self._evaluated = True
        if scaler is not None and loss_scale is None:
            loss_scale = getattr(scaler, "_scale", None)
        may_skip = loss_scale is not None
        if self._settled and optimizer is None and self._turns.passes(step, may_skip):
            return
        owner = None if optimizer is None else self._optimizers.index(optimizer)
        given: dict[str, Any] = {}
        if loss_scale is not None:
            given["loss_scale"] = loss_scale
        if clip_coefficient is not None:
            given["clip_coef"] = clip_coefficient
        if max_norm is not None:
            given["max_norm"] = max_norm
        if not self._called:
            self._forget_fallback()
        self._take(step, owner, loss, given, scaler)

    @guarded
    def flush(self) -> None:
        """Write what has been recorded so far as a shard. Waits for the device."""
        self._settle()
        self._write(len(self._spool))

    def close(self) -> None:
        """Write what is left and let go of the model. Safe to call twice."""
        self.flush()
        self._stop()
        for hook in (*self._before, *self._after):
            hook.remove()

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

    # --- the end ------------------------------------------------------------------------------

    def _stop(self) -> None:
        """Let go of everything; rows hold process groups, which must not outlive their end.

        Only hooks of steps stay: a step that is under way would miss them.
        """
        self.stopped = True
        self._forward.remove()
        self._rows = None
        self.forget()
        endings.unwatch(self)

    def forget(self) -> None:
        """For a forked child: what waits to be written is its parent's."""
        self._pending, self.busy = None, False
        self._spool.clear()

    def fail(self, error: Exception) -> None:
        """Say what failed, save what can be saved, and leave the training alone."""
        with suppress(Exception):
            self._pending = None
            if not isinstance(error, OSError):
                self._write(len(self._spool))
        self._stop()
        self._spool.say_failed(error)

    # --- hooks --------------------------------------------------------------------------------

    def before_step(self, owner: int) -> None:
        """For the hook before a step: without a capture call it is the time to measure."""
        self._evaluated = False
        if not self._called:
            self._fallback = True
            self._take(None, owner, None, {}, None)

    def after_step(self, owner: int) -> None:
        """For the hook after a step."""
        self._turns.stepped()
        if self._pending is not None:
            self._after_step(owner)

    def _forget_fallback(self) -> None:
        """A capture inside the step (of a closure): the hook before it had nothing to see."""
        self._called, self._fallback = True, False
        if self._pending is not None and not self._pending.stepped:
            self._inside = self._evaluated = True
            self._pending = None
            self._turns.undo()

    @guarded
    def _after_step(self, owner: int) -> None:
        pending = self._pending
        if pending is None:
            return
        while self._before and self._called and not self._inside:  # of no more use
            self._before.pop().remove()
        pending.stepped += (owner,)
        for part in pending.parts:
            if part.owner == owner and part.awaits is not None:
                part.awaits.after(part)
                part.awaits = None
        if self._count == 1:
            self._settle()

    @guarded
    def look_once(self, output: Any, inputs: Any, named: Any) -> None:
        """For the hook of the forward pass, which is then gone."""
        self._forward.remove()
        self._sight.look_through(output, inputs, named)

    @guarded
    def look(self, loss: Any) -> None:
        """Read from a loss which modules feed which, where no forward pass has told it.

        ``capture`` does it with the loss it is given; of use to those who detach it first.
        """
        if not self._sight.complete and getattr(loss, "grad_fn", None) is not None:
            self._sight.look(loss)

    # --- one record ---------------------------------------------------------------------------

    @guarded
    def _take(
        self, step: int | None, owner: int | None, loss: Any, given: dict[str, Any], scaler: Any
    ) -> None:
        """Measure the gradients of those optimizers whose turn it is to be recorded."""
        if self._pending is not None:
            self._settle()
        if not self._sight.complete and loss is not None:
            self.look(loss)
        may_skip = "loss_scale" in given
        turn = self._turns.turn(step, owner, may_skip)
        if turn.wanted:
            self._pending = self._record(turn, owner, loss, given, scaler)
        elif turn.unseen:
            self._pending = Record(turn.step, owner, may_skip)
        if self._turns.outnumbered and self._called:
            self._advice.outnumbered(self._turns)
        self._settled = self._called and self._sight.complete

    def _record(
        self, turn: Turn, owner: int | None, loss: Any, given: dict[str, Any], scaler: Any
    ) -> Record:
        rows, due = self._rows, 0
        if rows is None or not rows.same():
            rows = self._renewed()
        # Of several optimizers, one whose turn is still to come may join the last record.
        elif due := self._spool.due(turn.step, held=self._count > 1):
            self._write(due)
        parts = rows.take(turn.wanted, whole=turn.whole, counted=self._spool.spoiled)
        record = Record(turn.step, owner, "loss_scale" in given, self._optimizers.rates(), parts)
        if loss is not None:
            try:  # a call less than ``_known``, at every record
                record.loss = known(loss)
            except _NO_NUMBER:
                self._advice.no_number("loss", loss)
        if given:
            found = [(name, self._known(name, number)) for name, number in given.items()]
            record.scalars = [(name, number) for name, number in found if number is not None]
        if scaler is not None and self._count:
            for part in parts:
                part.scale = carried(scaler, self._optimizers.all[part.owner])
        looked = self._settled and parts and parts[0].valued
        if not (looked or self._fallback):
            everyone = len(turn.wanted) >= self._count
            self._advice.without_gradient(parts if everyone else ())
        return record

    def _known(self, name: str, value: Any) -> Number | None:
        """A number that the caller gave; None, and said once, where it is none."""
        try:
            return known(value)
        except _NO_NUMBER:
            self._advice.no_number(name, value)
            return None

    def _settle(self) -> None:
        """The record before is complete: who stepped, and whether it was skipped, is known now."""
        record, self._pending = self._pending, None
        if record is not None:
            place = self._turns.settle(record.step, record.owner, record.stepped, record.may_skip)
            self._spool.add(record, place)

    def _renewed(self) -> Rows:
        """The parameters as they are now; a change of them, or of the order, begins a shard."""
        self._write(len(self._spool))
        model, order = inner(self._model), self._sight.topology
        rows = Rows(model, self._optimizers, order, self._directions, self._updates)
        self._spool.fit(len(rows))
        self._rows = rows
        return rows

    def _write(self, count: int) -> None:
        """Write the first ``count`` records that wait as a shard."""
        if self._rows is not None and count:
            self._spool.write(count, self._rows, self._described)

    def _described(self, rows: Rows) -> tuple[dict[str, Any], dict[str, Any]]:
        """What a shard says of its rows and of the run."""
        order, stage = self._sight.topology, "pre_step" if self._fallback else self.stage
        return rows.arrays(order), meta(
            stage, rows.dtype, order, self._optimizers, self._turns
        ) | self._facts
