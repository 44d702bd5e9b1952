"""How much one picture's maps can be trusted, measured on their model.

Maps of one target share what does not depend on the method: random parameters, the passes of
methods that read a layer, changed pictures, removals. Repetitions are made with a quarter of the
samples, steps or masks, and compared with a map made likewise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gradscope.attribution.diagnostics import Randomised
from gradscope.attribution.evaluation import curves, sanity
from gradscope.attribution.evaluation.removal import (
    Removals,
    faithfulness_correlation,
    infidelity,
    removals,
)
from gradscope.attribution.evaluation.similarity import Doubles, agreement, sparseness
from gradscope.attribution.maps import Map
from gradscope.attribution.subject import Tick

#: What a measurement found of each map, in their order.
Facts = dict[str, Any]
Measurement = Callable[[Sequence[Map]], Iterator[Facts]]


def evaluate(
    maps: Sequence[Map], late: Callable[[], bool], tick: Tick, *, compared: bool
) -> tuple[list[Facts], tuple[str, ...]]:
    """The diagnostics of maps of one picture and target, and the measurements that were left out.

    Those that no rule judges are made where maps are ``compared`` with ground truth. Before each,
    ``late`` is asked whether time is up; one that has begun is finished.
    """
    measurements = JUDGED | COMPARED if compared else JUDGED
    found: list[Facts] = [{} for _ in maps]
    left: dict[str, None] = {}
    done = 0
    for name, measure in measurements.items():
        facts = measure(maps)
        for known in found:
            if late():
                left[name] = None
                break
            known |= next(facts)
            done += 1
            tick(done, len(maps) * len(measurements))
    return found, tuple(left)


def _compared(maps: Sequence[Map]) -> Iterator[Facts]:
    alike = agreement({m.method.name: m.values for m in maps})
    for m in maps:
        yield {
            "agreement": alike[m.method.name] or None,
            "sparseness": sparseness(m.values),
        }


def _faithful(maps: Sequence[Map]) -> Iterator[Facts]:
    drawn = curves.canvas(maps[0].quiet)
    for m in maps:
        found = curves.faithfulness(drawn, m.shown, m.subject.seed)
        yield {
            "insertion_auc": found.insertion,
            "deletion_auc": found.deletion,
            "insertion_spread": found.insertion_spread,
            "deletion_spread": found.deletion_spread,
            "insertion_curve": found.insertion_curve,
            "deletion_curve": found.deletion_curve,
            "random_control": found.control,
        }


def _randomised(maps: Sequence[Map]) -> Iterator[Facts]:
    subject = maps[0].quiet
    points: list[list[Randomised]] = [[] for _ in maps]
    last: list[Tensor] = []
    with sanity.cascade(subject.model.module, subject.seed) as layers:
        for layer in layers:
            shared: dict[str, Any] = {}
            last = [m.again(subject.inputs, shared) for m in maps]
            for cascade, values, m in zip(points, last, maps, strict=True):
                cascade.append(sanity.compared(layer, values, m.ranked))
    for cascade, values, m in zip(points, last or [m.original for m in maps], maps, strict=True):
        yield {
            "randomisation": tuple(cascade) or None,
            "similarity": sanity.similarity(cascade, m.original),
            "complexity_rise": sanity.complexity_rise(m.original, values) if cascade else None,
        }


def _moved(maps: Sequence[Map]) -> Iterator[Facts]:
    subject = maps[0].quiet
    width = torch.ones(1) if subject.std is None else subject.std
    radius = (sanity.RADIUS / width).view(-1, 1, 1).to(subject.inputs)
    pictures = sanity.other_pictures(subject.inputs, radius, subject.seed)
    shared: dict[str, Any] = {}
    for m in maps:
        *copies, noise = m.again(pictures, shared)
        others = sanity.Others(torch.stack(copies), noise)
        yield {
            "sensitivity": others.sensitivity(m.original[0]),
            "repeatability": others.repeatability(m.ranked),
            "noise_similarity": others.unmoved(m.ranked),
        }


def _removed(maps: Sequence[Map]) -> Iterator[Facts]:
    parts = removals(maps[0].quiet)
    for m in maps:
        own = _of_removals(parts, parts.attributed(m.contributions))
        places = curves.moved(m.contributions, m.subject.seed)
        elsewhere = [_of_removals(parts, parts.attributed(place)) for place in places]
        yield own | {f"control_{name}": _mean([place[name] for place in elsewhere]) for name in own}


def _of_removals(parts: Removals, attributed: Doubles) -> Facts:
    return {
        "faithfulness_correlation": faithfulness_correlation(attributed, parts.lost),
        "infidelity": infidelity(attributed, parts.lost),
    }


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def _imputed(maps: Sequence[Map]) -> Iterator[Facts]:
    drawn = curves.canvas(maps[0].quiet)
    for m in maps:
        (order, *_) = curves.orders_of(m.shown, m.subject.seed)
        yield {"road": drawn.road(order, m.subject.seed)}


#: Measurements that rules judge, by the names that a report has for them.
JUDGED: dict[str, Measurement] = {
    "agreement": _compared,
    "insertion and deletion": _faithful,
    "randomisation": _randomised,
    "sensitivity": _moved,
}
#: Those that only tell methods apart.
COMPARED: dict[str, Measurement] = {
    "faithfulness correlation and infidelity": _removed,
    "ROAD": _imputed,
}
