"""Diagnostics for neural networks: the Python API, loaded when it is first used."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from gradscope.version import __version__

__all__ = [
    "GradientRecorder",
    "__version__",
    "analyze_drift",
    "analyze_flow",
    "analyze_weights",
    "attribute",
    "attribute_layer",
    "attribute_neuron",
    "explain",
    "manifest",
    "merge",
    "read_report",
    "verify",
    "visualize",
]

if TYPE_CHECKING:
    from gradscope.attribution.attribute import attribute
    from gradscope.attribution.explain import explain
    from gradscope.attribution.internal import attribute_layer, attribute_neuron
    from gradscope.attribution.synthesis.visualize import visualize
    from gradscope.drift.analysis import analyze_drift
    from gradscope.fingerprints.analysis import manifest, verify
    from gradscope.flow.analysis import analyze_flow
    from gradscope.merging import merge
    from gradscope.recording.recorder import GradientRecorder
    from gradscope.saved import read_report
    from gradscope.weights.analysis import analyze_weights

_HOMES = {
    "GradientRecorder": "gradscope.recording.recorder",
    "analyze_drift": "gradscope.drift.analysis",
    "analyze_flow": "gradscope.flow.analysis",
    "analyze_weights": "gradscope.weights.analysis",
    "attribute": "gradscope.attribution.attribute",
    "attribute_layer": "gradscope.attribution.internal",
    "attribute_neuron": "gradscope.attribution.internal",
    "manifest": "gradscope.fingerprints.analysis",
    "merge": "gradscope.merging",
    "verify": "gradscope.fingerprints.analysis",
    "explain": "gradscope.attribution.explain",
    "read_report": "gradscope.saved",
    "visualize": "gradscope.attribution.synthesis.visualize",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
