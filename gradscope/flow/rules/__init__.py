"""The rules of ``gradscope flow``; importing this registers them."""

from gradscope.flow.rules import flow, health, values

__all__ = ["flow", "health", "values"]
