"""Tables of indices (position ids, relative positions): whether their values are what they must be.

Such a buffer is a constant of the architecture. A merge that averages everything, or a cast to half
precision, turns its integers into fractions or repeats, and the model then looks up wrong rows.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from gradscope.checkpoints.tensors import TensorRef
from gradscope.checkpoints.tiles import PIECE
from gradscope.statistics.codings import COMPLEX
from gradscope.weights.products import values
from gradscope.weights.result import IndexResult

Values = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class _Wrong:
    """Where a table is not what it must be, and what it should hold there, where that is known."""

    where: npt.NDArray[np.bool_]
    wanted: Values | None = None


def index_results(refs: Iterable[TensorRef]) -> Iterator[IndexResult]:
    """The tables of indices that are wrong, in file order.

    Values that are not finite are another rule's. Raises InputError when a file changes meanwhile.
    """
    for ref in refs:
        check = _check_for(ref)
        if check is not None and 0 < ref.numel <= PIECE and ref.dtype not in COMPLEX:
            table = values(ref).reshape(ref.shape)
            wrong = check(table) if np.isfinite(table).all() else None
            if wrong is not None and wrong.where.any():
                yield _result(ref, table, wrong)


def _result(ref: TensorRef, table: Values, wrong: _Wrong) -> IndexResult:
    first = np.unravel_index(int(wrong.where.argmax()), table.shape)
    return IndexResult(
        name=ref.name,
        wrong=int(wrong.where.sum()),
        fractions=int((table != np.round(table)).sum()),
        repeats=0 if wrong.wanted is None else _repeats(table),
        first=tuple(int(i) for i in first),
        value=float(table[first]),
        wanted=None if wrong.wanted is None else float(wrong.wanted[first]),
    )


def _repeats(table: Values) -> int:
    """Elements that repeat another of their row."""
    rows = np.sort(table.reshape(-1, table.shape[-1]))
    return int((rows[:, 1:] == rows[:, :-1]).sum())


def _check_for(ref: TensorRef) -> Callable[[Values], _Wrong | None] | None:
    leaf = ref.name.rpartition(".")[2]
    if not _ANY.fullmatch(leaf):
        return None
    return next(check for pattern, check in _CHECKS.items() if re.fullmatch(pattern, leaf))


def _positions(table: Values) -> _Wrong | None:
    """Each row counts up by one, from 0 or wherever most of it started."""
    if table.ndim == 0 or table.shape[-1] < 2 or table.size // table.shape[-1] > table.shape[-1]:
        return None  # coordinates, not positions
    steps = np.arange(table.shape[-1], dtype=np.float64)
    starts, counts = np.unique(table - steps, return_counts=True)
    start = starts[counts.argmax()]
    if 2 * counts.max() <= table.size or start < 0 or start != np.round(start):
        start = 0
    wanted = np.broadcast_to(steps + start, table.shape)
    return _Wrong(table != wanted, wanted)


def _relative(table: Values) -> _Wrong | None:
    """Integers of which those of (i, j) and (j, i) have the same sum for all i and j.

    They number the difference of two places in a window, which changes its sign when the places are
    exchanged. A class token, as in BEiT, adds a first row and column that follow no such law.
    """
    fractions = table != np.round(table)
    if table.ndim != 2 or table.shape[0] != table.shape[1] or fractions.any():
        return _Wrong(fractions | (table < 0))
    inner = table[1:, 1:] if _asymmetric(table).any() else table
    where = np.zeros(table.shape, np.bool_)
    where[-len(inner) :, -len(inner) :] = _asymmetric(inner)
    return _Wrong(where | (table < 0))


def _asymmetric(table: Values) -> npt.NDArray[np.bool_]:
    sums = table + table.T
    usual, counts = np.unique(sums, return_counts=True)
    asymmetric: npt.NDArray[np.bool_] = sums != usual[counts.argmax()]
    return asymmetric


def _permutation(table: Values) -> _Wrong | None:
    """Each of 0 … n - 1 once. What goes beyond n - 1 permutes something else: only fractions."""
    fractions = table != np.round(table)
    if table.ndim != 1 or fractions.any() or table.min() < 0 or table.max() >= table.size:
        return _Wrong(fractions)
    _, first = np.unique(table, return_index=True)
    repeats = np.ones(table.shape, np.bool_)
    repeats[first] = False
    return _Wrong(repeats)


def _integers(table: Values) -> _Wrong | None:
    return _Wrong(table != np.round(table))


#: What tables of indices are called -> what they must be.
_CHECKS: Mapping[str, Callable[[Values], _Wrong | None]] = {
    r"(position|pos)_ids": _positions,
    r"relative_position_index\w*|rel_pos_index": _relative,
    r"perm|permutation|inv(erse)?_perm(utation)?|perm_inv": _permutation,
    r"token_type_ids|attention_bias_idxs|bucket_(index|ids)": _integers,
}
_ANY = re.compile("|".join(_CHECKS))
