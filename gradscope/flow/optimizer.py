"""What the optimizer makes of the gradients: what it holds, what epsilon and clipping leave."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from gradscope.flow.directions import Cosines
from gradscope.flow.levels import Levels
from gradscope.flow.limits import ATTENUATED, MIN_TREND, MIN_WINDOW
from gradscope.flow.records.optimizer import Accumulation, Captures, Clipping, Damping, Unoptimized
from gradscope.flow.robust import Array, nanmedian, theil_sen
from gradscope.flow.series import Mask, Series

#: A norm is pinned when it repeats this closely.
_PINNED = 1e-3
#: Records from the start that accumulation is looked for in: later the run has gone elsewhere.
_EARLY = 64
_TINY = 1e-300


def unoptimized(series: Series) -> Unoptimized | None:
    """Parameters that get a gradient and that no optimizer holds; None without any.

    The file says so (a group below zero where others have one, or in a file that counts the
    optimizer's steps), and no step ever changed them.
    """
    rows = series.history.layers
    groups = [row.group for row in rows]
    meta = series.history.meta
    known = any(group is not None for group in groups) or bool(meta.get("optimizer_steps"))
    if not isinstance(meta.get("optimizer"), Mapping) or not known:
        return None
    reached: Mask = np.any(series.history.l2 > 0, axis=0)
    update = series.history.update_l2
    moved: Mask = np.zeros(len(rows), bool) if update is None else np.any(update > 0, axis=0)
    loose = frozenset(np.flatnonzero(reached & ~moved & [g is None for g in groups]).tolist())
    layers = [row for row, parts in enumerate(series.parts) if loose.intersection(parts)]
    if not layers:
        return None
    found = [_loose(series, row, loose) for row in layers]
    sizes = [rows[part].numel for row in layers for part in series.parts[row] if part in loose]
    parameters = None if None in sizes else sum(size or 0 for size in sizes)
    whole = series.numel(range(len(series.layers)))
    return Unoptimized(
        layers=tuple(series.names[row] for row in layers),
        named=tuple(name for names in found for name in names),
        parameters=parameters,
        share=parameters / whole if parameters is not None and whole else _share(series, layers),
    )


def _loose(series: Series, row: int, loose: frozenset[int]) -> list[str]:
    """A layer's name, or those of its parameters if only some of them are in no group."""
    parts = series.parts[row]
    if loose.issuperset(parts):
        return [series.names[row]]
    return [series.history.layers[part].name for part in parts if part in loose]


def damping(series: Series, levels: Levels, window: int) -> Damping | None:
    """What an adaptive optimizer's epsilon leaves of the steps at the end; None for any other.

    RMS / (RMS + eps) of each layer, clipped as the step was: the median over the last window.
    """
    eps, rms = series.adaptive_epsilon, series.rms
    if eps is None or levels.attenuation is None:
        return None
    clip = series.history.clip_coefficient
    if clip is not None:
        known = np.where(np.isfinite(clip), np.minimum(clip, 1.0), 1.0)
        rms = rms * known[:, None]
    left = nanmedian((rms / (rms + eps))[-window:], axis=0)
    rows = np.flatnonzero(left < ATTENUATED).tolist()
    return Damping(
        epsilon=eps,
        layers=tuple(series.names[row] for row in rows),
        share=_share(series, rows) if rows else 0.0,
        left=float(nanmedian(left)) if np.isfinite(left).any() else None,
        clipped=bool(clip is not None and nanmedian(clip[-window:]) < 1.0),
    )


def clipping(series: Series) -> Clipping | None:
    """How many steps were clipped, and how far; None where it cannot be told.

    Told by the recorded coefficients; of norms recorded after clipping, by a total that does not
    move from its greatest value.
    """
    coefficient = series.history.clip_coefficient
    if coefficient is not None and np.isfinite(coefficient).sum() >= MIN_TREND:
        known = coefficient[np.isfinite(coefficient)]
        cut = known[known < 1.0]
        return Clipping(
            share=len(cut) / len(known),
            median=float(np.median(cut)) if len(cut) else None,
            limit=None,
            proportional=series.proportional,
        )
    total = _total(series)
    known = total[np.isfinite(total) & (total > 0)]
    if len(known) < 2 * MIN_TREND:
        return None
    top = float(known.max())
    return Clipping(share=float((known > top * (1 - _PINNED)).mean()), median=None, limit=top)


def captures(series: Series) -> Captures | None:
    """Calls of the recorder and steps that followed; None where the file does not count both."""
    calls, steps = (series.history.meta.get(key) for key in ("captures", "optimizer_steps"))
    if not isinstance(calls, int) or not isinstance(steps, int):
        return None
    skipped = series.skipped
    return Captures(calls=calls, steps=steps, skipped=float(skipped.mean()) if len(skipped) else 0)


def accumulation(
    series: Series, found: Cosines | None, loose: Unoptimized | None
) -> Accumulation | None:
    """Gradients that add up from step to step, as without ``zero_grad``; None without the signs.

    Each gradient is then the one before plus a batch's own: they agree nearly fully, the norm
    climbs, and what is added keeps its size, where a gradient that grows by itself grows in what
    is added too. Needs cosines of successive steps. Layers that no optimizer holds are left out:
    theirs add up in any run.
    """
    if found is None or found.lag != 1:
        return None
    early = found.after < _EARLY
    outside = set(loose.layers) if loose else set()
    held = np.array([name not in outside for name in series.names])
    one, two, inner = _products(series, found, early, held)
    known = np.isfinite(one) & np.isfinite(two) & (one > 0) & (two > 0)
    one, two, inner = one[known], two[known], inner[known]
    if len(one) < MIN_WINDOW:
        return None
    added = np.sqrt(np.maximum(one**2 + two**2 - 2 * inner, 0.0))
    third = max(len(one) // 3, 1)
    slope = theil_sen(np.log(two), np.log(np.maximum(added, _TINY)))
    return Accumulation(
        cosine=float(np.median((inner / (one * two))[third:])),
        growth=float(np.median(two[-third:]) / one[0]),
        added=float(np.median(added) / one[0]),
        added_growth=slope[0] if slope else None,
        doubled=float(two[0] / one[0]) if found.before[early][0] == 0 else None,
    )


def _products(
    series: Series, found: Cosines, pairs: Mask, rows: Mask
) -> tuple[Array, Array, Array]:
    """Norms of the gradient of some layers in each pair of records, and inner products."""
    a = np.nan_to_num(series.norm[found.before[pairs]][:, rows])
    b = np.nan_to_num(series.norm[found.after[pairs]][:, rows])
    inner = (np.nan_to_num(found.cosine[pairs][:, rows]) * a * b).sum(axis=1)
    return np.linalg.norm(a, axis=1), np.linalg.norm(b, axis=1), inner


def _total(series: Series) -> Array:
    total = series.history.total_l2
    if total is not None and np.isfinite(total).any():
        return np.asarray(total, dtype=np.float64)
    norms: Array = series.total
    return np.where(np.isfinite(series.norm).any(axis=1), norms, np.nan)


def _share(series: Series, rows: list[int]) -> float:
    """Of the parameters where sizes are known, else of the layers."""
    part, whole = series.numel(rows), series.numel(range(len(series.layers)))
    return part / whole if part is not None and whole else len(rows) / len(series.layers)
