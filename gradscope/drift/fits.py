"""Which tensors are what the whole of a checkpoint was said to have become."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass

from gradscope.drift.expectations import Expectations, names_of
from gradscope.drift.result import Drifted, Expected, Kind, TensorDrift
from gradscope.weights.patterns import matcher
from gradscope.weights.roles import TRAINING, Role

#: What a conversion may do to a tensor.
_CONVERTED: frozenset[Kind | None] = frozenset(
    {"cast", "rounded", "permuted", "transposed", "reshaped", "tied"}
)


@dataclass(frozen=True, slots=True)
class Others:
    """What no adapter names, and the tensors of it that are not what the whole was said to be."""

    tensors: Sequence[TensorDrift] = ()
    wrong: Sequence[TensorDrift] = ()
    should: str = ""


def others(drifted: Drifted, decibels: float) -> Others:
    """The tensors that no adapter names; codes have so many decibels of signal to noise a bit."""
    kind = drifted.expected.kind
    if kind is None:
        return Others()
    named = {m.name for m in drifted.expected.merges}
    tensors = [
        t
        for t in drifted.result.tensors
        if t.role not in TRAINING and t.name not in named and _base_name(t) not in named
    ]
    fits = _FITS[kind]
    wrong = [t for t in tensors if t.status is not None and not fits(t, decibels)]
    return Others(tensors, wrong, _WORDS[kind])


def told_otherwise(expected: Expectations) -> Callable[[TensorDrift], bool]:
    """Whether what a tensor may become was said, so that it is held against that alone."""
    named = matcher((*expected.frozen, *expected.changed))

    def told(tensor: TensorDrift) -> bool:
        of_role = tensor.role in expected.most or "*" in expected.most
        return of_role or expected.kind is not None or any(map(named, names_of(tensor)))

    return told


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


def _merged(tensor: TensorDrift, decibels: float) -> bool:
    why = tensor.explanation
    if why is not None and "scheme" in why.facts:  # merged, then put into codes
        return _quantised(tensor, decibels)
    return _converted(tensor, decibels) or _only(tensor, ("combined",))


def _quantised(tensor: TensorDrift, decibels: float) -> bool:
    why = tensor.explanation
    if why is None or why.kind != "quantised":
        return _converted(tensor, decibels)
    bits, ratio = why.facts.get("bits", 8), why.facts["snr_db"]
    return float(ratio) >= decibels * float(bits)


def mixed(tensor: TensorDrift) -> bool:
    """Whether it is a mix of parents."""
    return tensor.explanation is not None and tensor.explanation.kind == "combined"


def smaller(tensor: TensorDrift) -> bool:
    """Whether it is stored in fewer bits than in the base."""
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
