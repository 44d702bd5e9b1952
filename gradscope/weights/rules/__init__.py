"""The rules of ``gradscope weights``, one module a theme; importing them registers them.

Limits marked "calibrated" were set on the healthy models of ``fixtures/`` so that none of them has
a high finding; docs/weights.md prints that rate. The others cite their source.
"""

from gradscope.weights.rules import (
    adapters,
    checkpoint,
    configuration,
    numerics,
    shape,
    training,
    units,
    values,
)

__all__ = [
    "adapters",
    "checkpoint",
    "configuration",
    "numerics",
    "shape",
    "training",
    "units",
    "values",
]
