"""``GradientRecorder`` as a callback of Hugging Face's Trainer."""

from __future__ import annotations

import math
import os
from typing import Any

from gradscope.errors import UsageError
from gradscope.recording.recorder import GradientRecorder

try:
    from transformers import TrainerCallback

    from gradscope.recording import watched
except ImportError:
    raise UsageError(
        "this callback needs transformers and accelerate: pip install transformers accelerate"
    ) from None


class GradientRecorderCallback(TrainerCallback):  # type: ignore[misc]
    """Records every optimizer step with its loss and loss scale, before the Trainer clips.

    ``on_pre_optimizer_step`` comes after clipping, so gradients are taken where the Trainer's
    Accelerator is asked to clip. A Trainer that clips elsewhere is recorded in that callback, and
    the file says so (stage ``pre_step``). ``options`` are those of ``GradientRecorder``.
    """

    def __init__(self, folder: str | os.PathLike[str], **options: Any) -> None:
        self._folder, self._options = folder, options
        self._recorder: GradientRecorder | None = None
        self._optimizer: Any = None
        self._state: Any = None
        self._loss: Any = None
        self._taken = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Begin, when parameters are where they will be trained."""
        self._optimizer, self._state = given.get("optimizer"), state
        self._loss, self._taken = None, False
        options = {"accumulation": args.gradient_accumulation_steps} | self._options
        self._recorder = GradientRecorder(given["model"], self._optimizer, self._folder, **options)
        watched.listen(self)

    def listens(self, accelerator: Any) -> bool:
        """Whether an accelerator is that of this training."""
        return any(o is self._optimizer for o in accelerator._optimizers)

    def heard_loss(self, loss: Any) -> None:
        """Add up what the micro-batches of a step have lost."""
        if self._recorder is not None:
            self._recorder.look(loss)
        loss = loss.detach()
        self._loss = loss if self._loss is None else self._loss + loss

    def heard_clipping(self, accelerator: Any, max_norm: float) -> None:
        """Capture this step: its gradients are complete and not clipped yet."""
        self._capture(accelerator.scaler, max_norm if math.isfinite(max_norm) else None)

    def _capture(self, scaler: Any, max_norm: float | None) -> None:
        if self._recorder is not None and not self._taken:
            self._taken = True
            self._recorder.capture(
                self._state.global_step, loss=self._loss, scaler=scaler, max_norm=max_norm
            )

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Capture this step if nothing else was heard of it."""
        if self._recorder is not None and not self._taken and args.max_grad_norm:
            self._recorder.stage = "pre_step"
        self._capture(getattr(self._optimizer, "scaler", None), None)

    def on_step_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """A new step: what was heard of the one before is used up."""
        self._state, self._loss, self._taken = state, None, False

    def on_train_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Write what is left."""
        watched.leave(self)
        if self._recorder is not None:
            self._recorder.close()
