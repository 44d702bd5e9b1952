"""Statistics of tensors from one read of their bytes: ``profile`` measures, ``threads`` spreads it.

Loaded when first used, so that the plain records in ``records`` cost no numerical library.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__all__ = ["Engine", "Pool", "Profile", "Scan", "profile", "scan_on", "threads"]

if TYPE_CHECKING:
    from gradscope.statistics.description import Pool
    from gradscope.statistics.engine import Engine, Profile, profile, threads
    from gradscope.statistics.tally import Scan
    from gradscope.statistics.torch_scan import scan_on

_HOMES = {
    "Engine": "engine",
    "Pool": "description",
    "Profile": "engine",
    "Scan": "tally",
    "profile": "engine",
    "scan_on": "torch_scan",
    "threads": "engine",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
