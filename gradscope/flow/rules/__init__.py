"""The rules of ``gradscope flow``; importing this registers them."""

from gradscope.flow.rules import magnitudes, motion, paths

__all__ = ["magnitudes", "motion", "paths"]
