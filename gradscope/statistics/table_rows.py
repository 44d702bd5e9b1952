"""Rows of a table (tokens, codes) by their ids: which are near zero, repeated, or never told apart.

The one pass counts dead and repeated rows. What is here names them, and finds the untrained
cluster: rows that training moved together because it never saw them apart (Land and Bartolo 2024,
arXiv 2405.05417). A sample of rows shows whether there is any; only then is the table read again.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from gradscope.checkpoints.tensors import TensorRef
from gradscope.checkpoints.tiles import PIECE, read_range
from gradscope.statistics import codings
from gradscope.statistics.engine import Engine
from gradscope.statistics.records import TableRows

Ids = npt.NDArray[np.int64]
Rows = npt.NDArray[np.float32]

#: A table of fewer rows, or narrower ones, has near-equal rows by chance.
LEAST_ROWS, LEAST_WIDTH = 512, 16
#: Rows sampled evenly, and from either end, where reserved ids lie.
_EVENLY, _ENDS = 2048, 512
#: A row may belong to a cluster whose centre is nearer than this share of what other rows keep
#: from it (cosines above 0.92 where norms are alike), and of the centre's own norm.
_NEAR, _EQUAL = 0.4, 0.7
#: It does within this factor of its rows' median distance; out to the same factor of that again
#: there is at most half a row for each of them: dense regions thin out, clusters end.
_MARGIN, _AROUND = 1.6, 0.5
#: Rows that a cluster has at least, in the sample and in the table.
_LEAST_SAMPLED, _LEAST = 5, 16
_PROJECTED, _SEEDS, _ROUNDS, _AT_ONCE = 64, 8, 3, 128


NO_ROWS: Rows = np.empty((0, 0), np.float32)


@dataclass(frozen=True, slots=True)
class Centre:
    """Where near-equal rows lie."""

    point: Rows  # [d]
    #: Rows nearer than this belong to it.
    reach: float
    #: What the other rows keep from it, the median.
    others: float

    def distances(self, rows: Rows) -> npt.NDArray[np.float32]:
        """Distance of each row."""
        with np.errstate(over="ignore", invalid="ignore"):  # rows far out, or not finite
            return np.asarray(np.linalg.norm(rows - self.point, axis=1))


def sampled(ref: TensorRef, hints: Iterable[int] = ()) -> Rows:
    """Some 3,500 rows of a table at most, evenly and from its ends; none of a small one.

    ``hints`` are ids worth a look, such as tokens called reserved. Raises InputError when the file
    changes or ends while it is read.
    """
    rows, width = ref.shape
    if rows < LEAST_ROWS or not LEAST_WIDTH <= width <= PIECE:
        return NO_ROWS
    return _rows_at(ref, _sample_ids(rows, width, hints))


def centre_of_cluster(rows: Rows) -> Centre | None:
    """Where a table's rows lie together that training never told apart, judged by a sample."""
    with np.errstate(over="ignore", invalid="ignore"):
        norms = np.sqrt(np.einsum("ij,ij->i", rows, rows))
    usable = norms < 1e15  # finite, and so are their squares
    if usable.sum() < LEAST_ROWS // 2:
        return None
    usable &= norms > 0.05 * np.median(norms[usable])
    rows = rows if usable.all() else rows[usable]
    if len(rows) < LEAST_ROWS // 2:
        return None
    return _cluster(rows)


def rows_by_id(
    ref: TensorRef, centre: Centre | None, near_zero: int, engine: Engine[Any, Any]
) -> TableRows:
    """Read a table once more and name its rows: the ``near_zero`` smallest, repeats, the cluster.

    Raises InputError when the file changes or ends while it is read.
    """
    parts = list(engine(lambda part: _facts(ref, part, centre), _parts(ref)))
    norms, hashes, distances = (np.concatenate([p[i] for p in parts]) for i in range(3))
    zero = np.sort(np.argsort(norms, kind="stable")[:near_zero])
    taken = np.zeros(len(norms), np.bool_)
    taken[zero] = True
    together = np.empty(0, np.int64)
    spread = None
    if centre is not None and _stands_alone(distances[~taken], centre):
        together = np.flatnonzero((distances < centre.reach) & ~taken)
        taken[together] = True
        spread = float(np.median(distances[together]) / centre.others)
    repeated = repeats(hashes, norms)
    repeated = repeated[~taken[repeated]]
    return TableRows(
        tuple(zero.tolist()), tuple(repeated.tolist()), tuple(together.tolist()), spread
    )


