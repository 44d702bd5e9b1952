"""The one pass: every tensor measured from one read of the data, over threads if wanted."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any, TypeVar

from gradscope.checkpoints.tensors import TensorRef
from gradscope.checkpoints.tiles import Tile, tiles
from gradscope.statistics.description import Finished, Pool, finish
from gradscope.statistics.layout import UnitLayout
from gradscope.statistics.records import Statistics, TensorProfile
from gradscope.statistics.scan import scan as cpu_scan
from gradscope.statistics.tally import Scan, Tally, merged, tally

T = TypeVar("T")
R = TypeVar("R")

#: "Something with map": applies a function to tasks and yields the results in their order.
Engine = Callable[[Callable[[T], R], Iterable[T]], Iterator[R]]

#: Elements a unit of work covers: many small tensors, or one tile of a large one.
TASK_ELEMENTS = 16 << 20


@dataclass(frozen=True, slots=True)
class Profile:
    """The tensors in file order, and their elements pooled by group."""

    tensors: tuple[TensorProfile, ...]
    pools: Mapping[str, Pool]


def profile(
    refs: Sequence[TensorRef],
    *,
    group: Callable[[TensorRef], str | None] = lambda _: None,
    layout: Callable[[TensorRef], UnitLayout | None] = lambda _: None,
    engine: Engine[Any, Any] | None = None,
    scan: Scan = cpu_scan,
    tile_elements: int = TASK_ELEMENTS,
    progress: Callable[[int], None] = lambda _: None,
) -> Profile:
    """Measure every tensor in one read.

    ``group`` names the pool a tensor's elements join, or None; ``layout`` says what its units are,
    None that they are its rows. ``progress`` is told bytes done.
    The result is the same to the bit for every engine and tile size.
    Raises InputError when a file changes or ends while it is read.
    """
    run = engine or threads()
    work = _Work(scan)
    found: dict[TensorRef, TensorProfile] = {}
    pools: dict[str, Pool] = {}
    whole: Tally | None = None
    for results in run(work, _tasks(refs, tile_elements, layout)):
        for tile, result in results:
            progress(_tile_bytes(tile))
            if isinstance(result, Tally):
                whole = merged([result] if whole is None else [whole, result])
                if tile.stop < tile.ref.numel:
                    continue
                result, whole = finish(whole), None
            found[tile.ref] = result.profile
            if (name := group(tile.ref)) is not None:
                pools.setdefault(name, Pool()).add(result)
    return Profile(tuple(found.get(ref) or _empty(ref) for ref in refs), pools)


def threads(jobs: int | None = None) -> Engine[Any, Any]:
    """Map over threads of this process: the kernels and reads leave the GIL."""
    workers = jobs or _available_cores()

    def run(function: Callable[[T], R], tasks: Iterable[T]) -> Iterator[R]:
        if workers == 1:
            yield from map(function, tasks)
            return
        remaining = iter(tasks)
        with ThreadPoolExecutor(workers) as pool:
            ahead: list[Future[R]] = [
                pool.submit(function, task) for task in islice(remaining, 2 * workers)
            ]
            try:
                while ahead:
                    result = ahead.pop(0).result()
                    ahead += [pool.submit(function, task) for task in islice(remaining, 1)]
                    yield result
            finally:
                for future in ahead:
                    future.cancel()

    return run


@contextmanager
def one_blas_thread() -> Iterator[None]:
    """Within it, BLAS uses one thread for each of an engine's tasks: they serve the cores better.

    LAPACK's reduction of a matrix hardly gains by threads, which wait for one another at every
    column, and products with one vector take ten times as long where cores are shared. And the
    same bytes come out on any number of cores.
    """
    from threadpoolctl import threadpool_limits

    with threadpool_limits(limits=1, user_api="blas"):
        yield


def _available_cores() -> int:
    """Cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _tile_bytes(tile: Tile) -> int:
    """Bytes a tile covers."""
    return (tile.stop - tile.start) * tile.ref.nbytes // tile.ref.numel


@dataclass(frozen=True, slots=True)
class _Work:
    """Measure a task's tiles; whole tensors are finished where they were measured."""

    scan: Scan

    def __call__(self, task: Sequence[_Laid]) -> list[tuple[Tile, Tally | Finished]]:
        done: list[tuple[Tile, Tally | Finished]] = []
        for tile, layout in task:
            part = tally(tile, self.scan, layout)
            whole = tile.start == 0 and tile.stop == tile.ref.numel
            done.append((tile, finish(part) if whole else part))
        return done


#: A tile, and what the units of its tensor are.
_Laid = tuple[Tile, UnitLayout | None]


def _tasks(
    refs: Iterable[TensorRef], elements: int, layout: Callable[[TensorRef], UnitLayout | None]
) -> Iterator[list[_Laid]]:
    """Tiles in file order, small tensors together."""
    task: list[_Laid] = []
    size = 0
    for tile in (tile for ref in refs for tile in tiles(ref, elements)):
        if task and size + tile.stop - tile.start > elements:
            yield task
            task, size = [], 0
        task.append((tile, layout(tile.ref)))
        size += tile.stop - tile.start
    if task:
        yield task


def _empty(ref: TensorRef) -> TensorProfile:
    return TensorProfile(ref, Statistics())
