"""Whether maps can be believed, by what was measured of them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from statistics import fmean

from gradscope.attribution.diagnostics import Diagnostics
from gradscope.attribution.evaluation.summary import half_width
from gradscope.attribution.result import ExplainResult, Explanation, Need
from gradscope.attribution.rules.about import about
from gradscope.report.rules import Observation, Unknown, rule
from gradscope.report.severity import Severity
from gradscope.text import plural


@rule("E103", "unfaithful", Severity.MEDIUM, reads=ExplainResult, needs=Need.EVALUATION)
def unfaithful(
    result: ExplainResult, *, spreads: float = 1.9, enough: int = 5, better: float = 1.0
) -> Iterator[Observation | Unknown]:
    """A map ranks pixels worse than the same map at random positions, or a method's no better.

    Inserting its strongest pixels first should raise the target's probability sooner, deleting them
    should lower it sooner (Petsiuk et al. 2018). What counts is insertion less deletion, against
    that of the map moved about: more than ``spreads`` standard deviations below it (one in twenty
    by chance) are medium, high where insertion and deletion are both so far behind. A map of
    nothing lies on either side of its control, so one picture cannot show that a map is no better.
    ``enough`` pictures can, where the sum of their deviations (at most three each) over the root
    of their number is below ``better``. What is not settled is not evaluated. On five trained
    networks maps of gradcam, integrated-gradients and rise lie 1 to 4 deviations above their
    control, upside down 1 to 4 below.
    """
    for method in dict.fromkeys(e.method for e in result.explanations):
        known = [(e, _deviations(e)) for e in result.explanations if e.method == method]
        for e, found in known:
            if found is None:
                yield Unknown(f"{e.subject}: insertion and deletion were not measured")
        told = [(e, found) for e, found in known if found is not None]
        worse = [e for e, found in told if found < -spreads]
        total = sum(max(-3.0, min(3.0, found)) for _, found in told) / max(1, len(told)) ** 0.5
        if len(told) >= enough and total < better:
            yield Observation(
                method,
                f"over {plural(len(told), 'map')} it ranks pixels no better than the same maps at "
                f"random positions (together {total:+.1f} standard deviations)",
                f"do not rely on it; {_COMPARE}",
                {"deviations": total, "maps": len(told), "worse": len(worse)},
                better,
                Severity.HIGH if total < -spreads else Severity.MEDIUM,
            )
        elif worse:
            yield from (_worse(e, spreads) for e in worse)
        elif told and total < better:
            yield Unknown(
                f"{method}: {plural(len(told), 'map')} cannot settle whether it ranks pixels "
                f"better than chance (together {total:+.1f} standard deviations); more pictures can"
            )


_COMPARE = "compare with integrated-gradients or rise, and check the target"


def _worse(e: Explanation, spreads: float) -> Observation:
    d, control = e.diagnostics, e.diagnostics.random_control
    assert control is not None
    assert d.insertion_auc is not None
    assert d.deletion_auc is not None
    behind = min(
        (control.insertion_auc - d.insertion_auc) / max(control.insertion_spread, _ROUNDING),
        (d.deletion_auc - control.deletion_auc) / max(control.deletion_spread, _ROUNDING),
    )
    return about(
        e,
        f"insertion {d.insertion_auc:.3f} (at random positions {control.insertion_auc:.3f}), "
        f"deletion {d.deletion_auc:.3f} ({control.deletion_auc:.3f}): the map ranks pixels worse "
        "than chance",
        f"do not rely on it; {_COMPARE}",
        {
            "insertion_auc": d.insertion_auc,
            "deletion_auc": d.deletion_auc,
            "control_insertion_auc": control.insertion_auc,
            "control_deletion_auc": control.deletion_auc,
        },
        threshold=spreads,
        severity=Severity.HIGH if behind > spreads else Severity.MEDIUM,
    )


_ROUNDING = 1e-3


def _deviations(e: Explanation) -> float | None:
    """How far insertion less deletion lies above its control, in standard deviations of one map."""
    d, control = e.diagnostics, e.diagnostics.random_control
    if control is None or d.insertion_auc is None or d.deletion_auc is None:
        return None
    gain = (d.insertion_auc - d.deletion_auc) - (control.insertion_auc - control.deletion_auc)
    apart = math.hypot(control.insertion_spread, control.deletion_spread)
    spread = apart if control.difference_spread is None else control.difference_spread
    # The control's mean is not exact either.
    return float(gain / (max(spread, _ROUNDING) * (1 + 1 / max(1, control.rankings)) ** 0.5))


@rule("E104", "sanity-check-failed", Severity.MEDIUM, reads=ExplainResult, needs=Need.EVALUATION)
def sanity_check_failed(
    result: ExplainResult, *, share: float = 0.5, steady: float = 0.7, same: float = 0.95,
    margin: float = 0.15,
) -> Iterator[Observation | Unknown]:  # fmt: skip
    """A method's maps depend too little on the model's parameters, or not on the picture.

    The mean rank correlation of the raw values with those under random parameters counts, over the
    whole cascade from the output down and all pictures (Adebayo et al. 2018; Sixt et al. 2020), as
    a ``share`` of that with the maps of the same pictures changed invisibly (at least ``steady``):
    a noisy method is unlike itself, too. It has to exceed the limit by its 95 % interval over the
    pictures, or by ``margin`` where they are fewer than three; within that it is not evaluated. On
    trained networks gradients, Grad-CAM, LRP and RISE keep at most a fifth, guided-backprop 0.67
    to 1. CAMs that add up activations whatever their sign in the score (layercam, gradcam++,
    eigencam, scorecam) keep 0.1 to 0.9: random layers respond to the same places. Maps above
    ``same`` in correlation with that of noise show no picture.
    """
    for method in dict.fromkeys(e.method for e in result.explanations):
        known = [e.diagnostics for e in result.explanations if e.method == method]
        alike = [d.similarity for d in known if d.similarity is not None]
        own, noise = (
            _mean(getattr(d, k) for d in known) for k in ("repeatability", "noise_similarity")
        )
        if not alike or own is None or noise is None:
            yield Unknown(f"{method}: {_unjudged(known)}")
            continue
        kept = fmean(alike) / max(own, steady)
        interval = half_width(alike)
        doubt = margin if interval is None else interval / max(own, steady)
        if noise > same:
            yield Observation(
                method,
                f"its map of noise is the same (rank correlation {noise:.2f}): it does not depend "
                "on the picture",
                f"it shows the model, not what it sees; {_ELSE}",
                {"noise_similarity": noise},
                same,
            )
        elif kept - doubt > share:
            yield Observation(
                method,
                f"with random parameters its maps stay similar (mean rank correlation "
                f"{fmean(alike):.2f}; {own:.2f} after an invisible change of the picture)",
                f"it shows what stands out in the picture rather than what the model uses; {_ELSE}",
                {"similarity": fmean(alike), "repeatability": own, "maps": len(alike)},
                share,
            )
        elif kept + doubt > share:
            yield Unknown(
                f"{method}: its maps keep {kept:.2f} of their likeness under random parameters, "
                f"too near the limit of {share:g} to tell from {plural(len(alike), 'map')}"
            )


_ELSE = "use gradcam or integrated-gradients"


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _unjudged(known: Sequence[Diagnostics]) -> str:
    if all(d.randomisation is None for d in known):
        return "its dependence on parameters was not measured, or the model has none to randomise"
    return "its maps are constant, or its sensitivity was not measured"
