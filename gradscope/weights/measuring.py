"""One checkpoint measured: its tensors as stored, and quantised weights by their values."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from gradscope.checkpoints.tensors import Checkpoint, TensorRef
from gradscope.quantization.checks import loses, wrong_values
from gradscope.quantization.weights import Companion, Kind, Quantization, QuantizedWeight
from gradscope.statistics import Pool, Profile
from gradscope.statistics.dtypes import INTEGERS, is_narrow
from gradscope.statistics.layout import UnitLayout
from gradscope.statistics.records import Statistics, TensorProfile
from gradscope.text import listed
from gradscope.weights.layouts import layouts
from gradscope.weights.result import Dequantized, Examined, Need, TensorResult, tensor_result
from gradscope.weights.roles import Role, roles

#: ``profile`` with its engine.
Run = Callable[..., Profile]


@dataclass(frozen=True, slots=True)
class Measured:
    """The profiles of a checkpoint's tensors by name: as they are stored, and as the values of
    quantised weights.
    """

    stored: Mapping[str, TensorProfile]
    values: Mapping[str, TensorProfile]
    pools: Mapping[str, Pool]
    roles: Mapping[str, Role]
    #: See ``Examined.lost``.
    lost: Mapping[str, float]


def measure(
    everything: Sequence[TensorRef],
    refs: Sequence[TensorRef],
    broken: Collection[str],
    quantization: Quantization,
    config: Mapping[str, object],
    run: Run,
) -> Measured:
    """Measure ``refs``, some tensors of a checkpoint; files that are ``broken`` are not read.

    The companions of codes come first: a weight whose scales are damaged has no values. Raises
    InputError as ``profile`` does.
    """
    names = roles_of(everything, quantization)
    types = {c.name: c.ref.dtype for w in quantization.weights for c in w.companions}
    packed = {c.name for w in quantization.weights for c in w.companions if _is_packed(c)}
    beside = [
        replace(ref, dtype=types[ref.name])
        for ref in refs
        if ref.name in types and ref.name not in packed
    ]
    first = run(beside, group=lambda ref: names[ref.name])
    scales = {p.ref.name: p.statistics for p in first.tensors}
    lost = _lost(quantization.weights, scales, run, broken)
    sound = {
        w.codes.name: w.values
        for w in quantization.weights
        if _readable(w, broken) and not wrong_values(w, scales, lost)
    }
    codes = {w.codes.name for w in quantization.weights}
    rest = [ref for ref in refs if ref.name not in types]
    second = run(
        list(_chosen(rest, codes, sound)),
        group=lambda ref: names[ref.name] if ref.decoding or ref.name not in sound else None,
        layout=_layouts(everything, quantization, names, config),
    )
    profiles = (*first.tensors, *second.tensors)
    return Measured(
        {p.ref.name: p for p in profiles if p.ref.decoding is None},
        {p.ref.name: p for p in profiles if p.ref.decoding is not None},
        _merged(first.pools, second.pools),
        names,
        lost,
    )


def _is_packed(companion: Companion) -> bool:
    """Whether a companion's elements are words of several numbers, which have no statistics."""
    return companion.kind is Kind.ANY and companion.ref.dtype in ("I32", "U32")


def _chosen(
    refs: Iterable[TensorRef], codes: Iterable[str], sound: Mapping[str, TensorRef | None]
) -> Iterator[TensorRef]:
    """What is measured of each tensor: itself, the values it stands for, both, or nothing.

    Integers that are codes are no numbers; 8-bit floats show what was clipped.
    """
    packed = frozenset(codes)
    for ref in refs:
        if ref.name not in packed or ref.dtype not in INTEGERS:
            yield ref
        if (values := sound.get(ref.name)) is not None:
            yield values


def _lost(
    weights: Iterable[QuantizedWeight],
    scales: Mapping[str, Statistics],
    run: Run,
    broken: Iterable[str],
) -> dict[str, float]:
    found = [loses(w, scales) for w in weights if _readable(w, broken)]
    profiles = run([ref for ref in found if ref is not None]).tensors
    shares = {p.ref.name: p.statistics for p in profiles}
    return {n: (s.count - s.zero_count - s.nan_count) / s.count for n, s in shares.items()}


def _readable(weight: QuantizedWeight, broken: Iterable[str]) -> bool:
    files = {ref.file for ref in weight.decoding.refs} if weight.decoding is not None else set()
    return weight.values is not None and files.isdisjoint(broken)


