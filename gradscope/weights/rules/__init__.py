"""The rules of ``gradscope weights``, one module a theme; importing them registers them.

Limits cite their source; the others were set on the corpus of ``fixtures/``, so that no healthy
model of it has a high or medium finding. docs/weights.md prints that rate, and that of a hold-out
that no limit is set on.
"""

from gradscope.weights.rules import (
    adapters,
    checkpoint,
    configuration,
    copies,
    empty,
    experts,
    heads,
    layers,
    numerics,
    scales,
    shape,
    spectra,
    tables,
    training,
    units,
    values,
)

__all__ = [
    "adapters",
    "checkpoint",
    "configuration",
    "copies",
    "empty",
    "experts",
    "heads",
    "layers",
    "numerics",
    "scales",
    "shape",
    "spectra",
    "tables",
    "training",
    "units",
    "values",
]
