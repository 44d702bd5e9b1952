"""What differs between two runs, over the steps that both have."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from gradscope.flow.levels import DECADE
from gradscope.flow.limits import MIN_WINDOW
from gradscope.flow.records.against import Against, FindingAgainst, LayerAgainst, OnsetAgainst, Pair
from gradscope.flow.records.regions import Region
from gradscope.flow.result import FlowResult
from gradscope.flow.robust import Array, nanmedian, spread
from gradscope.flow.series import Series
from gradscope.histories.history import Integers
from gradscope.report.model import Finding

#: Robust deviations, and decades (a factor of two), from which a layer's level differs.
_SPREADS = 3.0
_LEAST = float(np.log10(2.0))


@dataclass(frozen=True, eq=False)
class Run:
    """One of two runs, cut to the steps of both: its series, what was measured and said of it."""

    path: str
    series: Series
    result: FlowResult
    findings: Sequence[Finding]


def common_steps(here: Integers, there: Integers) -> tuple[int, int] | None:
    """The first and the last step that two runs both cover; None when they share none.

    ``here`` and ``there`` are rising and may be recorded at different intervals.
    """
    if not len(here) or not len(there):
        return None
    first, last = max(here[0], there[0]), min(here[-1], there[-1])
    return (int(first), int(last)) if first <= last else None


def against(here: Run, there: Run, window: int) -> Against:
    """How a run differs from another one: levels by layer, efficiency, loss, onsets, findings.

    Levels are medians over the last ``window`` records of each.
    """
    names = {name: row for row, name in enumerate(there.series.names)}
    pairs = [(row, names[name]) for row, name in enumerate(here.series.names) if name in names]
    own = set(here.series.names)
    return Against(
        input=there.path,
        first_step=here.result.first_step,
        last_step=here.result.last_step,
        layers=tuple(_layers(here.series, there.series, pairs, window)),
        only_here=tuple(name for name in here.series.names if name not in names),
        only_there=tuple(name for name in there.series.names if name not in own),
        efficiency=Pair(
            here=here.result.network.metrics.overall_flow_efficiency,
            there=there.result.network.metrics.overall_flow_efficiency,
        ),
        loss=Pair(here=_loss(here.result), there=_loss(there.result)),
        onsets=tuple(_onsets(here.result, there.result)),
        findings=tuple(_findings(here.findings, there.findings)),
    )


def _layers(
    here: Series, there: Series, pairs: Sequence[tuple[int, int]], window: int
) -> Iterator[LayerAgainst]:
    """Levels are RMS gradients where both files have sizes, and else norms."""
    sized = here.per_element and there.per_element
    a, b = (_decades(s.rms if sized else s.norm, window) for s in (here, there))
    u, v = (_decades(s.update_ratio, window) for s in (here, there))
    for row, other in pairs:
        level = _difference(a, b, row, other)
        wide = None if level is None or a is None or b is None else _spread(a, b, row, other)
        yield LayerAgainst(
            layer_name=here.names[row],
            level=level,
            spread=wide,
            update=_difference(u, v, row, other),
            differs=level is not None and abs(level) > max(_LEAST, _SPREADS * (wide or 0.0)),
        )


def _decades(values: Array | None, window: int) -> Array | None:
    """log10 over the last window, NaN where a value is zero or unknown."""
    if values is None:
        return None
    logs = np.log(values[-window:]) / DECADE
    return np.where(np.isfinite(logs), logs, np.nan)


def _difference(a: Array | None, b: Array | None, row: int, other: int) -> float | None:
    """Decades that the median of one column lies above that of the other."""
    if a is None or b is None:
        return None
    one, two = a[:, row], b[:, other]
    if min(np.isfinite(one).sum(), np.isfinite(two).sum()) < MIN_WINDOW:
        return None
    return float(nanmedian(one) - nanmedian(two))


def _spread(a: Array, b: Array, row: int, other: int) -> float:
    return float(np.hypot(spread(a[:, row]), spread(b[:, other])))


def _loss(result: FlowResult) -> float | None:
    return None if result.loss is None else result.loss.last


def _onsets(here: FlowResult, there: FlowResult) -> Iterator[OnsetAgainst]:
    """When each kind of trouble first began in either run; kinds that neither has are left out."""
    for kind, one, two in (
        ("vanishing", _first(here.vanishing_regions), _first(there.vanishing_regions)),
        ("exploding", _first(here.exploding_regions), _first(there.exploding_regions)),
        ("diverging", _diverging(here), _diverging(there)),
    ):
        if one is not None or two is not None:
            yield OnsetAgainst(kind=kind, here=one, there=two)  # type: ignore[arg-type]


def _first(regions: Sequence[Region]) -> tuple[int | None, int] | None:
    return min((r.extent.onset for r in regions), key=lambda onset: onset[1], default=None)


def _diverging(result: FlowResult) -> tuple[int | None, int] | None:
    left = result.loss.divergence if result.loss else None
    return None if left is None else left.onset


def _findings(here: Sequence[Finding], there: Sequence[Finding]) -> Iterator[FindingAgainst]:
    """What only one of the runs has, or with another severity; the worst first."""
    one, two = ({(f.rule, f.subject): f for f in run} for run in (here, there))
    changed = []
    for key in dict.fromkeys((*one, *two)):
        a, b = one.get(key), two.get(key)
        if a is None or b is None or a.severity != b.severity:
            known = a or b
            assert known is not None
            changed.append(
                FindingAgainst(
                    rule=known.rule,
                    name=known.name,
                    subject=known.subject,
                    here=None if a is None else a.severity,
                    there=None if b is None else b.severity,
                )
            )
    yield from sorted(changed, key=_worst)


def _worst(change: FindingAgainst) -> int:
    return -max(s.rank for s in (change.here, change.there) if s is not None)
