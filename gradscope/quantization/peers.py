"""What the codes of a layer lack that the same codes of other layers have, whatever the scheme.

Schemes come and go (HQQ, AQLM, QuIP#, EXL2, Marlin, …), and all of them keep codes and what these
need together, alike in every layer: so layers are each other's witnesses.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain

from gradscope.checkpoints.tensors import TensorRef
from gradscope.quantization.weights import Companion, Fault, Kind, QuantizedWeight
from gradscope.statistics.dtypes import INTEGERS, is_float, is_narrow

#: What scales and their like are called: one witness is enough.
BESIDE = re.compile(r"scale|absmax|zero|scb|quant|g_idx|_shape$|shift|codebook", re.IGNORECASE)
_SCALE = re.compile(r"(^|[._])(w?scales?|absmax|scb|scale_max)$", re.IGNORECASE)
#: Integers that are no codes.
_INDEX = re.compile(r"bias|mask|ids|index|buffer|steps?$|counts?$|invperm|perm$|groups$")
#: What a layer may have or not: biases, documents, scratch space, an order that may be the usual.
_OPTIONAL = re.compile(r"(.*[._])?(bias\w*|comfy_quant|weight_format|workspace|perm)")
_ORDER = ("g_idx", "weight_g_idx")
_LEAST = 256


@dataclass(frozen=True, slots=True)
class _Unit:
    """Codes with all that lies in their module, by its name there."""

    codes: TensorRef
    own: str
    beside: Mapping[str, TensorRef]


def unknown(
    refs: Iterable[TensorRef],
    known: Iterable[QuantizedWeight],
    tensors: Mapping[str, TensorRef],
    ordered: bool,
) -> Iterator[QuantizedWeight]:
    """Packed integers of no known layout: those beside a scale, and those that lack something."""
    packed = [ref for ref in refs if _may_be_packed(ref)]
    if not packed:
        return
    witnesses = _units([*packed, *(w.codes for w in known)], tensors)
    everywhere = _by_kind(witnesses, with_module=False)
    by_module = _by_kind(witnesses, with_module=True)
    names = {ref.name for ref in packed}
    for unit in (u for u in witnesses if u.codes.name in names):
        likes = by_module[_kind(unit, True)], everywhere[_kind(unit, False)]
        lacking = (fault for kin in likes for fault in _lacking(unit, kin, ordered, sure=0.5))
        faults = tuple({fault.what: fault for fault in lacking}.values())
        scales = tuple(_scales(unit))
        if faults or scales:
            ref = unit.codes
            name = f"packed {ref.dtype.lower()}"
            yield QuantizedWeight(ref.name, name, ref.shape, ref, scales, faults)


def compared(
    weights: Sequence[QuantizedWeight], tensors: Mapping[str, TensorRef], ordered: bool
) -> Iterator[QuantizedWeight]:
    """Sound weights of known layouts, with what those of like modules have besides."""
    sound = [w for w in weights if not w.faults]
    units = _units((w.codes for w in sound), tensors)
    likes = _by_kind(units, with_module=True)
    by_codes = {unit.codes.name: unit for unit in units}
    for weight in weights:
        unit = by_codes.get(weight.codes.name)
        lacking = () if unit is None else _lacking(unit, likes[_kind(unit, True)], ordered, 2 / 3)
        faults = tuple(lacking)
        yield replace(weight, faults=faults) if faults else weight


def _may_be_packed(ref: TensorRef) -> bool:
    leaf = ref.name.rpartition(".")[2]
    packed = ref.dtype in INTEGERS - {"BOOL", "I64", "U64"} or is_narrow(ref.dtype)
    named = BESIDE.search(leaf) is None or leaf.endswith(("_quantized", "quantized_weight"))
    return (
        packed
        and named
        and len(ref.shape) >= 2
        and ref.numel >= _LEAST
        and _INDEX.search(leaf) is None
    )


def _units(codes: Iterable[TensorRef], tensors: Mapping[str, TensorRef]) -> Sequence[_Unit]:
    """The modules of some codes; where the codes lie alone in theirs, the module around it."""
    wanted = list(codes)
    inner = _inside({_module(ref.name) for ref in wanted}, tensors)
    alone = {
        kind: all(len(inner[_module(ref.name)]) == 1 for ref in members)
        for kind, members in _grouped(wanted).items()
    }
    outer_of = {r.name: _module(_module(r.name)) for r in wanted if alone[_leaf_and_type(r)]}
    outer = _inside(set(outer_of.values()) - {""}, tensors)
    found = []
    for ref in wanted:
        module = outer_of.get(ref.name) or _module(ref.name)
        beside = outer.get(module) if ref.name in outer_of else inner[module]
        if module and beside is not None:
            found.append(_Unit(ref, re.sub(r"\d+", "*", module.rpartition(".")[2]), beside))
    return found


def _inside(
    modules: set[str], tensors: Mapping[str, TensorRef]
) -> Mapping[str, Mapping[str, TensorRef]]:
    """What lies in some modules and one level below, by names inside them."""
    found: dict[str, dict[str, TensorRef]] = defaultdict(dict)
    for name, ref in tensors.items() if modules else ():
        module = _module(name)
        for around in (module, _module(module)):
            if around in modules:
                found[around][name[len(around) + 1 :]] = ref
    return found


def _module(name: str) -> str:
    return name.rpartition(".")[0]


def _leaf_and_type(ref: TensorRef) -> tuple[str, str]:
    return ref.name.rpartition(".")[2], ref.dtype


def _grouped(refs: Iterable[TensorRef]) -> Mapping[tuple[str, str], list[TensorRef]]:
    found: dict[tuple[str, str], list[TensorRef]] = defaultdict(list)
    for ref in refs:
        found[_leaf_and_type(ref)].append(ref)
    return found


Kindred = tuple[str, ...]


def _kind(unit: _Unit, with_module: bool) -> Kindred:
    return (*_leaf_and_type(unit.codes), *((unit.own,) if with_module else ()))


def _by_kind(units: Iterable[_Unit], with_module: bool) -> Mapping[Kindred, list[_Unit]]:
    found: dict[Kindred, list[_Unit]] = defaultdict(list)
    for unit in units:
        found[_kind(unit, with_module)].append(unit)
    return found


def _lacking(unit: _Unit, likes: Sequence[_Unit], ordered: bool, sure: float) -> Iterator[Fault]:
    """What ``sure`` of the likes have (if it is no scale, three quarters and at least three)."""
    counts = Counter(chain.from_iterable(other.beside for other in likes))
    for part, count in counts.items():
        if part in unit.beside or _OPTIONAL.fullmatch(part) or (part in _ORDER and not ordered):
            continue
        telling = BESIDE.search(part.rpartition(".")[2]) and count >= sure * len(likes)
        if telling or (count >= 3 and count >= 0.75 * len(likes)):
            witness = next(other.codes.name for other in likes if part in other.beside)
            yield Fault("missing", unit.codes.name, part, f"has no {part}, as {witness} has")


def _scales(unit: _Unit) -> Iterator[Companion]:
    """Scales of a scheme that is not known: finite; a single one is positive, too."""
    for name, ref in unit.beside.items():
        if _SCALE.search(name) and is_float(ref.dtype) and ref.numel:
            yield Companion(ref, Kind.GLOBAL if ref.numel == 1 else Kind.SIGNED)
