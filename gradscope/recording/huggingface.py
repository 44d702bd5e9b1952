"""``GradientRecorder`` as a callback of Hugging Face's Trainer."""

from __future__ import annotations

import os
from typing import Any

from gradscope.errors import UsageError
from gradscope.recording.recorder import GradientRecorder

try:
    from transformers import TrainerCallback
except ImportError:
    raise UsageError("this callback needs transformers: pip install transformers") from None


class GradientRecorderCallback(TrainerCallback):  # type: ignore[misc]
    """Records in ``on_pre_optimizer_step``, which the Trainer calls after it has clipped.

    The file says so (stage ``pre_step``); set ``max_grad_norm=0`` to record what was not clipped.
    ``options`` are those of ``GradientRecorder``.
    """

    def __init__(self, folder: str | os.PathLike[str], **options: Any) -> None:
        self._folder, self._options = folder, options
        self._recorder: GradientRecorder | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Begin, when parameters are where they will be trained."""
        optimizer = given.get("optimizer")
        self._recorder = GradientRecorder(
            given["model"],
            getattr(optimizer, "optimizer", optimizer),
            self._folder,
            stage="pre_step" if args.max_grad_norm else "pre_clip",
            **self._options,
        )

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Capture this step."""
        if self._recorder is not None:
            self._recorder.capture(state.global_step)

    def on_train_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Write what is left."""
        if self._recorder is not None:
            self._recorder.close()
