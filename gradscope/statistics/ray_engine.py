"""The engine of a cluster: something with map, whose tasks Ray runs wherever there is a core.

Every node must have this version of gradscope, and see the files under the same paths. Without a
cluster (``ray start``, or RAY_ADDRESS) Ray starts one of this machine.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from typing import Any, TypeVar

from gradscope.errors import GradscopeError, UsageError
from gradscope.statistics.engine import Engine, one_blas_thread

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class _Failed:
    """An error that is meant for the user, on its way back to who raises it."""

    error: GradscopeError


def tasks_of_ray(jobs: int | None = None) -> Engine[Any, Any]:
    """Map over the cores of a cluster, at most ``jobs`` tasks at once.

    Raises UsageError where Ray is not installed or no cluster answers.
    """
    try:
        import ray
    except ImportError as error:
        raise UsageError(
            "--engine ray needs ray: pip install 'gradscope-diagnostics[ray]'"
        ) from error
    _connect(ray)
    call = ray.remote(_call)

    def run(function: Callable[[T], R], tasks: Iterable[T]) -> Iterator[R]:
        most = jobs or 2 * max(1, int(ray.cluster_resources().get("CPU", 1)))
        remaining = iter(tasks)
        shared = ray.put(function)
        folder = os.getcwd()
        ahead = [call.remote(shared, task, folder) for task in islice(remaining, most)]
        try:
            while ahead:
                result = ray.get(ahead.pop(0))
                ahead += [call.remote(shared, task, folder) for task in islice(remaining, 1)]
                if isinstance(result, _Failed):
                    raise result.error
                yield result
        finally:
            for waiting in ahead:
                ray.cancel(waiting)

    return run


def _connect(ray: Any) -> None:
    if ray.is_initialized():
        return
    try:
        ray.init(log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError, ValueError) as error:
        first = str(error).split("\n", 1)[0]
        raise UsageError(f"--engine ray: no cluster answers: {first}") from error


def _call(function: Callable[[T], R], task: T, folder: str) -> R | _Failed:
    """One task, where it runs: paths are relative to the folder of who asked."""
    with suppress(OSError):
        os.chdir(folder)
    with one_blas_thread():
        try:
            return function(task)
        except GradscopeError as error:
            return _Failed(error)
