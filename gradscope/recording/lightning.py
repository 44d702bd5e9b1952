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
    """Records before every optimizer step: after unscaling and reduction, before clipping.

    ``options`` are those of ``GradientRecorder``. With several optimizers the first is recorded.
    """

    def __init__(self, folder: str | os.PathLike[str], **options: Any) -> None:
        self._folder, self._options = folder, options
        self._recorder: GradientRecorder | None = None

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Begin, when parameters are where they will be trained."""
        optimizer = trainer.optimizers[0]
        self._recorder = GradientRecorder(
            pl_module, getattr(optimizer, "optimizer", optimizer), self._folder, **self._options
        )

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        """Capture this step, with the loss that Lightning last computed."""
        if self._recorder is not None:
            loss = trainer.callback_metrics.get("train_loss", trainer.callback_metrics.get("loss"))
            scaler = getattr(trainer.precision_plugin, "scaler", None)
            self._recorder.capture(trainer.global_step, loss=loss, scaler=scaler)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Write what is left."""
        self._close()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Write what led to it."""
        self._close()

    def _close(self) -> None:
        if self._recorder is not None:
            self._recorder.close()
