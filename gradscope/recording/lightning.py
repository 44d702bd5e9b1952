"""``GradientRecorder`` as a Lightning callback."""

from __future__ import annotations

import os
from typing import Any

from gradscope.errors import UsageError
from gradscope.recording.recorder import GradientRecorder

try:
    from lightning.pytorch.callbacks import Callback
except ImportError:
    try:
        from pytorch_lightning.callbacks import Callback
    except ImportError:
        raise UsageError("this callback needs Lightning: pip install lightning") from None


class GradientRecorderCallback(Callback):  # type: ignore[misc]
    """Records every optimizer step: after unscaling and reduction, before clipping.

    With its loss, loss scale and the limit of clipping. Several optimizers (manual optimization)
    are recorded each at its own steps. ``options`` are those of ``GradientRecorder``.
    """

    def __init__(self, folder: str | os.PathLike[str], **options: Any) -> None:
        self._folder, self._options = folder, options
        self._recorder: GradientRecorder | None = None
        self._loss: Any = None

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Begin, when parameters are where they will be trained."""
        options = {"accumulation": trainer.accumulate_grad_batches} | self._options
        self._recorder = GradientRecorder(
            pl_module, list(trainer.optimizers), self._folder, **options
        )

    def on_before_backward(self, trainer: Any, pl_module: Any, loss: Any) -> None:
        """Add up what the micro-batches of a step have lost; Lightning has divided it already."""
        if self._recorder is not None:
            self._recorder.look(loss)
        scale = getattr(_scaler(trainer), "_scale", None)
        loss = loss.detach() if scale is None else loss.detach() / scale
        self._loss = loss if self._loss is None else self._loss + loss

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        """Capture this step."""
        loss, self._loss = self._loss, None
        if self._recorder is None:
            return
        several = len(trainer.optimizers) > 1
        self._recorder.capture(
            # Lightning counts the steps of all optimizers together.
            None if several else trainer.global_step,
            loss=loss,
            scaler=_scaler(trainer),
            max_norm=_limit(trainer),
            optimizer=optimizer if several else None,
        )

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Write what is left."""
        self._close()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Write what led to it."""
        self._close()

    def _close(self) -> None:
        if self._recorder is not None:
            self._recorder.close()


def _scaler(trainer: Any) -> Any:
    return getattr(trainer.precision_plugin, "scaler", None)


def _limit(trainer: Any) -> float | None:
    """The norm that Lightning will clip to."""
    limit, how = trainer.gradient_clip_val, str(trainer.gradient_clip_algorithm or "norm")
    return float(limit) if limit and how.rpartition(".")[2].lower() == "norm" else None
