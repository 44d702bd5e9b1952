"""Which tensors of a checkpoint are quantised weights, and which should be."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

from gradscope.checkpoints.tensors import Checkpoint, TensorRef
from gradscope.quantization.config import Config, described
from gradscope.quantization.layouts import LAYOUTS
from gradscope.quantization.layouts.elements import is_codes
from gradscope.quantization.peers import BESIDE, compared, unknown
from gradscope.quantization.site import Site
from gradscope.quantization.weights import (
    Companion,
    Fault,
    Kind,
    Quantization,
    QuantizedWeight,
)
from gradscope.statistics.dtypes import is_narrow

_TABLE = re.compile(r"embed|wte|wpe|(^|\.)shared\.|lm_head", re.IGNORECASE)
_ONE_SHARD = re.compile(r"-\d{5}-of-\d{5}\.")


def recognise(checkpoint: Checkpoint) -> Quantization:
    """The quantised weights of a checkpoint in file order.

    Reads a few small tensors that say how others are packed; raises InputError as a tile does.
    """
    tensors = {ref.name: ref for ref in (*checkpoint.tensors, *checkpoint.left_out)}
    config = described(checkpoint.metadata)
    ordered = config is not None and config.ordered
    known = list(compared(list(_known(checkpoint, tensors, config)), tensors, ordered))
    free = _not_among(known, checkpoint.tensors)
    loose = [ref for ref in free if _may_be_codes(ref)]
    proven = {ref.name: _proven(ref, known, tensors, config) for ref in loose}
    known += (w for w in proven.values() if w is not None)
    judged = {ref.name for ref in loose if not ref.dtype.startswith("U")}
    rest = (ref for ref in _not_among(known, free) if ref.name not in judged)
    packed = list(unknown((r for r in rest if _may_lack(r, config)), known, tensors, ordered))
    loose = _not_among(packed, loose)
    weights = [*known, *packed]
    order = {ref.name: place for place, ref in enumerate(checkpoint.tensors)}
    return Quantization(
        tuple(sorted(weights, key=lambda w: order[w.codes.name])),
        tuple(ref for ref in loose if proven[ref.name] is None and not ref.dtype.startswith("U")),
        tuple(_disagreements(checkpoint, weights, loose, config)),
        tuple(_caches(_not_among(weights, checkpoint.tensors)) if weights else ()),
    )


def _caches(refs: Iterable[TensorRef]) -> Iterator[Companion]:
    """Scales of the keys and values that a server keeps, which belong to no weight."""
    for ref in refs:
        if ref.name.rpartition(".")[2] in ("k_scale", "v_scale", "kv_scale") and ref.numel:
            yield Companion(ref, Kind.GLOBAL)


def _not_among(weights: Sequence[QuantizedWeight], refs: Sequence[TensorRef]) -> list[TensorRef]:
    """The tensors that belong to none of some weights."""
    taken = {w.codes.name for w in weights} | {c.name for w in weights for c in w.companions}
    return [ref for ref in refs if ref.name not in taken]


def _known(
    checkpoint: Checkpoint, tensors: Mapping[str, TensorRef], config: Config | None
) -> Iterator[QuantizedWeight]:
    for ref in checkpoint.tensors:
        site = Site(ref, tensors, checkpoint.metadata, config)
        found = (layout(site) for layout in LAYOUTS)
        if (weight := next((w for w in found if w is not None), None)) is not None:
            yield weight


def _may_be_codes(ref: TensorRef) -> bool:
    """Whether a tensor that no layout took could be the codes of a weight."""
    leaf = ref.name.rpartition(".")[2]
    if len(ref.shape) < 2 or ref.numel == 0 or BESIDE.search(leaf) or ref.dtype == "F8_E8M0":
        return False
    if ref.dtype in ("U8", "U32"):
        return leaf == "weight"
    return is_codes(ref) and (is_narrow(ref.dtype) or leaf in ("weight", "kernel", "w", "_data"))


def _may_lack(ref: TensorRef, config: Config | None) -> bool:
    """Whether the likes of a tensor prove what it needs: no table, and nothing left out."""
    excluded = config is not None and config.excludes(ref.name.rpartition(".")[0])
    return not excluded and _TABLE.search(ref.name) is None


def _proven(
    ref: TensorRef,
    known: Sequence[QuantizedWeight],
    tensors: Mapping[str, TensorRef],
    config: Config | None,
) -> QuantizedWeight | None:
    """The weight that a tensor without any scale must be, where something proves it."""
    if config is not None and config.excludes(ref.name.rpartition(".")[0]):
        return None
    twin = next((w for w in known if _alike(w.codes, ref)), None)
    if twin is not None:
        lacking = next((c.name for c in twin.companions if c.kind is Kind.SCALE), None)
        base = twin.codes.name.rpartition(".")[0]
        part = lacking.removeprefix(f"{base}.") if lacking else twin.faults[0].what
        return _lacking(ref, twin.scheme, part, f"as {twin.name} has")
    scheme = f"fp8 {ref.dtype[3:].lower()}" if ref.dtype.startswith("F8") else ref.dtype.lower()
    if ref.dtype.startswith("F8") and any(n.rpartition(".")[2] == "scaled_fp8" for n in tensors):
        return _lacking(ref, scheme, "scale_weight", "as scaled_fp8 in the file says")
    if known and is_codes(ref) and not _TABLE.search(ref.name):
        return _lacking(ref, scheme, "weight_scale", f"as {known[0].name} has one of its kind")
    if config is not None and _promised(ref, config):
        part = "weight_scale_inv" if config.block else "weight_scale"
        part = "SCB" if config.method == "bitsandbytes" else part
        return _lacking(ref, scheme, part, f"as {config.source} ({config.method}) asks")
    return None


def _lacking(ref: TensorRef, scheme: str, part: str, why: str) -> QuantizedWeight:
    fault = Fault("missing", ref.name, part, f"has no {part}, {why}")
    return QuantizedWeight(ref.name, scheme, ref.shape, ref, faults=(fault,))


def _alike(scaled: TensorRef, bare: TensorRef) -> bool:
    """Whether one weight's scale is proof that the other needs one.

    Tables of vectors may stay unscaled among scaled layers.
    """
    leaves = {ref.name.rpartition(".")[2] for ref in (scaled, bare)}
    same = scaled.dtype == bare.dtype and (len(leaves) == 1 or is_narrow(bare.dtype))
    return same and (not _TABLE.search(bare.name) or bool(_TABLE.search(scaled.name)))


def _promised(ref: TensorRef, config: Config) -> bool:
    """Whether a configuration says that tensors of this type are scaled codes."""
    if ref.dtype.startswith("F8"):
        return (config.number, config.bits) == ("float", 8)
    if ref.dtype == "I8":
        return (config.number, config.bits) == ("int", 8)
    return (ref.dtype == "U8" and config.bits == 4) or (
        ref.dtype == "U32" and config.method == "mlx"
    )


# -- what the configuration says ------------------------------------------------------------------


def _disagreements(
    checkpoint: Checkpoint,
    weights: Sequence[QuantizedWeight],
    loose: Sequence[TensorRef],
    config: Config | None,
) -> Iterator[Fault]:
    if config is None:
        return
    for what, said in (("bits", config.bits), ("group", config.group)):
        shown = {w.codes.name: getattr(w, what) for w in weights if not w.faults}
        wrong = [name for name, value in shown.items() if value and said and value != said]
        if wrong and len(wrong) == sum(value is not None for value in shown.values()):
            words = {"bits": "bits a weight", "group": "weights a scale"}[what]
            yield Fault(
                "config",
                wrong[0],
                what,
                f"{config.source} says {said} {words}, the tensors have {shown[wrong[0]]}",
                {"expected": said or 0, "found": shown[wrong[0]], "tensors": len(wrong)},
            )
    if config.promises and config.bits and not weights and not loose:
        plain = [ref for ref in checkpoint.tensors if _is_plain_layer(ref, config)]
        if plain and not _ONE_SHARD.search(checkpoint.path) and not checkpoint.skipped:
            yield Fault(
                "config",
                config.source,
                "method",
                f"says the weights are quantised ({config.method}), but none is: "
                f"{plain[0].name} is {plain[0].dtype}",
                {"method": config.method, "tensors": len(plain)},
            )


def _is_plain_layer(ref: TensorRef, config: Config) -> bool:
    module, _, leaf = ref.name.rpartition(".")
    layer = leaf == "weight" and len(ref.shape) == 2 and re.search(r"\.\d+\.", ref.name)
    return bool(layer) and ref.dtype in ("F16", "BF16", "F32") and not config.excludes(module)
