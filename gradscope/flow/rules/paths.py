"""The rule about how far the gradient reaches on its way through the network."""

from __future__ import annotations

from collections.abc import Iterator

from gradscope.flow.limits import BOTTLENECK_DECADES, BOTTLENECK_FROM
from gradscope.flow.result import FlowResult, Need
from gradscope.report.rules import Observation, Unknown, rule
from gradscope.report.severity import Severity


@rule("F108", "bottleneck", Severity.MEDIUM, reads=FlowResult, needs=Need.NORMS)
def bottleneck(
    result: FlowResult,
    *,
    low: float = BOTTLENECK_FROM,
    decades: float = 2.0,
    criticality: float = 0.5,
) -> Iterator[Observation | Unknown]:
    """A layer's gradient lies far below both its neighbours', or a path hangs on it.

    Low from ``low`` decades below both neighbours, medium from ``decades``. Medium as well where
    the only way to a layer (its ``criticality``, from the recorded topology) has a link that
    carries ``decades`` less than the others. Layers that vanish or are dead are left to F102 and
    F105.
    """
    if result.topology == "assumed-chain":
        yield Unknown(
            "paths around a link need a topology; layers are compared by their order alone"
        )
    known = {name for region in result.vanishing_regions for name in region.affected_layers}
    known |= {name for zone in result.dead_zones for name in zone.affected_layers}
    yield from _narrow_layers(result, known, low, decades)
    yield from _narrow_links(result, known, decades, criticality)


def _narrow_layers(
    result: FlowResult, known: set[str], low: float, decades: float
) -> Iterator[Observation]:
    scores = {layer.layer_name: layer.bottleneck_score for layer in result.layers}
    for node in result.network.nodes:
        score = scores.get(node.layer_name)
        if node.condition != "bottleneck" or score is None or node.layer_name in known:
            continue
        below = BOTTLENECK_DECADES * score
        if below < low:
            continue
        yield Observation(
            node.layer_name,
            f"its RMS gradient lies {'at least ' if score >= 1 else ''}{below:.1f} decades "
            "below both neighbours",
            "look at what it multiplies: a tiny gain or initial scale, a saturated "
            "activation behind it",
            {
                "decades": below,
                "bottleneck_score": score,
                "connectivity": node.connectivity or 0,
            },
            threshold=decades,
            severity=Severity.MEDIUM if below >= decades else Severity.LOW,
        )


def _narrow_links(
    result: FlowResult, known: set[str], decades: float, criticality: float
) -> Iterator[Observation]:
    seen: set[tuple[str, str]] = set()
    for path in result.critical_paths:
        weak, lost = path.weakest_link, path.optimization_potential
        hangs = path.criticality_score is not None and path.criticality_score > criticality
        if weak is None or weak in seen or set(weak) & known:
            continue
        if not hangs or lost is None or lost < decades:
            continue
        seen.add(weak)
        yield Observation(
            f"{weak[0]} → {weak[1]}",
            f"the only wide path of the gradient to {path.layers[-1]} leads over this link, which "
            f"carries {lost:.1f} decades less than the median one",
            "add a path around it (a residual connection), or find what attenuates there",
            {
                "criticality_score": path.criticality_score or 0.0,
                "optimization_potential": lost,
                "path_length": path.path_length,
            },
            threshold=criticality,
        )
