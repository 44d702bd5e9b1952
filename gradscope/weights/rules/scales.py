"""The rule about the scales of quantised weights, and whatever else their codes need."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence

from gradscope.checkpoints.tensors import TensorRef
from gradscope.quantization.checks import wrong_value, wrong_values
from gradscope.quantization.weights import Fault, QuantizedWeight
from gradscope.report.rules import Observation, Unknown, rule
from gradscope.report.severity import Severity
from gradscope.statistics.dtypes import is_narrow
from gradscope.statistics.records import Statistics
from gradscope.text import listed, plural
from gradscope.weights.names import common_pattern, pattern
from gradscope.weights.result import Examined, Need, TensorResult
from gradscope.weights.roles import split

_ONE_SHARD = re.compile(r"-\d{5}-of-\d{5}\.\w+$")


@rule("W117", "scale-missing", Severity.HIGH, reads=Examined, needs=Need.STATISTICS)
def scale_missing(
    examined: Examined, *, filled: int = 4, integers_from: float = 100.0
) -> Iterator[Observation | Unknown]:
    """A quantised weight lacks a scale, or has one that is not positive, not finite or misshapen.

    Loaders leave an absent scale uninitialised and carry on (vLLM #57108). The layouts that are
    known, and what each needs, are in docs/quantized.md. That a layer of the same type has a scale
    proves that this one needs it, and so does the configuration beside the checkpoint, with which
    bits and group sizes are compared. 8-bit floats without any scale in the file are a plain cast
    (info), unless four or more matrices, or one among others that are scaled, all reach the
    greatest value of their type exactly, as codes do that a scale maps there; integers up to 100
    and more are codes.
    """
    yield from _missing(examined)
    yield from _misshapen(examined)
    yield from _invalid(examined)
    yield from _configured(examined)
    yield from _bare(examined, filled, integers_from)


# -- what is not there ----------------------------------------------------------------------------


def _missing(examined: Examined) -> Iterator[Observation | Unknown]:
    unread = {s.subject for s in examined.checkpoint.skipped}
    groups: dict[tuple[str, tuple[str, ...]], list[QuantizedWeight]] = defaultdict(list)
    for weight in _judged(examined):
        if parts := tuple(p for p in _parts(weight) if _whole(weight, p) not in unread):
            groups[weight.scheme, parts].append(weight)
    if groups and _ONE_SHARD.search(examined.checkpoint.path):
        yield Unknown("scales may be in another shard: name the folder or the index")
        return
    for (scheme, parts), weights in groups.items():
        yield _lacking(examined, scheme, parts, weights)


def _judged(examined: Examined) -> Iterator[QuantizedWeight]:
    """The quantised weights among the tensors that were asked for."""
    return (w for w in examined.quantization.weights if w.codes.name in examined.by_name)


def _parts(weight: QuantizedWeight) -> tuple[str, ...]:
    return tuple(dict.fromkeys(f.what for f in weight.faults if f.kind == "missing"))


def _whole(weight: QuantizedWeight, part: str) -> str:
    """The full name of something beside the codes."""
    module = weight.codes.name.rpartition(".")[0]
    return f"{module}.{part}" if module else part


def _lacking(
    examined: Examined, scheme: str, parts: Sequence[str], weights: Sequence[QuantizedWeight]
) -> Observation:
    first = weights[0]
    names = [w.codes.name for w in weights]
    wanted = listed(list(parts), len(parts), 5)
    total = sum(w.scheme == scheme for w in _judged(examined))
    said = next(f.message for f in first.faults if f.kind == "missing")
    return Observation(
        _subject([examined.by_name[n] for n in names]),
        f"{scheme} codes without {wanted}" + (f" ({said})" if ", as " in said else "")
        if len(weights) == 1
        else f"{len(weights):,} of {total:,} {scheme} weights have no {wanted}: "
        f"{listed(names, len(names), 3)}",
        f"restore {_whole(first, parts[0])} from the source, or quantise again; without it the "
        "codes have no values, and some loaders go on with whatever is in memory",
        {"weights": len(weights), "missing": ", ".join(parts), "affected_fraction": 1.0},
    )


def _subject(tensors: Sequence[TensorResult]) -> str:
    return tensors[0].name if len(tensors) == 1 else common_pattern(tensors)


# -- what is there and wrong ----------------------------------------------------------------------


def _misshapen(examined: Examined) -> Iterator[Observation]:
    groups: dict[tuple[str, str], list[Fault]] = defaultdict(list)
    for weight in _judged(examined):
        for fault in weight.faults:
            if fault.kind == "shape":
                groups[weight.scheme, fault.what].append(fault)
    for faults in groups.values():
        subjects = list(dict.fromkeys(f.subject for f in faults))
        yield Observation(
            _named(examined, subjects),
            faults[0].message + _others(subjects),
            "quantise again, or restore the tensor from the source",
            {"tensors": len(subjects), "affected_fraction": 1.0, **faults[0].evidence},
        )


def _invalid(examined: Examined) -> Iterator[Observation]:
    measured = {t.name: t.statistics for t in examined.tensors if t.statistics is not None}
    found: dict[tuple[str, str], list[tuple[str, str, QuantizedWeight]]] = defaultdict(list)
    for weight in _judged(examined):
        for name, reason in wrong_values(weight, measured, examined.lost).items():
            found[pattern(name), reason.split(" ", 1)[0]].append((name, reason, weight))
    yield from _caches(examined, measured)
    for entries in found.values():
        name, reason, weight = entries[0]
        names = [n for n, _, _ in entries]
        yield Observation(
            _named(examined, names),
            f"the {_part(name, weight)} of {weight.name} {reason}{_place(examined, name)}"
            + _others(names),
            "quantise again, or restore it from the source",
            {"weight": weight.name, "tensors": len(names), "affected_fraction": 1.0},
        )


def _caches(examined: Examined, measured: Mapping[str, Statistics]) -> Iterator[Observation]:
    for cache in examined.quantization.caches:
        if (s := measured.get(cache.name)) and (reason := wrong_value(cache, s)):
            yield Observation(
                cache.name,
                f"the scale of cached keys or values {reason}",
                "calibrate the cache again, or leave its scales out: servers then use 1",
                {"affected_fraction": 1.0},
            )


def _part(name: str, weight: QuantizedWeight) -> str:
    kind = next(c.kind for c in weight.companions if c.name == name)
    return {"index": "group index", "signed": "table or shift"}.get(kind, str(kind))


def _place(examined: Examined, name: str) -> str:
    places = [list(e.index) for e in examined.by_name[name].nonfinite[:3]]
    return f", at {listed(places, len(places))}" if places and places[0] else ""


def _others(names: Sequence[str]) -> str:
    return f" (and {len(names) - 1:,} more)" if len(names) > 1 else ""


def _named(examined: Examined, names: Sequence[str]) -> str:
    known = [examined.by_name[n] for n in names if n in examined.by_name]
    return names[0] if len(names) == 1 or not known else _subject(known)


def _configured(examined: Examined) -> Iterator[Observation]:
    for fault in examined.quantization.faults:
        unquantized = fault.what == "method"
        yield Observation(
            fault.subject,
            fault.message,
            f"take quantization_config out of {fault.subject}, or ship the quantised tensors"
            if unquantized
            else "restore the configuration that these tensors were quantised with",
            dict(fault.evidence),
            severity=Severity.MEDIUM if unquantized else None,
        )


# -- codes without any scale in the file ----------------------------------------------------------


def _bare(examined: Examined, filled: int, integers_from: float) -> Iterator[Observation]:
    found = _by_type(examined.quantization.bare, examined.by_name)
    scaled = {w.codes.dtype for w in examined.quantization.weights}
    for dtype, tensors in found.items():
        peaks = [float(t.statistics.abs_max or 0) for t in tensors if t.statistics is not None]
        if not peaks:
            continue
        if not is_narrow(dtype):
            if max(peaks) >= integers_from:
                yield _unscaled(dtype, tensors, f"up to {max(peaks):.0f}", integers_from)
            continue
        limits = [t.numerics.headroom_bits for t in tensors if t.numerics is not None]
        if len(tensors) >= (1 if dtype in scaled else filled) and all(bits == 0 for bits in limits):
            yield _unscaled(dtype, tensors, "each up to the greatest of its type", filled)
            continue
        yield Observation(
            _subject(tensors),
            f"{plural(len(tensors), 'weight')} in {dtype} without a scale in the file: cast, not "
            "scaled",
            "nothing to do if the loader expects an unscaled cast",
            {"weights": len(tensors), "abs_max": max(peaks)},
            severity=Severity.INFO,
        )


def _by_type(
    bare: Sequence[TensorRef], tensors: Mapping[str, TensorResult]
) -> dict[str, list[TensorResult]]:
    found: dict[str, list[TensorResult]] = defaultdict(list)
    for ref in bare:
        if ref.name in tensors:
            found[ref.dtype].append(tensors[ref.name])
    return found


def _unscaled(
    dtype: str, tensors: Sequence[TensorResult], values: str, threshold: float
) -> Observation:
    names = [t.name for t in tensors]
    module = split(names[0])[0]
    wanted = f"{module}.weight_scale" if module else "weight_scale"
    return Observation(
        _subject(tensors),
        f"{plural(len(tensors), 'weight')} in {dtype}, {values}, and no scale in the file: "
        f"{listed(names, len(names), 3)}",
        f"restore the scales ({wanted}, or SCB) from the source, or quantise again",
        {"weights": len(tensors), "affected_fraction": 1.0},
        threshold,
    )
