"""The rules of ``gradscope flow``; importing this registers them."""

from gradscope.flow.rules import (
    dead,
    exploding,
    loss,
    missing,
    motion,
    nonfinite,
    optimizer,
    paths,
    vanishing,
)

__all__ = [
    "dead",
    "exploding",
    "loss",
    "missing",
    "motion",
    "nonfinite",
    "optimizer",
    "paths",
    "vanishing",
]
