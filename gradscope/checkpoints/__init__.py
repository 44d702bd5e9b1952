"""Where tensors lie: containers are sniffed, headers are read, tensor data is left alone."""

from gradscope.checkpoints.integrity import verified
from gradscope.checkpoints.open import open_checkpoint
from gradscope.checkpoints.tensors import (
    DTYPE_BITS,
    Checkpoint,
    Failure,
    Problem,
    Skipped,
    TensorRef,
)

__all__ = [
    "DTYPE_BITS",
    "Checkpoint",
    "Failure",
    "Problem",
    "Skipped",
    "TensorRef",
    "open_checkpoint",
    "verified",
]
