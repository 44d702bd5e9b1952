"""The rules about two checkpoints. One cause is one finding, however many tensors it moved."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence

from gradscope.drift.fits import told_otherwise
from gradscope.drift.result import Drifted, Kind, Need, Status, TensorDrift
from gradscope.report.rules import Observation, rule
from gradscope.report.severity import Severity
from gradscope.text import listed, plural
from gradscope.weights.names import pattern
from gradscope.weights.roles import AUXILIARY, MATRICES, TRAINING

#: Explanations that are damage, how severe each is, and what an experienced colleague says first.
_DAMAGE: Mapping[Kind, tuple[Severity, str]] = {
    "non-finite": (
        Severity.CRITICAL,
        "do not use this checkpoint; go back to one without them, or save it in a type of more "
        "range",
    ),
    "byte-swapped": (
        Severity.CRITICAL,
        "convert it again: it was read on, or written for, a machine of the other byte order",
    ),
    "bit-flip": (
        Severity.HIGH,
        "copy the file again from its source and compare hashes; if it happens again, test memory "
        "and disk",
    ),
    "zeroed": (
        Severity.HIGH,
        "reload the tensor from its source: zeros are what a failed save, download or gather "
        "leaves",
    ),
}


@rule("D101", "weight-drift", Severity.MEDIUM, reads=Drifted, needs=Need.VALUES)
def weight_drift(
    drifted: Drifted,
    *,
    large: float = 0.1,
    noticed: float = 0.01,
    apart: float = 8.0,
    family: int = 8,
) -> Iterator[Observation]:
    """Weights moved by a share of their norm that someone should know about, or were damaged.

    Drift is ‖new − base‖ / ‖base‖. What a cast, a permutation or a transposition explains is no
    drift. All that moved is one finding: low from 1 %, medium from 10 % on, as continued training
    does; what `--expect`, `--expect-frozen`, `--expect-changed` or `--max-drift` says of a tensor
    is judged by D102 and D103 instead. It names those that moved much farther than others of their
    role, where ln(drift) lies 8 robust deviations above the median of at least eight. Damage is
    told by its kind: elements that became NaN or infinite and swapped bytes are critical, one
    flipped bit and tensors that became zero high; so are casts that put elements beyond the range
    of their type (high) or lose 10 % of a tensor's norm below it (medium). Tensors that hold what
    the base has under another name, as mixed up layers leave them, are one finding: high, but
    medium where layers were added or removed as well. In a series a layer that jumps ten times as
    far as the median of its steps before, or to values that are not finite, is medium, one that
    stops while others go on low.
    """
    yield from _damaged(drifted)
    yield from _misplaced(drifted)
    yield from _on_the_way(drifted)
    yield from _lost_by_cast(drifted, large)
    told = told_otherwise(drifted.expected)
    moved = [t for t in drifted.result.tensors if _drifted(t) and not told(t)]
    far = [t for t in moved if (t.relative_drift or 0) >= noticed]
    if far:
        worst = max(far, key=lambda t: t.relative_drift or 0)
        most = worst.relative_drift or 0
        share = f"{most:.3g} times" if most >= 1 else f"{most:.2%} of"
        why = f" ({worst.explanation.text})" if worst.explanation is not None else ""
        outliers = list(_outliers(moved, apart, family, noticed))
        standing = f"; far out: {listed(outliers, len(outliers))}" if outliers else ""
        yield Observation(
            worst.name,
            f"{plural(len(far), 'tensor')} moved by {noticed:.0%} of their norm or more, this one "
            f"by {share} its norm{why}{standing}",
            "nothing to do if it was trained on; if it should be a conversion or a copy, it is "
            "not: state what you expect with --expect, --expect-frozen or --max-drift",
            {"relative_drift": most, "tensors": len(far), "outliers": len(outliers)},
            threshold=noticed,
            severity=Severity.MEDIUM if most >= large else Severity.LOW,
        )


def _misplaced(drifted: Drifted) -> Iterator[Observation]:
    """A mistake where no layer was added or removed."""
    found = [t for t in drifted.result.tensors if _is(t, "misplaced")]
    if found:
        first = found[0]
        assert first.explanation is not None
        others = listed((t.name for t in found[1:]), len(found) - 1)
        moved = any(t.status in ("added", "removed") for t in drifted.result.tensors)
        yield Observation(
            first.name,
            f"{plural(len(found), 'tensor')} of the new checkpoint are other ones of the base; "
            f"this one is {first.explanation.text}" + (f"; so are {others}" if others else ""),
            "nothing to do if layers were removed, repeated or reordered on purpose; otherwise "
            "names were mixed up when it was converted or merged: do it again",
            {"tensors": len(found), "kind": "misplaced"},
            severity=Severity.MEDIUM if moved else Severity.HIGH,
        )


def _on_the_way(drifted: Drifted) -> Iterator[Observation]:
    """What a series shows: layers that jumped, and that stopped while others went on."""
    layers = drifted.result.series.layers if drifted.result.series is not None else ()
    jumped = [layer for layer in layers if layer.jumped_at is not None]
    if jumped:
        first = jumped[0]
        others = listed((layer.layer_name for layer in jumped[1:]), len(jumped) - 1)
        yield Observation(
            first.layer_name,
            f"jumped at {first.jumped_at}, ten times as far as its usual step or to values that "
            "are not finite" + (f"; so did {others}" if others else ""),
            "look at loss and gradients of the steps before it, and go back to the checkpoint "
            "before",
            {"layers": len(jumped), "at": str(first.jumped_at), "kind": "jumped"},
        )
    froze = [layer for layer in layers if layer.froze_after is not None]
    if froze and len(froze) < len(layers):
        first = froze[0]
        others = listed((layer.layer_name for layer in froze[1:]), len(froze) - 1)
        yield Observation(
            first.layer_name,
            f"did not move any more after {first.froze_after}, while others did"
            + (f"; nor did {others}" if others else ""),
            "nothing to do if it was frozen on purpose; otherwise check that it still gets "
            "gradients, and that its updates are not below half a step of its type",
            {"layers": len(froze), "after": str(first.froze_after), "kind": "froze"},
            severity=Severity.LOW,
        )


def _drifted(tensor: TensorDrift) -> bool:
    why = tensor.explanation
    learnt = why is None or why.kind in ("scaled", "shifted", "low-rank", "rows", "pruned")
    return tensor.status == "changed" and tensor.role not in AUXILIARY and learnt


def _damaged(drifted: Drifted) -> Iterator[Observation]:
    for kind, (severity, advice) in _DAMAGE.items():
        found = [t for t in drifted.result.tensors if _is(t, kind)]
        if not found:
            continue
        names = listed((t.name for t in found[1:]), len(found) - 1)
        first = found[0]
        assert first.explanation is not None
        yield Observation(
            first.name,
            first.explanation.text + (f"; so in {names}" if names else ""),
            advice,
            {"tensors": len(found), "kind": kind, **first.explanation.facts},
            severity=severity,
        )


def _lost_by_cast(drifted: Drifted, large: float) -> Iterator[Observation]:
    """Casts that are exact as casts and lose the tensor all the same: below or beyond the range."""
    casts = [t for t in drifted.result.tensors if t.status == "rounding"]
    lost = [t for t in casts if (t.relative_drift or 0) >= large and t.role not in TRAINING]
    beyond = [t for t in casts if t.explanation is not None and t.explanation.facts["beyond"]]
    for group, severity in ((beyond, Severity.HIGH), (lost, Severity.MEDIUM)):
        if not group:
            continue
        first = max(group, key=lambda t: t.relative_drift or 0)
        others = listed((t.name for t in group if t is not first), len(group) - 1)
        assert first.explanation is not None
        yield Observation(
            first.name,
            f"{first.explanation.text}: the cast moved it by {first.relative_drift or 0:.2%} of "
            "its norm" + (f"; so in {others}" if others else ""),
            f"keep these in {first.base_dtype}, or store them with a scale",
            {"tensors": len(group), "relative_drift": first.relative_drift or 0, "kind": "cast"},
            threshold=large,
            severity=severity,
        )


def _is(tensor: TensorDrift, kind: Kind) -> bool:
    return tensor.explanation is not None and tensor.explanation.kind == kind


def _outliers(
    moved: Sequence[TensorDrift], apart: float, least: int, noticed: float
) -> Iterator[str]:
    """The tensors that moved much farther than others of their role, the farthest first."""
    families: dict[str, list[TensorDrift]] = defaultdict(list)
    for tensor in moved:
        if tensor.relative_drift:
            families[tensor.role].append(tensor)
    for role, tensors in families.items():
        logs = [math.log(t.relative_drift or 1) for t in tensors]
        middle = statistics.median(logs)
        spread = 1.4826 * statistics.median(abs(x - middle) for x in logs)
        limit = max(middle + apart * max(spread, 0.1), math.log(noticed))
        far = [t for t, x in zip(tensors, logs, strict=True) if x > limit]
        if len(tensors) >= least and len(far) <= len(tensors) // 4:
            for tensor in sorted(far, key=lambda t: -(t.relative_drift or 0)):
                times = (tensor.relative_drift or 0) / math.exp(middle)
                yield (
                    f"{tensor.name} ({times:,.0f} times the median of {len(tensors)} {role} "
                    "tensors)"
                )


@rule("D104", "reinitialized", Severity.HIGH, reads=Drifted, needs=Need.VALUES)
def reinitialized(drifted: Drifted, *, most: float = 0.9) -> Iterator[Observation]:
    """Matrices that have nothing to do with the base's: initialised anew, or another model's.

    The cosine of two independent tensors of n elements is distributed as N(0, 1/n); one within
    five deviations of zero, of matrices of at least 256 elements, says that the one did not grow
    out of the other. A head trained for another task is such a matrix on purpose; a layer whose
    name no longer matched when the model was loaded, by accident. Where more than 90 % of the
    matrices are unrelated, the two are different models.
    """
    matrices = [t for t in drifted.result.tensors if t.role in MATRICES and t.cosine is not None]
    fresh = [t for t in drifted.result.tensors if t.status == "replaced"]
    if not fresh:
        return
    whole = len(fresh) > most * len(matrices)
    first = fresh[0]
    places = dict.fromkeys(pattern(t.name) for t in fresh)
    yield Observation(
        first.name,
        f"{len(fresh)} of {len(matrices)} matrices are unrelated to the base's (cosine "
        f"{first.cosine:.2g}): {listed(places, len(places))}",
        "these are two different models, or runs from different initialisations: check which "
        "files were meant"
        if whole
        else "if the layer was not replaced on purpose, its name did not match when the model was "
        "loaded and it kept its random values: load it again and look at the missing keys",
        {"tensors": len(fresh), "matrices": len(matrices), "cosine": first.cosine or 0.0},
    )


#: What became of tensors that are not in both, in the words of a message.
_WORDS: Mapping[Status, str] = {
    "removed": "not in the new checkpoint",
    "added": "not in the base",
    "reshaped": "of another shape",
}


@rule("D105", "tensor-set-changed", Severity.MEDIUM, reads=Drifted, needs=Need.HEADERS)
def tensor_set_changed(drifted: Drifted) -> Iterator[Observation]:
    """Tensors that only one checkpoint has, or that have another shape.

    Names are compared without what wrappers put around them, and a tensor whose content is under
    another name is the same one. A loader leaves what it does not find at its random values. One
    finding for each of removed, added and reshaped; what is tied differently, stored once on one
    side and twice on the other, is info, and so are buffers and what training keeps.
    """
    if tied := [t for t in drifted.result.tensors if _is(t, "tied")]:
        yield _set_changed(tied, "identical", "stored by one side alone", Severity.INFO)
    for status, words in _WORDS.items():
        found = [t for t in drifted.result.tensors if t.status == status]
        beside = [t for t in found if t.role in AUXILIARY]
        grave = [t for t in found if t not in beside]
        for group, severity in ((grave, None), (beside, Severity.INFO)):
            if group:
                yield _set_changed(group, status, words, severity)


def _set_changed(
    group: Sequence[TensorDrift], status: Status, words: str, severity: Severity | None
) -> Observation:
    first = group[0]
    shapes = (
        f": {list(first.base_shape or ())} became {list(first.shape or ())}"
        if status == "reshaped"
        else ""
    )
    why = f" ({first.explanation.text})" if first.explanation is not None else ""
    others = listed((t.name for t in group[1:]), len(group) - 1)
    return Observation(
        first.name,
        f"{plural(len(group), 'tensor')} {words}{shapes}{why}"
        + (f"; also {others}" if others else ""),
        "make sure that the code which loads it knows: a loader leaves what it does not find, or "
        "what does not fit, at random values",
        {"tensors": len(group), "status": status},
        severity=severity,
    )