# -- the sample -----------------------------------------------------------------------------------


def _sample_ids(rows: int, width: int, hints: Iterable[int]) -> Ids:
    """Of wide tables fewer rows, so that the sample stays below some hundred megabytes."""
    many = max(_EVENLY * 4096 // max(width, 4096), 256)
    evenly = np.linspace(0, rows - 1, min(rows, many)).astype(np.int64)
    ends = np.concatenate([np.arange(min(_ENDS, rows)), np.arange(max(rows - _ENDS, 0), rows)])
    named = np.array([i for i in hints if 0 <= i < rows][:_ENDS], np.int64)
    return np.unique(np.concatenate([evenly, ends, named]))


def _rows_at(ref: TensorRef, ids: Ids) -> Rows:
    """Some rows; neighbours are read together."""
    width = ref.shape[1]
    most = max(PIECE // width, 1)
    stored = [
        read_range(ref, first * width, min(first + most, stop) * width)
        for start, stop in zip(*_runs(ids), strict=True)
        for first in range(start, stop, most)
    ]
    return _decoded(ref, np.concatenate(stored)).reshape(-1, width)


def _runs(ids: Ids) -> tuple[list[int], list[int]]:
    """Where runs of consecutive ids begin, and where they have ended."""
    breaks = np.flatnonzero(np.diff(ids) != 1)
    starts = ids[np.concatenate([[0], breaks + 1])]
    stops = ids[np.concatenate([breaks, [len(ids) - 1]])] + 1
    return starts.tolist(), stops.tolist()


def _decoded(ref: TensorRef, stored: npt.NDArray[Any]) -> Rows:
    with np.errstate(over="ignore", invalid="ignore"):  # float64 beyond float32, signalling NaNs
        if ref.dtype == "BF16":
            bits: npt.NDArray[np.uint32] = np.left_shift(stored, np.uint32(16), dtype=np.uint32)
            return bits.view(np.float32)
        if ref.dtype in codings.CODED:
            return np.asarray(codings.code_values(ref.dtype).astype(np.float32)[stored])
        return stored.astype(np.float32)


# -- the cluster ----------------------------------------------------------------------------------


def _cluster(sample: Rows) -> Centre | None:
    """The tightest group of near-equal rows with empty space around it.

    Seeds are the rows with the nearest neighbours in a random projection (of 64 dimensions, which
    keeps distances within a fifth); a dense region that is no cluster is left aside for the next.
    """
    some = sample[:: max(len(sample) // 512, 1)]
    unit = float(np.median(np.linalg.norm(_without_common_part(some), axis=1)))
    own = np.einsum("ij,ij->i", sample, sample)
    limit = 3 * np.minimum((_NEAR * unit) ** 2, _EQUAL**2 * own)
    left, right = _factors(sample)
    seeds = _crowding(left, right, limit)
    for _ in range(_SEEDS):
        seed = int(np.argmin(seeds))
        if seeds[seed] == np.inf:
            return None
        members = left[seed] @ right < limit[seed]
        if found := _settled(sample, members, unit):
            return found
        seeds[members] = np.inf
    return None


def _without_common_part(sample: Rows) -> Rows:
    """Rows less their mean and their first principal component, by power iteration."""
    centred = sample - sample.mean(axis=0, dtype=np.float64).astype(np.float32)
    axis = centred[int(np.argmax(np.linalg.norm(centred, axis=1)))]
    for _ in range(8):
        length = float(np.linalg.norm(axis))
        if not length:
            return np.asarray(centred)
        axis = (axis / length) @ centred.T @ centred
    axis /= np.linalg.norm(axis)
    return np.asarray(centred - np.outer(centred @ axis, axis))


def _factors(sample: Rows) -> tuple[Rows, Rows]:
    """Two matrices [n, k] and [k, n] whose product is, roughly, the square distance of each pair
    of rows.
    """
    signs = np.random.default_rng(0).choice(
        np.array([-1, 1], np.float32), (sample.shape[1], _PROJECTED)
    )
    projected = sample @ signs
    projected = (projected - projected.mean(axis=0)) / np.float32(np.sqrt(_PROJECTED))
    squares = np.einsum("ij,ij->i", projected, projected)[:, None]
    ones = np.ones_like(squares)
    left, right = (
        np.hstack([-2 * projected, squares, ones]),
        np.hstack([projected, ones, squares]),
    )
    return left, np.ascontiguousarray(right.T)


def _crowding(left: Rows, right: Rows, limit: Rows) -> Rows:
    """The square distance to its sixth-nearest row [n] of each row that has so many within its
    limit; of others infinity. Some rows at a time: all pairs would take a hundred megabytes.
    """
    found = np.full(len(left), np.inf, np.float32)
    for first in range(0, len(left), _AT_ONCE):
        block = slice(first, first + _AT_ONCE)
        squares = left[block] @ right
        crowded = np.count_nonzero(squares < limit[block, None], axis=1) > _LEAST_SAMPLED
        ranked = np.partition(squares[crowded], _LEAST_SAMPLED, axis=1)
        found[block][crowded] = ranked[:, _LEAST_SAMPLED]
    return found


def _settled(sample: Rows, members: npt.NDArray[np.bool_], unit: float) -> Centre | None:
    """The centre that some rows settle on, if they are a cluster."""
    for _ in range(_ROUNDS):
        if members.sum() < _LEAST_SAMPLED or members.all():
            return None
        point = sample[members].mean(axis=0, dtype=np.float64).astype(np.float32)
        distances = np.linalg.norm(sample - point, axis=1)
        others = float(np.median(distances[~members]))
        most = min(_NEAR * min(others, 1.4 * unit), _EQUAL * float(np.linalg.norm(point)))
        usual = float(np.median(distances[members]))
        centre = Centre(point, min(max(_MARGIN * usual, most / 2), most), others)
        members = distances < centre.reach
    return centre if _stands_alone(distances, centre, _LEAST_SAMPLED) else None


def _stands_alone(distances: npt.NDArray[np.float32], centre: Centre, least: int = _LEAST) -> bool:
    """Whether enough rows are near a centre, and few are around them."""
    inside = int((distances < centre.reach).sum())
    around = int((distances < _MARGIN * centre.reach).sum()) - inside
    return inside >= least and around <= _AROUND * inside


# -- the whole table ------------------------------------------------------------------------------


def _parts(ref: TensorRef) -> Iterator[tuple[int, int]]:
    """Runs of rows of at most a piece."""
    rows, width = ref.shape
    many = max(PIECE // width, 1)
    return ((first, min(first + many, rows)) for first in range(0, rows, many))


def _facts(
    ref: TensorRef, part: tuple[int, int], centre: Centre | None
) -> tuple[npt.NDArray[Any], npt.NDArray[Any], npt.NDArray[Any]]:
    """Norm, hash and distance from the centre of each row of a part."""
    first, stop = part
    width = ref.shape[1]
    stored = read_range(ref, first * width, stop * width)
    rows = _decoded(ref, stored).reshape(-1, width)
    distances = np.full(len(rows), np.inf, np.float32)
    if centre is not None:
        distances = np.nan_to_num(centre.distances(rows), nan=np.inf)
    with np.errstate(over="ignore", invalid="ignore"):
        norms = np.linalg.norm(rows, axis=1)
    return norms, hashes_of(stored.reshape(-1, width)), distances


def hashes_of(stored: npt.NDArray[Any]) -> npt.NDArray[np.uint64]:
    """A 64-bit hash of each row's stored elements."""
    codes = stored.view(f"u{stored.dtype.itemsize}").astype(np.uint64)
    keys = np.random.default_rng(1).integers(1, 2**63, codes.shape[1], np.uint64) * 2 + 1
    mixed = (codes + np.uint64(1)) * keys.astype(np.uint64)
    mixed ^= mixed >> np.uint64(32)
    mixed *= np.uint64(0x9E3779B97F4A7C15)
    return np.asarray(mixed.sum(axis=1, dtype=np.uint64))


def repeats(hashes: npt.NDArray[np.uint64], norms: npt.NDArray[Any]) -> Ids:
    """Rows that repeat an earlier one, rows of zeros aside."""
    alive = np.flatnonzero(norms > 0)
    _, first = np.unique(hashes[alive], return_index=True)
    again = np.ones(len(alive), np.bool_)
    again[first] = False
    return alive[again]
