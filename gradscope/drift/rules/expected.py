"""The rules that hold two checkpoints against what was said to have happened between them."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Mapping, Sequence

from gradscope.drift.expectations import matching
from gradscope.drift.result import Drifted, Expected, Kind, Merge, Need, TensorDrift
from gradscope.report.rules import Observation, rule
from gradscope.report.severity import Severity
from gradscope.text import listed, plural, quoted
from gradscope.weights.roles import AUXILIARY, TRAINING, Role

#: What a conversion may do to a tensor.
_CONVERTED: frozenset[Kind | None] = frozenset(
    {"cast", "rounded", "permuted", "transposed", "reshaped", "tied"}
)


@rule("D102", "unexpected-change", Severity.HIGH, reads=Drifted, needs=Need.VALUES)
def unexpected_change(
    drifted: Drifted, *, decibels_per_bit: float = 3.0, merge_ulps: float = 2.0
) -> Iterator[Observation]:
    """Something changed that was said not to, or otherwise than was said.

    `--expect-frozen GLOB`: not a bit of a tensor may differ. `--max-drift ROLE=X`: no tensor of the
    role may move by more of its norm. `--expect identical`: every tensor has the same bits and
    type. `--expect converted`: casts, permutations, transpositions, other shapes, gains of norms
    stored with or without their one, and buffers of one side alone.
    `--expect quantised`: weights are casts or codes whose signal-to-noise ratio is at least 3 dB a
    bit, half of the 6.02 dB that an ideal uniform quantiser gains with each (Bennett 1948); the
    rest as for a conversion. `--expect merge`: what the adapter names is W + s B A (DoRA: with its
    magnitudes) within 2 units in the last place of the stored type, root mean square, because the
    product and the sum are rounded one after the other; nothing else differs but by a cast. With
    `--parent FILE` a merge is any mix of base and parents, to rounding.
    """
    tensors = drifted.result.tensors
    for pattern in drifted.expected.frozen:
        group = matching(pattern, tensors)
        differing = [t for t in group if t.status != "identical"]
        if differing:
            yield _changed(differing, len(group), f"matching {quoted(pattern)} should be frozen")
    for role, limit in drifted.expected.most.items():
        of_role = [
            t for t in tensors if t.role == role or (role == "*" and t.role not in AUXILIARY)
        ]
        far = [t for t in of_role if _moved(t) > limit]
        if far:
            yield _too_far(far, role, limit)
    if drifted.expected.kind is not None:
        yield from _otherwise(drifted, decibels_per_bit)
    merges = drifted.expected.merges
    wrong = [m for m in merges if not m.unchanged and (m.residual_ulps or 0) > merge_ulps]
    if wrong:
        yield _wrong_merge(wrong, len(merges), merge_ulps)
    if unknown := [m for m in merges if m.reason is not None]:
        yield _not_compared(unknown, len(merges))


@rule("D103", "missing-change", Severity.HIGH, reads=Drifted, needs=Need.VALUES)
def missing_change(drifted: Drifted) -> Iterator[Observation]:
    """Something that was said to change is the base's, bit for bit.

    `--expect-changed GLOB`: each tensor must differ by more than a cast. `--expect merge`: each
    weight that the adapter names must, or any weight of a mix; "merged" models that are their base
    were published more than once (verl #7285). `--expect quantised`: at least one weight must be in
    fewer bits.
    """
    tensors = drifted.result.tensors
    for pattern in drifted.expected.changed:
        group = matching(pattern, tensors)
        same = [t for t in group if not t.affected]
        if same:
            yield _unchanged(same, len(group), f"matching {quoted(pattern)} should have changed")
    merges = drifted.expected.merges
    idle = [m for m in merges if m.unchanged]
    if idle:
        yield _not_merged(idle, len(merges))
    if drifted.expected.kind == "merge" and not merges and not any(map(_mixed, tensors)):
        yield Observation(
            drifted.new,
            "no tensor is a mix of the base and its parents: the merge did nothing",
            "check that the merged checkpoint was given, and that its weights were saved",
            {"tensors": len(tensors)},
        )
    if drifted.expected.kind == "quantised" and not any(map(_smaller, tensors)):
        yield Observation(
            drifted.new,
            "no weight is stored in fewer bits than in the base",
            "check that the quantised checkpoint was given, and that its weights were saved",
            {"tensors": len(tensors)},
        )


# -- everything ------------------------------------------------------------------------------------


def _otherwise(drifted: Drifted, decibels: float) -> Iterator[Observation]:
    """The tensors that are not what the whole was said to be, as one finding."""
    kind = drifted.expected.kind
    assert kind is not None
    named = {m.name for m in drifted.expected.merges}
    tensors = [
        t
        for t in drifted.result.tensors
        if t.role not in TRAINING and t.name not in named and _base_name(t) not in named
    ]
    fits = _FITS[kind]
    wrong = [t for t in tensors if t.status is not None and not fits(t, decibels)]
    if wrong:
        yield _changed(wrong, len(tensors), _WORDS[kind])


def _base_name(tensor: TensorDrift) -> str:
    return tensor.base_name or tensor.name


def _identical(tensor: TensorDrift, _: float) -> bool:
    return tensor.status == "identical"


def _converted(tensor: TensorDrift, _: float) -> bool:
    return (
        tensor.status == "identical"
        or _only(tensor, _CONVERTED)
        or _centred_otherwise(tensor)
        or (tensor.status in ("added", "removed") and tensor.role is Role.BUFFER)
    )


def _centred_otherwise(tensor: TensorDrift) -> bool:
    """Whether it is the gain of a norm as it is, or as what it has beside one (Gemma's)."""
    why = tensor.explanation
    if why is None or why.kind != "shifted" or tensor.role is not Role.NORM_GAIN:
        return False
    return abs(abs(float(why.facts["by"])) - 1) < 1e-3


def _only(tensor: TensorDrift, kinds: Container[Kind | None]) -> bool:
    """Whether one of some explanations leaves nothing but rounding."""
    why = tensor.explanation
    return why is not None and why.kind in kinds and "left" not in why.facts


def _merged(tensor: TensorDrift, _: float) -> bool:
    return _converted(tensor, _) or _only(tensor, ("combined",))


def _quantised(tensor: TensorDrift, decibels: float) -> bool:
    why = tensor.explanation
    if why is None or why.kind != "quantised":
        return _converted(tensor, decibels)
    bits, ratio = why.facts.get("bits", 8), why.facts["snr_db"]
    return float(ratio) >= decibels * float(bits)


def _mixed(tensor: TensorDrift) -> bool:
    return tensor.explanation is not None and tensor.explanation.kind == "combined"


def _smaller(tensor: TensorDrift) -> bool:
    return tensor.explanation is not None and tensor.explanation.kind in ("quantised", "rounded")


_FITS: Mapping[Expected, Callable[[TensorDrift, float], bool]] = {
    "identical": _identical,
    "merge": _merged,
    "quantised": _quantised,
    "converted": _converted,
}
_WORDS: Mapping[Expected, str] = {
    "identical": "should be identical",
    "merge": "should be the base's but for the merge",
    "quantised": "should be the base's in fewer bits",
    "converted": "should be a conversion of the base's",
}


# -- words -----------------------------------------------------------------------------------------


def _moved(tensor: TensorDrift) -> float:
    return tensor.relative_drift or 0.0


def _what(tensor: TensorDrift) -> str:
    if tensor.explanation is not None:
        return tensor.explanation.text
    if tensor.relative_drift is not None:
        return f"moved by {tensor.relative_drift:.3g} of its norm"
    return f"is {tensor.status}"


def _changed(wrong: Sequence[TensorDrift], total: int, should: str) -> Observation:
    worst = max(wrong, key=_moved)
    others = listed((t.name for t in wrong if t is not worst), len(wrong) - 1)
    return Observation(
        worst.name,
        f"{len(wrong):,} of {plural(total, 'tensor')} that {should} differ: {_what(worst)}"
        + (f"; also {others}" if others else ""),
        "if it was meant to change, narrow what you expect; otherwise find the step that touched "
        "it: a parameter group, a buffer in training mode, a merge, a partial load",
        {"tensors": len(wrong), "of": total, "relative_drift": _moved(worst), "expected": should},
        threshold=0,
    )


def _too_far(far: Sequence[TensorDrift], role: str, limit: float) -> Observation:
    worst = max(far, key=_moved)
    others = listed((t.name for t in far if t is not worst), len(far) - 1)
    what = "tensor" if role == "*" else f"{role} tensor"
    return Observation(
        worst.name,
        f"{plural(len(far), what)} moved by more than {limit:g} of the norm, this one by "
        f"{_moved(worst):.3g}" + (f"; also {others}" if others else ""),
        "look at the learning rate of these layers, or raise --max-drift if so much was wanted",
        {"tensors": len(far), "relative_drift": _moved(worst), "role": role},
        threshold=limit,
    )


def _unchanged(same: Sequence[TensorDrift], total: int, should: str) -> Observation:
    names = listed((t.name for t in same[1:]), len(same) - 1)
    return Observation(
        same[0].name,
        f"{len(same):,} of {plural(total, 'tensor')} {should} and are still the base's"
        + (f"; also {names}" if names else ""),
        "check that these parameters require gradients, are in the optimizer, and that the "
        "trained weights were saved; updates below half a step vanish in 16-bit storage",
        {"tensors": len(same), "of": total},
    )


def _not_merged(idle: Sequence[Merge], total: int) -> Observation:
    names = listed((m.module for m in idle), len(idle))
    return Observation(
        idle[0].name or idle[0].module,
        f"{len(idle)} of {total} modules that the adapter changes are the base's: the merge did "
        f"nothing to {names}",
        "merge again, and save what merge_and_unload returns rather than the base that it was "
        "called on",
        {"modules": len(idle), "of": total},
    )


def _wrong_merge(wrong: Sequence[Merge], total: int, limit: float) -> Observation:
    worst = max(wrong, key=lambda m: m.residual_ulps or 0)
    others = listed((m.module for m in wrong if m is not worst), len(wrong) - 1)
    return Observation(
        worst.name or worst.module,
        f"{len(wrong)} of {total} modules are not the base with the adapter merged; this one is "
        f"{worst.residual_ulps:,.3g} units in the last place (root mean square) away from it"
        f"{_fitted(worst)}" + (f"; also {others}" if others else ""),
        "merge again with the adapter's own configuration; if it was merged into another base, "
        "compare with that one",
        {
            "modules": len(wrong),
            "residual_ulps": worst.residual_ulps or 0.0,
            "cosine": _or_undefined(worst.cosine),
            "scale": _or_undefined(worst.scale),
            "fitted_scale": _or_undefined(worst.fitted_scale),
        },
        threshold=limit,
    )


def _or_undefined(value: float | None) -> float | str:
    return "undefined" if value is None else value


def _not_compared(unknown: Sequence[Merge], total: int) -> Observation:
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
    if merge.cosine is None or merge.fitted_scale is None or abs(merge.cosine) < same:
        alike = "undefined" if merge.cosine is None else f"{merge.cosine:.2g}"
        return f"; its change is not the adapter's (cosine {alike})"
    wanted = "" if merge.scale is None else f", not {merge.scale:.4g}"
    return f"; its change is the adapter's with a scale of {merge.fitted_scale:.4g}{wanted}"
