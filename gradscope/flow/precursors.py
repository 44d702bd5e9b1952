"""What left its range first before a loss rose: the steps, the gradients, or the loss itself.

A rate that is too high shows in the steps before it shows in the gradient, and there before the
loss; a bad batch or broken labels show in the loss first.
"""

from __future__ import annotations

import numpy as np

from gradscope.flow.limits import MIN_TREND
from gradscope.flow.records.loss import Precursed, Precursor
from gradscope.flow.robust import Array, nanmedian, spread
from gradscope.flow.series import Series

_REFERENCE = 32
_SPREADS = 6.0
#: A series leaves its range at the first of so many known values of which more than half do.
_SUSTAINED = 4
#: Least rise, as a factor: series without noise have no spread.
_LEAST = 2.0


def precursors(series: Series, loss: Array, best: int, peak: int) -> tuple[Precursor, ...]:
    """What rose out of its range between about the record of the best loss and that of the peak.

    Each series is compared with its own values until just before the best loss: median plus six
    robust deviations and at least twice the median, of logarithms. In order of onset. Empty where
    fewer than eight records precede; a loss that is not positive is left out.
    """
    measured: dict[Precursed, Array | None] = {
        "updates": None if series.update_ratio is None else nanmedian(series.update_ratio, axis=1),
        "gradients": series.total,
        "loss": loss,
    }
    found = (
        Precursor(what=what, onset=onset)
        for what, values in measured.items()
        if values is not None and (onset := _leaves(series, values, best, peak))
    )
    return tuple(sorted(found, key=lambda precursor: precursor.onset[1]))


def _leaves(series: Series, values: Array, best: int, peak: int) -> tuple[int, int] | None:
    """Between which steps a positive series rises above its range for good."""
    with np.errstate(divide="ignore", invalid="ignore"):
        logs = np.log(values)
    calm = max(0, best + 1 - _SUSTAINED)  # the best level is a median: what follows may be in it
    usual = logs[max(0, calm - _REFERENCE) : calm]
    usual = usual[np.isfinite(usual)]
    if len(usual) < MIN_TREND:
        return None
    limit = nanmedian(usual) + max(_SPREADS * spread(usual), np.log(_LEAST))
    records = calm + np.flatnonzero(~np.isnan(logs[calm : peak + 1]))
    above = logs[records] > limit
    for at in np.flatnonzero(above[1:]).tolist():
        if above[at + 1 : at + 1 + _SUSTAINED].mean() > 0.5:
            before, until = series.steps[records[at : at + 2]].tolist()
            return before, until
    return None