def _merged(first: Mapping[str, Pool], second: Mapping[str, Pool]) -> dict[str, Pool]:
    names = dict.fromkeys((*second, *first))
    return {
        name: first[name].merge(second[name])
        if name in first and name in second
        else (first.get(name) or second[name])
        for name in names
    }


# -- roles ----------------------------------------------------------------------------------------


def _stand_ins(quantization: Quantization) -> dict[str, TensorRef]:
    """By the name of the codes, the tensors that they stand for, as if stored in full."""
    weights = {
        w.codes.name: replace(
            w.codes, name=w.name.removesuffix("._data"), dtype="F32", shape=w.shape, strides=None
        )
        for w in quantization.weights
        if w.values is not None
    }
    casts = {
        ref.name: replace(ref, dtype="F32") for ref in quantization.bare if is_narrow(ref.dtype)
    }
    return weights | casts


def _layouts(
    refs: Sequence[TensorRef],
    quantization: Quantization,
    names: Mapping[str, Role],
    config: Mapping[str, object],
) -> Callable[[TensorRef], UnitLayout | None]:
    """Where each tensor's units lie; those of codes where their values' do."""
    stands = _stand_ins(quantization)
    full = {ref.name: stands.get(ref.name, ref) for ref in refs}
    named = {ref.name: names[name] for name, ref in full.items()}
    layout = layouts(full.values(), named, config)
    return lambda ref: layout(full[ref.name])


def roles_of(refs: Sequence[TensorRef], quantization: Quantization) -> dict[str, Role]:
    """Every tensor's role; codes have that of the weight that they stand for."""
    stands = _stand_ins(quantization)
    found = roles(stands.get(ref.name, ref) for ref in refs)
    named = {ref.name: found[stands.get(ref.name, ref).name] for ref in refs}
    beside = {c.name: _beside(c.kind, c.ref) for w in quantization.weights for c in w.companions}
    bare = {w.codes.name: _codes(w.codes) for w in quantization.weights if w.values is None}
    return named | {name: role for name, role in (beside | bare).items() if name in named}


def _codes(ref: TensorRef) -> Role:
    """Of codes that have no values: one an element, or packed."""
    return Role.QUANTIZED if is_narrow(ref.dtype) or ref.dtype == "I8" else Role.PACKED


def _beside(kind: Kind, ref: TensorRef) -> Role:
    return Role.PACKED if kind in (Kind.INDEX, Kind.ANY) and ref.dtype in INTEGERS else Role.SCALE


# -- results --------------------------------------------------------------------------------------


def examined(checkpoint: Checkpoint, quantization: Quantization, measured: Measured) -> Examined:
    """A checkpoint as the rules see it."""
    by_codes = {w.codes.name: w for w in quantization.weights}
    tensors = tuple(
        _result(ref, by_codes.get(ref.name), measured, checkpoint.path)
        for ref in checkpoint.tensors
    )
    noted = replace(checkpoint, notes=(*checkpoint.notes, *_notes(quantization)))
    known = frozenset({Need.HEADERS, Need.TENSOR, Need.STATISTICS})
    return Examined(noted, tensors, known, quantization=quantization, lost=measured.lost)


def _result(
    ref: TensorRef, weight: QuantizedWeight | None, measured: Measured, path: str
) -> TensorResult:
    stored, values = measured.stored.get(ref.name), measured.values.get(ref.name)
    role = measured.roles[ref.name]
    plain = tensor_result(stored or TensorProfile(ref, Statistics()), role, path)
    if values is None or weight is None:
        changed: dict[str, Any] = {"dtype": ref.dtype}
        return plain.model_copy(update=changed if stored else {"statistics": None})
    entropy = stored.statistics.entropy_bits if stored is not None else None
    described = {
        "dtype": ref.dtype,
        "statistics": replace(values.statistics, entropy_bits=entropy),
        "numerics": plain.numerics,
        "dequantized": Dequantized.of(weight),
    }
    return tensor_result(values, role, path).model_copy(update=described)


def _notes(quantization: Quantization) -> Iterator[str]:
    """What is not turned into values though nothing is wrong with it."""
    names = [w.name for w in quantization.weights if w.decoding is None and not w.faults]
    if names:
        yield (
            f"{listed(names, len(names), 3)}: the layout of the codes is not known; their scales "
            "were judged, their values were not"
        )
