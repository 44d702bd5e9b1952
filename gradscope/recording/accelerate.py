"""``GradientRecorder`` with Accelerate: one call where gradients are in sync."""

from __future__ import annotations

import os
from typing import Any

import torch

from gradscope.errors import UsageError
from gradscope.recording.recorder import GradientRecorder


class AcceleratedRecorder:
    """Records on steps at which ``accelerator.sync_gradients`` is true, as if unscaled.

    Call ``capture`` after ``accelerator.backward`` and before ``clip_grad_norm_``; between
    accumulated micro-batches it only adds up the loss. ``optimizer`` is one or, as for
    ``GradientRecorder``, several; ``options`` are those of it. Raises UsageError if the first
    argument is not an Accelerator.
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
        self._accelerator = accelerator
        self._count = max(1, int(getattr(accelerator, "gradient_accumulation_steps", 1)))
        self._losses: dict[int, Any] = {}
        options = {"accumulation": self._count} | options
        self._recorder = GradientRecorder(model, optimizer, folder, **options)

    def capture(
        self,
        step: int | None = None,
        *,
        loss: Any = None,
        max_norm: float | None = None,
        optimizer: Any = None,
    ) -> None:
        """Record this optimizer step, if its gradients are complete."""
        loss = self._summed(loss, id(optimizer))
        if self._accelerator.sync_gradients:
            self._losses.pop(id(optimizer), None)
            # Unscaling here would make clip_grad_norm_ unscale twice; the recorder divides.
            scaler = getattr(self._accelerator, "scaler", None)
            self._recorder.capture(
                step, loss=loss, scaler=scaler, max_norm=max_norm, optimizer=optimizer
            )

    def _summed(self, loss: Any, key: int) -> Any:
        """The loss of the step so far: the mean over its micro-batches."""
        if loss is None:
            return None
        if isinstance(loss, torch.Tensor):
            self._recorder.look(loss)
            loss = loss.detach()
        self._losses[key] = self._losses.get(key, 0.0) + loss / self._count
        return self._losses[key]

    def close(self) -> None:
        """Write what is left."""
        self._recorder.close()

    def __enter__(self) -> AcceleratedRecorder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
