"""The rules of ``gradscope explain``; importing this registers them."""

from gradscope.attribution.rules import answers, maps, trust

__all__ = ["answers", "maps", "trust"]
