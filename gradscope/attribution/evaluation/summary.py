"""Method by metric over all pictures: means with confidence intervals, beside the control's."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist, mean, stdev
from typing import Literal

from gradscope.attribution.diagnostics import Diagnostics
from gradscope.attribution.result import Explanation, Summary

Read = Callable[[Diagnostics], float | None]


@dataclass(frozen=True, slots=True)
class Metric:
    """One measure of a map, what chance gives, and which way is better."""

    own: Read
    control: Read
    better: Literal["higher", "lower", "neither"] = "higher"


def _nothing(_known: Diagnostics) -> None:
    return None


def _of(name: str) -> Read:
    return lambda known: getattr(known, name)


def _placed(name: str) -> Read:
    return lambda known: getattr(known.ground_truth, name, None)


def _elsewhere(name: str) -> Read:
    return lambda known: getattr(known.random_control, name, None)


METRICS: Mapping[str, Metric] = {
    "pointing game": Metric(_placed("pointing_game"), _placed("area")),
    "relevance mass": Metric(_placed("relevance_mass"), _placed("area")),
    "relevance rank": Metric(_placed("relevance_rank"), _placed("area")),
    "insertion": Metric(_of("insertion_auc"), _elsewhere("insertion_auc")),
    "deletion": Metric(_of("deletion_auc"), _elsewhere("deletion_auc"), "lower"),
    "ROAD": Metric(_of("road"), lambda known: None if known.road is None else 0.0),
    "faithfulness": Metric(
        _of("faithfulness_correlation"), _of("control_faithfulness_correlation")
    ),
    "infidelity": Metric(_of("infidelity"), _of("control_infidelity"), "lower"),
    "max sensitivity": Metric(_of("sensitivity"), _nothing, "lower"),
    "randomised": Metric(_of("similarity"), _nothing, "lower"),
    "sparseness": Metric(_of("sparseness"), _nothing, "neither"),
}


def summarised(explanations: Sequence[Explanation]) -> Iterator[Summary]:
    """Each method's every metric that was measured of any picture; targets of one are averaged."""
    for method in dict.fromkeys(e.method for e in explanations):
        own = [e for e in explanations if e.method == method]
        for name, metric in METRICS.items():
            values = _by_picture(own, metric.own)
            if values:
                half = half_width(values)
                centre = mean(values)
                control = _by_picture(own, metric.control)
                yield Summary(
                    method=method,
                    metric=name,
                    better=metric.better,
                    mean=centre,
                    low=None if half is None else centre - half,
                    high=None if half is None else centre + half,
                    pictures=len(values),
                    control=mean(control) if control else None,
                )


def _by_picture(explanations: Sequence[Explanation], read: Read) -> list[float]:
    found: dict[str, list[float]] = {}
    for e in explanations:
        value = read(e.diagnostics)
        if value is not None:
            found.setdefault(e.image, []).append(value)
    return [mean(values) for values in found.values()]


def half_width(values: Sequence[float]) -> float | None:
    """Half of the 95 % confidence interval of a mean; None for less than three values."""
    if len(values) < 3:
        return None
    return student(len(values) - 1) * stdev(values) / math.sqrt(len(values))


_FEW = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365)


def student(freedom: int) -> float:
    """Student's t for 95 % confidence: to seven degrees of freedom a table, then an expansion."""
    if freedom <= len(_FEW):
        return _FEW[freedom - 1]
    z = NormalDist().inv_cdf(0.975)
    terms = (
        z,
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
    )
    return math.fsum(term / freedom**i for i, term in enumerate(terms))
