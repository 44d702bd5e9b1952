"""The rules of ``gradscope flow``; importing this registers them."""

from gradscope.flow.rules import loss, magnitudes, motion, optimizer, paths

__all__ = ["loss", "magnitudes", "motion", "optimizer", "paths"]
