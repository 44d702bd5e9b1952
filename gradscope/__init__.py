"""Diagnostics for neural networks: the Python API, loaded when it is first used."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["__version__", "analyze_weights"]

if TYPE_CHECKING:
    from gradscope.weights.analysis import analyze_weights

_HOMES = {"analyze_weights": "gradscope.weights.analysis"}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
