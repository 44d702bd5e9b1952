"""``GradientRecorder`` with Accelerate: one call where gradients are in sync."""

from __future__ import annotations

import os
from typing import Any

from gradscope.errors import UsageError
from gradscope.recording.recorder import GradientRecorder


class AcceleratedRecorder:
    """Records on steps at which ``accelerator.sync_gradients`` is true, unscaled.

    Call ``capture`` after ``accelerator.backward`` and before ``clip_grad_norm_``; between
    accumulated micro-batches it does nothing. ``options`` are those of ``GradientRecorder``.
    Raises UsageError if the first argument is not an Accelerator.
    """

    def __init__(
        self,
        accelerator: Any,
        model: Any,
        optimizer: Any,
        folder: str | os.PathLike[str],
        **options: Any,
    ) -> None:
        if not hasattr(accelerator, "sync_gradients"):
            raise UsageError("the first argument must be an Accelerator of the accelerate package")
        self._accelerator, self._optimizer = accelerator, optimizer
        inner = getattr(optimizer, "optimizer", optimizer)
        self._recorder = GradientRecorder(model, inner, folder, **options)

    def capture(self, step: int | None = None, *, loss: Any = None) -> None:
        """Record this optimizer step, if its gradients are complete."""
        if not self._accelerator.sync_gradients:
            return
        scaler = getattr(self._accelerator, "scaler", None)
        if scaler is not None:
            self._accelerator.unscale_gradients(self._optimizer)
        self._recorder.capture(step, loss=loss, scaler=scaler)

    def close(self) -> None:
        """Write what is left."""
        self._recorder.close()

    def __enter__(self) -> AcceleratedRecorder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
