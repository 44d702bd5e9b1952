"""The rules of ``gradscope weights``, one module a theme; importing them registers them.

Limits marked "calibrated" were set on the corpus of ``fixtures/`` so that no healthy model in it has
a high or medium finding; docs/weights.md prints that rate, and the one of a hold-out that no limit
is set on. The others cite their source.
"""

from gradscope.weights.rules import (
    checkpoint,
    copies,
    empty,
    numerics,
    shape,
    training,
    units,
    values,
)

__all__ = ["checkpoint", "copies", "empty", "numerics", "shape", "training", "units", "values"]
