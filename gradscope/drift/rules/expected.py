"""The rules that hold two checkpoints against what was said to have happened between them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from gradscope.drift.expectations import matching
from gradscope.drift.fits import mixed, others, smaller
from gradscope.drift.result import Drifted, Need, TensorDrift
from gradscope.drift.rules.merged import (
    another_base,
    is_wrong,
    not_compared,
    not_merged,
    wrong_merge,
)
from gradscope.drift.rules.words import moved, what
from gradscope.report.rules import Observation, rule
from gradscope.report.severity import Severity
from gradscope.text import listed, plural, quoted
from gradscope.weights.roles import AUXILIARY


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
    product and the sum are rounded one after the other; nothing else differs but by a cast. Of
    weights that were put into codes after the merge, the share of the product in the change is 1,
    as far as their noise lets it be told. With `--parent FILE` a merge is any mix of base and
    parents, to rounding.
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
        far = [t for t in of_role if moved(t) > limit]
        if far:
            yield _too_far(far, role, limit)
    merges = drifted.expected.merges
    wrong = [m for m in merges if is_wrong(m, merge_ulps)]
    told = [m for m in wrong if m.reason is None]
    rest = others(drifted, decibels_per_bit)
    if told and len(told) == len(merges) and 2 * len(rest.wrong) > len(rest.tensors):
        yield another_base(told, rest)
    else:
        if rest.wrong:
            yield _changed(rest.wrong, len(rest.tensors), rest.should)
        if told:
            yield wrong_merge(told, len(merges), merge_ulps)
    if unknown := [m for m in merges if m.reason and (m.residual_ulps is None or m in wrong)]:
        yield not_compared(unknown, len(merges))


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
        yield not_merged(idle, len(merges))
    if drifted.expected.kind == "merge" and not merges and not any(map(mixed, tensors)):
        yield Observation(
            drifted.new,
            "no tensor is a mix of the base and its parents: the merge did nothing",
            "check that the merged checkpoint was given, and that its weights were saved",
            {"tensors": len(tensors)},
        )
    if drifted.expected.kind == "quantised" and not any(map(smaller, tensors)):
        yield Observation(
            drifted.new,
            "no weight is stored in fewer bits than in the base",
            "check that the quantised checkpoint was given, and that its weights were saved",
            {"tensors": len(tensors)},
        )


# -- words -----------------------------------------------------------------------------------------


def _changed(wrong: Sequence[TensorDrift], total: int, should: str) -> Observation:
    worst = max(wrong, key=moved)
    others = listed((t.name for t in wrong if t is not worst), len(wrong) - 1)
    return Observation(
        worst.name,
        f"{len(wrong):,} of {plural(total, 'tensor')} that {should} differ: {what(worst)}"
        + (f"; also {others}" if others else ""),
        "if it was meant to change, narrow what you expect; otherwise find the step that touched "
        "it: a parameter group, a buffer in training mode, a merge, a partial load",
        {"tensors": len(wrong), "of": total, "relative_drift": moved(worst), "expected": should},
        threshold=0,
    )


def _too_far(far: Sequence[TensorDrift], role: str, limit: float) -> Observation:
    worst = max(far, key=moved)
    others = listed((t.name for t in far if t is not worst), len(far) - 1)
    what = "tensor" if role == "*" else f"{role} tensor"
    return Observation(
        worst.name,
        f"{plural(len(far), what)} moved by more than {limit:g} of the norm, this one by "
        f"{moved(worst):.3g}" + (f"; also {others}" if others else ""),
        "look at the learning rate of these layers, or raise --max-drift if so much was wanted",
        {"tensors": len(far), "relative_drift": moved(worst), "role": role},
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
