"""What casting a tensor to some types costs, from one more read of its elements.

Where one scale, or none, serves the whole of a tensor of 16 bits and fewer, the counts of its codes
are enough: every distinct value is cast once. Otherwise every element is.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt

from gradscope.casts.formats import Target
from gradscope.casts.kernels import cast_rows
from gradscope.checkpoints.tensors import TensorRef
from gradscope.checkpoints.tiles import PIECE, read_range
from gradscope.statistics.codings import CODED, code_values
from gradscope.statistics.engine import Engine
from gradscope.statistics.kernels import count_codes

Array = npt.NDArray[Any]

#: Elements of one task.
_TASK = 16 * PIECE


@dataclass(frozen=True, slots=True)
class Loss:
    """What casting costs some elements. ``error`` and ``signal`` are sums of squares, the error
    that of the elements which do not overflow; ``worst`` is the greatest difference.

    A few great elements decide those sums, and may hide that all others are lost:
    ``bulk_error`` and ``bulk_signal`` leave out what is beyond the subject's limit.
    """

    overflow: int = 0
    underflow: int = 0
    error: float = 0.0
    signal: float = 0.0
    bulk_error: float = 0.0
    bulk_signal: float = 0.0
    worst: float = 0.0

    @property
    def relative(self) -> float | None:
        """‖cast − x‖ / ‖x‖; None of zeros."""
        return math.sqrt(self.error / self.signal) if self.signal > 0 else None

    @property
    def snr_db(self) -> float | None:
        """Signal to noise in decibels, infinite where nothing is lost; None of zeros."""
        return decibels(self.signal, self.error)

    @property
    def bulk_snr_db(self) -> float | None:
        """The same without the greatest elements."""
        return decibels(self.bulk_signal, self.bulk_error)

    @property
    def lowest_db(self) -> float:
        """The lower of both; infinite of zeros."""
        known = (ratio for ratio in (self.snr_db, self.bulk_snr_db) if ratio is not None)
        return min(known, default=math.inf)


def decibels(signal: float, error: float) -> float | None:
    """10 log₁₀ of a ratio of energies; None without a signal."""
    if not signal > 0:
        return None
    return 10 * (math.log10(signal) - math.log10(error)) if error > 0 else math.inf


@dataclass(frozen=True, slots=True)
class Subject:
    """A tensor to cast, seen as a matrix whose rows share scales.

    ``peak`` is its greatest magnitude, ``limit`` the one that few elements are beyond; the columns
    that are ``kept`` are none of it. Only rows of at most a piece can have such. It may be a part
    of the tensor (an expert), whose rows begin at ``first``.
    """

    ref: TensorRef
    rows: int
    columns: int
    peak: float
    limit: float = math.inf
    kept: tuple[int, ...] = ()
    first: int = 0

    @property
    def coded(self) -> bool:
        """Whether counts of its codes tell what it holds."""
        return self.ref.decoding is None and self.ref.dtype in CODED


def losses(
    subjects: Sequence[Subject], targets: Sequence[Target], engine: Engine[Any, Any]
) -> Iterator[tuple[Loss, ...]]:
    """What each target costs each subject, in their order, the same for any engine.

    Elements that are not finite count as zeros. Raises InputError when a file changes.
    """
    tasks = (task for subject in subjects for task in _tasks(subject))
    found = engine(_Work(tuple(targets)), tasks)
    for subject in subjects:
        parts = list(islice(found, sum(1 for _ in _tasks(subject))))
        yield tuple(map(_merged, zip(*parts, strict=True)))


def column_peaks(
    subjects: Sequence[Subject], engine: Engine[Any, Any]
) -> Iterator[npt.NDArray[np.float64]]:
    """The greatest finite magnitude in each column. Raises InputError when a file changes."""
    tasks = [list(_tasks(subject)) for subject in subjects]
    found = engine(_peaks_of_columns, (task for parts in tasks for task in parts))
    for parts in tasks:
        yield np.max(list(islice(found, len(parts))), axis=0)


def _peaks_of_columns(task: _Task) -> Array:
    peaks = [np.abs(task.values(span)).max(axis=0) for span in task.spans()]
    return np.asarray(np.max(peaks, axis=0), np.float64)


def _merged(parts: Sequence[Loss]) -> Loss:
    over, under, *sums, worst = zip(*map(astuple, parts), strict=True)
    error, signal, bulk_error, bulk_signal = map(math.fsum, sums)
    return Loss(sum(over), sum(under), error, signal, bulk_error, bulk_signal, max(worst))


@dataclass(frozen=True, slots=True)
class _Task:
    """Some rows of a subject."""

    subject: Subject
    first: int
    last: int

    def spans(self) -> list[tuple[int, int]]:
        """Runs of at most a piece: of whole rows where these are short, else of one row."""
        columns = self.subject.columns
        start, stop = self.first * columns, self.last * columns
        step = PIECE // columns * columns or PIECE
        return [(at, min(at + step, stop)) for at in range(start, stop, step)]

    def read(self, span: tuple[int, int]) -> Array:
        """The stored elements of a run as a matrix."""
        columns = self.subject.columns
        stored = read_range(self.subject.ref, *span)
        return stored.reshape(-1, columns if columns <= PIECE else stored.size)

    def values(self, span: tuple[int, int]) -> Array:
        """The elements of a run, zero where they are not finite or not cast."""
        found = _finite(self.subject.ref, self.read(span))
        if self.subject.kept:
            found[:, self.subject.kept] = 0
        return found

    def long_peaks(self) -> Array | None:
        """The greatest magnitude of a row that is longer than a run; None where rows are short."""
        if self.subject.columns <= PIECE:
            return None
        return np.asarray(np.max([_peaks(self.values(span)) for span in self.spans()], axis=0))


def _tasks(subject: Subject) -> Iterator[_Task]:
    """Cut into whole rows, by size alone."""
    step = max(_TASK // subject.columns, 1)
    end = subject.first + subject.rows
    for first in range(subject.first, end, step):
        yield _Task(subject, first, min(first + step, end))


@dataclass(frozen=True, slots=True)
class _Work:
    """What each target costs the elements of a task."""

    targets: tuple[Target, ...]

    def __call__(self, task: _Task) -> list[Loss]:
        counted = [t for t in self.targets if task.subject.coded and t.grain in ("plain", "tensor")]
        rest = [t for t in self.targets if t not in counted]
        found = _of_codes(task, counted) if counted else {}
        found |= _of_elements(task, rest) if rest else {}
        return [found[t.name] for t in self.targets]


def _of_elements(task: _Task, targets: Sequence[Target]) -> dict[str, Loss]:
    rows: dict[str, list[Array]] = {t.name: [] for t in targets}
    by_row = any(t.grain == "row" for t in targets)
    long = task.long_peaks() if by_row else None
    for span in task.spans():
        values = task.values(span)
        of_rows = _peaks(values) if by_row and long is None else long
        for t in targets:
            rows[t.name].append(_cast(values, t, task.subject, of_rows))
    return {name: _summed(parts) for name, parts in rows.items()}


def _of_codes(task: _Task, targets: Sequence[Target]) -> dict[str, Loss]:
    """From the counts of codes: each code is a row of one element."""
    table = np.zeros(1 << 16, np.uint32)
    for span in task.spans():
        stored = task.read(span)
        if task.subject.kept:
            stored = np.delete(stored, task.subject.kept, axis=1)
        stored = stored.reshape(-1)
        count_codes(stored.view(f"u{stored.itemsize}"), table)
    codes = np.flatnonzero(table)
    counts = table[codes][:, None]
    values = _finite(task.subject.ref, codes)[:, None]
    found = {}
    for t in targets:
        rows = _cast(values, t, task.subject)
        rows[:, :-1] *= counts
        found[t.name] = _summed([rows])
    return found


def _peaks(values: Array) -> Array:
    """The greatest magnitude of each row."""
    return np.asarray(np.maximum(values.max(axis=1), -values.min(axis=1)))


def _finite(ref: TensorRef, stored: Array) -> Array:
    """The values of stored elements (or codes) as floats, zero where they are not finite."""
    if ref.dtype in CODED:
        stored = code_values(ref.dtype).astype(np.float32)[stored]
    return np.where(np.isfinite(stored), stored, stored.dtype.type(0))


def _cast(values: Array, t: Target, subject: Subject, row_peaks: Array | None = None) -> Array:
    """[rows, 7] of losses, as ``kernels.cast_rows`` fills it."""
    kind = values.dtype.type
    by_row = t.grain == "row" and row_peaks is not None
    peaks = row_peaks if by_row else np.full(len(values), subject.peak, kind)
    scales = peaks / kind(t.greatest) if t.grain in ("row", "tensor") else np.ones_like(peaks)
    scales[scales == 0] = 1
    own = float(np.float32(subject.peak / (t.greatest * 448))) if t.own_bits else 0.0
    out = np.zeros((len(values), 7))
    cast_rows(
        values, scales, t.block, own or 1.0, t.powers, t.mantissa_bits, t.least_exponent,
        t.greatest, t.grain != "plain", subject.limit, out,
    )  # fmt: skip
    return out


def _summed(rows: Sequence[Array]) -> Loss:
    every = np.concatenate(rows)
    over, under, error, signal, bulk_error, bulk_signal = every[:, :-1].sum(axis=0).tolist()
    worst = float(every[:, -1].max())
    return Loss(int(over), int(under), error, signal, bulk_error, bulk_signal, worst)
