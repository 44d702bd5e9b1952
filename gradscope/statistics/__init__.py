"""Statistics of tensors from one read of their bytes: ``profile`` measures, ``threads`` spreads it.

Loaded when first used, so that the plain records in ``records`` cost no numerical library.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from importlib import import_module
from typing import TYPE_CHECKING, Any, TypeVar

from gradscope.errors import UsageError
from gradscope.text import quoted

__all__ = ["Engine", "Pool", "Profile", "Scan", "engine_for", "profile", "scan_for", "threads"]

if TYPE_CHECKING:
    from gradscope.statistics.description import Pool
    from gradscope.statistics.engine import Engine, Profile, profile, threads
    from gradscope.statistics.tally import Scan

T = TypeVar("T")
R = TypeVar("R")

_HOMES = {
    "Engine": "engine",
    "Pool": "description",
    "Profile": "engine",
    "Scan": "tally",
    "profile": "engine",
    "threads": "engine",
}


def scan_for(device: str) -> Scan:
    """The kernels of a device; torch is imported for any but the CPU. Raises UsageError."""
    if device == "cpu":
        from gradscope.statistics.scan import scan

        return scan
    from gradscope.statistics.torch_scan import scan_on

    return scan_on(device)


def engine_for(name: str, jobs: int | None = None) -> Engine[Any, Any]:
    """What spreads the work: ``local``, threads of this process, or ``ray``, a cluster.

    Raises UsageError for another name, and where Ray is not installed.
    """
    if name == "local":
        return partial(_locally, jobs)
    if name != "ray":
        raise UsageError(f"--engine is local or ray, not {quoted(name)}")
    from gradscope.statistics.ray_engine import tasks_of_ray

    return tasks_of_ray(jobs)


def _locally(jobs: int | None, function: Callable[[T], R], tasks: Iterable[T]) -> Iterator[R]:
    from gradscope.statistics.engine import threads  # which headers have no use for

    yield from threads(jobs)(function, tasks)


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
