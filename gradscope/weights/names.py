"""What tensors of a stack of layers are called together."""

from __future__ import annotations

import re
from collections.abc import Sequence

from gradscope.weights.result import TensorResult


def pattern(name: str) -> str:
    """A name with its layer numbers taken out: what the layers of a stack share."""
    return re.sub(r"(?<![^.])\d+(?![^.])", "*", name)


def common_pattern(tensors: Sequence[TensorResult]) -> str:
    """One name for several tensors."""
    patterns = dict.fromkeys(pattern(t.name) for t in tensors)
    return next(iter(patterns)) + (f" (+{len(patterns) - 1} more)" if len(patterns) > 1 else "")
