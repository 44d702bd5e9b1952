"""The level of the loss: whether a run lost what it had learnt, since when, and what went along."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from gradscope.flow.at_once import at_once
from gradscope.flow.company import company
from gradscope.flow.limits import (
    LOSS_LEVEL,
    LOSS_LOST,
    LOSS_SPREADS,
    MIN_TREND,
    SHORTEST,
    UPDATE_HIGH,
)
from gradscope.flow.precursors import precursors
from gradscope.flow.records.loss import Descent, Divergence, LossLevel
from gradscope.flow.robust import GAUSSIAN, Array, mann_kendall, nanmedian, theil_sen
from gradscope.flow.series import Series

_LONGEST_WINDOW = 32
#: Least spread of a loss, as a share of its level: a deterministic one has none.
_SPREAD_FLOOR = 1e-3
#: Share of a rise that is left of it where a loss recovers, and robust deviations that a loss which
#: fell to a third had fallen by.
_LEFT = 0.1
_FEW_SPREADS = 3.0
#: The greatest rises that are looked at.
_JUMPS = 4
#: How many times its first level a loss lies below zero that has no least value.
_DEEP = 10.0
#: Share of its first value within which a loss is near its last one.
_NEAR = 0.1
#: No trend is as likely at least where none is seen.
_P = 0.01


@dataclass(frozen=True, slots=True)
class _Levels:
    """The known losses, the records that they are of, and the median of the last few at each."""

    records: NDArray[np.intp]
    loss: Array
    rolling: Array
    window: int

    @property
    def start(self) -> float:
        return float(self.rolling[min(SHORTEST, len(self.rolling)) - 1])

    @property
    def end(self) -> float:
        """By fewer losses than elsewhere: one that still rises leaves a median behind."""
        return float(np.median(self.loss[-max(SHORTEST, self.window // 4) :]))

    def spread(self, at: int) -> float:
        """1.4826 MAD of the losses that a level is the median of.

        Few losses have no spread: at the start it is that of the calmer of the first and the last
        window, one of which may hold the rise. The lowest of many windows is calm by chance: no
        less than what neighbours differ by before it.
        """
        if at + 1 >= self.window:
            near = self.loss[max(0, at + 1 - _LONGEST_WINDOW) : at + 1]
            swing = GAUSSIAN * float(np.median(np.abs(np.diff(near)))) / 2**0.5
            return max(_spread(self.loss[at + 1 - self.window : at + 1]), swing)
        return min(_spread(self.loss[: self.window]), _spread(self.loss[-self.window :]))


def _spread(losses: Array) -> float:
    middle = float(np.median(losses))
    return max(GAUSSIAN * float(np.median(np.abs(losses - middle))), _SPREAD_FLOOR * abs(middle))


def loss_level(series: Series) -> LossLevel | None:
    """What the recorded loss did; None where fewer than eight records have one."""
    if series.history.loss is None:
        return None
    loss: Array = np.asarray(series.history.loss, dtype=np.float64)
    known = np.isfinite(loss)
    if known.sum() < MIN_TREND:
        return None
    found, lost = _levels(loss, np.flatnonzero(known)), _lost(series, loss)
    return LossLevel(
        first=found.start,
        last=found.end,
        **_constant(series, found),
        lost=lost,
        divergence=_divergence(series, loss, found, lost is not None),
        descent=_descent(series, found),
    )


def _levels(loss: Array, records: NDArray[np.intp]) -> _Levels:
    values = loss[records]
    window = min(max(len(values) // 10, SHORTEST), _LONGEST_WINDOW)
    runs = np.lib.stride_tricks.sliding_window_view(values, window)
    early = [np.median(values[: t + 1]) for t in range(window - 1)]
    return _Levels(records, values, np.concatenate([early, np.median(runs, axis=1)]), window)


def learnt(series: Series) -> bool:
    """Whether the loss has come down to zero, where no gradient is left."""
    level = loss_level(series)
    return level is not None and level.constant == 0 and level.reached


def _descent(series: Series, found: _Levels) -> Descent | None:
    """A loss that has no least value: far below zero, falling no slower than before.

    What is learnt falls ever more slowly, and its gradients with it.
    """
    lowest = int(np.argmin(found.loss))
    loss, count = found.loss[: lowest + 1], lowest + 1
    if count < 2 * MIN_TREND or not loss[-1] < -_DEEP * max(abs(found.start), found.spread(0)):
        return None
    half, quarter = float(loss[count // 2]), max(count // 4, 1)
    norms = series.total[found.records[:count]]
    early, late = nanmedian(norms[:quarter]), nanmedian(norms[-quarter:])
    slower = half - loss[-1] < found.start - half
    if slower or not early > 0 or not late >= LOSS_LEVEL * early:
        return None
    return Descent(
        first=found.start,
        last=float(loss[-1]),
        step=int(series.steps[found.records[lowest]]),
        gradient_factor=float(late / early),
    )


def _constant(series: Series, found: _Levels) -> dict[str, Any]:
    """The value that the last eight losses and more share to the bit, and how it came to that.

    A loss that falls with what is printed of it repeats itself, too: of such, that of a whole run.
    """
    loss = found.loss
    same = loss == loss[-1]
    tail = len(loss) if same.all() else int(np.argmin(same[::-1]))
    if tail < MIN_TREND or (tail < len(loss) and loss[-1] != 0 and _printed(loss)):
        return {"constant": None}
    return {
        "constant": float(loss[-1]),
        "constant_since": int(series.steps[found.records[-tail]]),
        "reached": _reached(loss[:-tail], float(loss[-1])),
    }


def _reached(before: Array, value: float) -> bool:
    """Whether losses came down to a value: all but reached it, or had it now and then.

    What is put there all at once (labels that are masked from some step on) had not.
    """
    if len(before) < MIN_TREND:
        return False
    away = np.abs(before - value)
    late, first = away[-MIN_TREND:], away[0]
    hit = bool((away[-_LONGEST_WINDOW:] == 0).any())
    return bool(np.median(late) <= (_NEAR if hit else _NEAR**2) * first)


def _printed(loss: Array) -> bool:
    """Whether no loss has more than four decimals."""
    return bool(np.allclose(loss * 1e4, np.round(loss * 1e4), rtol=0, atol=1e-4))


def _lost(series: Series, loss: Array) -> tuple[int, int] | None:
    """Between which steps the loss became NaN or infinite to the end; None if it did not.

    NaN is also how a record without a loss is written: an end is only one that is longer than the
    gaps before it.
    """
    known = np.flatnonzero(np.isfinite(loss))
    tail = loss[known[-1] + 1 :]
    gaps = np.diff(known, prepend=-1)
    if not len(tail) or not (np.isinf(tail).any() or len(tail) > 2 * (gaps.max() - 1)):
        return None
    return int(series.steps[known[-1]]), int(series.steps[known[-1] + 1])


def _divergence(series: Series, loss: Array, found: _Levels, nonfinite: bool) -> Divergence | None:
    """A loss that rose from its best level for good, or far above it or all at once for a while."""
    best = int(np.argmin(found.rolling))
    if not _risen(found, best, found.end):
        best = _before_peak(found)
    peak = found.rolling[_highest(found, best)]
    risen = _risen(found, best, found.end)
    if risen or _far(found, best, peak, _calm_start(series)):
        first = _onset(found, best, found.end if risen else peak)
    else:
        jumped = _jump(series, loss, found)
        if jumped is None:
            return None
        best, first = jumped - 1, jumped
    before, after = found.rolling[best], found.end
    record, top = int(found.records[first]), first + int(np.argmax(found.loss[first:]))
    around = company(series, record)
    steered = (around["learning_rate_factor"] or 0) >= LOSS_LEVEL
    ends: Literal["higher", "returned", "non-finite"] = "higher" if risen else "returned"
    return Divergence(
        onset=(int(series.steps[found.records[first - 1]]), int(series.steps[record])),
        before=float(before),
        after=after,
        peak=float(found.loss[top]),
        peak_step=int(series.steps[found.records[top]]),
        ends="non-finite" if nonfinite else ends,
        fell=_fell(found, best),
        progressed=bool(after < found.loss[0] - LOSS_LOST * abs(found.loss[0])),
        recovers=risen and _recovers(found, top, float(before), after),
        at_once=not steered and at_once(series, loss, record, float(before)),
        precursors=precursors(series, loss, int(found.records[best]), int(found.records[top])),
        **around,
    )


def _jump(series: Series, loss: Array, found: _Levels) -> int | None:
    """Where a loss rose at once by most, under weights that had not moved; None if nowhere.

    From ``LOSS_LEVEL`` squared times what it was, beyond its noise, for three records and more.
    """
    count = len(found.loss)
    if count < MIN_TREND + SHORTEST or not found.loss.min() > 0:
        return None
    after = nanmedian(np.lib.stride_tricks.sliding_window_view(found.loss, SHORTEST), axis=1)
    before = found.rolling[MIN_TREND - 1 : count - SHORTEST]
    times = after[MIN_TREND:] / before
    order: list[int] = np.argsort(-times)[:_JUMPS].tolist()
    for at in order:
        first, low = at + MIN_TREND, before[at]
        if times[at] < LOSS_LEVEL**2:
            return None
        beyond = after[first] - low > LOSS_SPREADS * found.spread(first - 1)
        if beyond and at_once(series, loss, int(found.records[first]), float(low)):
            return first
    return None


def _fell(found: _Levels, best: int) -> bool:
    """Whether the loss had fallen to its best level: far beyond noise, or to a third."""
    low, fall = found.rolling[best], found.loss[0] - found.rolling[best]
    least = _FEW_SPREADS if found.loss[0] >= LOSS_LEVEL * low > 0 else LOSS_SPREADS
    return bool(fall > least * found.spread(best))


def _recovers(found: _Levels, top: int, before: float, after: float) -> bool:
    """Whether little is left of a rise, and the second half of the losses since still falls."""
    late = found.loss[top + (len(found.loss) - top) // 2 :]
    line, p = theil_sen(np.arange(len(late), dtype=np.float64), late), mann_kendall(late)
    falls = line is not None and line[0] < 0 and p is not None and p < _P
    return falls and after - before <= _LEFT * (float(found.loss[top]) - before)


def _before_peak(found: _Levels) -> int:
    """The best level before the highest one."""
    return int(np.argmin(found.rolling[: _highest(found, 0) + 1]))


def _highest(found: _Levels, first: int) -> int:
    """Where the highest level is; the first few losses make none."""
    least = min(2 * SHORTEST, found.window) - 1
    first = min(max(first, least), len(found.rolling) - 1)
    return first + int(np.argmax(found.rolling[first:]))


def _risen(found: _Levels, best: int, level: float) -> bool:
    """Whether a level lies clearly above the best: beyond noise, beyond a share of what was gained.

    A positive loss must also be a multiple of the best: a plateau that creeps up is none.
    """
    low = found.rolling[best]
    rise, gained = level - low, found.loss[0] - low
    if rise < LOSS_LOST * gained:
        return False
    noise = found.spread(best)
    if low > 0 and level >= LOSS_LEVEL**2 * low:
        return bool(rise > _FEW_SPREADS * noise)
    multiple = level >= LOSS_LEVEL * low if low > 0 else rise >= gained
    return bool(multiple and rise > LOSS_SPREADS * noise)


def _calm_start(series: Series) -> bool:
    """Whether the first steps are known to have been ordinary: no one of them raised the loss."""
    early = None if series.median_update is None else series.median_update[:MIN_TREND]
    return early is not None and bool(np.nanmax(early, initial=0.0) < UPDATE_HIGH)


def _far(found: _Levels, best: int, peak: float, calm: bool) -> bool:
    """Whether the loss was far above all before for a whole window, whatever it did then.

    The first loss alone is what it came from where the first step may have raised it; else it may
    be low by chance.
    """
    low = max(found.rolling[best], found.loss[0], found.start if calm else -np.inf)
    rise, least = peak - low, _FEW_SPREADS * found.spread(best)
    return bool(low > 0 and peak >= LOSS_LEVEL**2 * low and rise > least)


def _onset(found: _Levels, best: int, level: float) -> int:
    """The first loss after the last one that is nearer to the best level than to the later one."""
    low = found.rolling[best]
    ceiling = low + max(3 * found.spread(best), (min(level, 4 * abs(low) + low) - low) / 2)
    ceiling = min(ceiling, (low + level) / 2)
    top = best + int(np.argmax(found.rolling[best:] >= min(level, found.rolling[best:].max())))
    below = np.flatnonzero(found.loss[: max(top, 1)] <= ceiling)
    return int(below[-1]) + 1 if len(below) else max(best, 1)
