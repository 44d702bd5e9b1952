"""What the rules say of merges that are not what the adapter asks for."""

from __future__ import annotations

from collections.abc import Sequence

from gradscope.drift.fits import Others
from gradscope.drift.result import Merge
from gradscope.drift.rules.words import moved, what
from gradscope.report.rules import Observation
from gradscope.text import listed, plural


def is_wrong(merge: Merge, most: float) -> bool:
    """Whether a weight is neither the base nor the base with the adapter, as far as can be told."""
    if merge.unchanged:
        return False
    if merge.share_error is not None and merge.share is not None:
        return abs(merge.share - 1) > merge.share_error
    return (merge.residual_ulps or 0) > most


def not_merged(idle: Sequence[Merge], total: int) -> Observation:
    """Modules that are the base's."""
    names = listed((m.module for m in idle), len(idle))
    return Observation(
        idle[0].name or idle[0].module,
        f"{len(idle)} of {total} modules that the adapter changes are the base's: the merge did "
        f"nothing to {names}",
        "merge again, and save what merge_and_unload returns rather than the base that it was "
        "called on",
        {"modules": len(idle), "of": total},
    )


def wrong_merge(wrong: Sequence[Merge], total: int, limit: float) -> Observation:
    """Modules that are neither the base's nor merged."""
    worst = max(wrong, key=lambda m: m.residual_ulps or 0)
    others = listed((m.module for m in wrong if m is not worst), len(wrong) - 1)
    away = (
        "; this one is in codes"
        if worst.residual_ulps is None
        else f"; this one is {worst.residual_ulps:,.3g} units in the last place (root mean square) "
        "away from it"
    )
    return Observation(
        worst.name or worst.module,
        f"{len(wrong)} of {total} modules are not the base with the adapter merged{away}"
        f"{_fitted(worst)}" + (f"; also {others}" if others else ""),
        "merge again with the adapter's own configuration; if it was merged into another base, "
        "compare with that one",
        {
            "modules": len(wrong),
            "residual_ulps": _or_undefined(worst.residual_ulps),
            "cosine": _or_undefined(worst.cosine),
            "scale": _or_undefined(worst.scale),
            "fitted_scale": _or_undefined(worst.fitted_scale),
        },
        threshold=limit,
    )


def another_base(wrong: Sequence[Merge], others: Others) -> Observation:
    """Nothing is as it should be: the adapter's modules, and most of the others."""
    worst = max(others.wrong, key=moved)
    return Observation(
        worst.name,
        f"the adapter was merged into another base than this one, or not into this one alone: "
        f"{len(others.wrong):,} of {plural(len(others.tensors), 'tensor')} that it does not name "
        f"differ, too ({what(worst)})",
        "compare with the base that it was merged into, which adapter_config.json names as "
        "base_model_name_or_path",
        {
            "tensors": len(others.wrong),
            "of": len(others.tensors),
            "modules": len(wrong),
            "relative_drift": moved(worst),
            "kind": "another base",
        },
    )


def _or_undefined(value: float | None) -> float | str:
    return "undefined" if value is None else value


def not_compared(unknown: Sequence[Merge], total: int) -> Observation:
    """Modules of which nothing can be said."""
    names = listed((m.module for m in unknown[1:]), len(unknown) - 1)
    return Observation(
        unknown[0].module,
        f"{len(unknown)} of {total} modules of the adapter could not be held against the new "
        f"checkpoint: {unknown[0].reason}" + (f"; also {names}" if names else ""),
        "check that adapter, base and new checkpoint are of one model; merges of these modules "
        "must be checked otherwise",
        {"modules": len(unknown), "of": total, "kind": "not compared"},
    )


def _fitted(merge: Merge, same: float = 0.95) -> str:
    """What the change is instead, where it is the product times another factor."""
    alike = "undefined" if merge.cosine is None else f"{merge.cosine:.2g}"
    if merge.share is None or (merge.share_error is None and abs(merge.cosine or 0) < same):
        return f"; its change is not the adapter's (cosine {alike})"
    if merge.fitted_scale is None or merge.scale is None:
        return f"; its change is {merge.share:.4g} times what the adapters ask for"
    wanted = f"{merge.fitted_scale:.4g}, not {merge.scale:.4g}"
    return f"; its change is the adapter's with a scale of {wanted}"
