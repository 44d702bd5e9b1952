"""Whether an adapter was merged: each weight against W + s B A, computed anew in float64."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from gradscope.checkpoints.integrity import check_unchanged, verified
from gradscope.checkpoints.open import open_checkpoint
from gradscope.checkpoints.tensors import Checkpoint, TensorRef
from gradscope.checkpoints.tiles import PIECE
from gradscope.drift.describing import Seen
from gradscope.drift.low_rank import step_of
from gradscope.drift.matching import canonical
from gradscope.drift.result import Merge
from gradscope.drift.second_look import compare_all
from gradscope.drift.sums import rounding_between
from gradscope.errors import InputError
from gradscope.statistics.dtypes import FORMATS
from gradscope.weights.adapter_config import AdapterConfig, adapter_configs
from gradscope.weights.adapters import Adapter, adapters, part
from gradscope.weights.products import values

Values = npt.NDArray[np.float64]

_MAGNITUDE = "lora_magnitude_vector"


def merges(seen: Sequence[Seen], path: str) -> Iterator[Merge]:
    """What became of every module that the adapter at a path changes, in its order.

    Raises InputError for an adapter that cannot be read, or that is none.
    """
    checkpoint = verified(open_checkpoint(path))
    refs = {ref.name: ref for ref in checkpoint.tensors}
    found = adapters(refs.values())
    if not found:
        message = "holds no adapter: --adapter takes the folder with adapter_model.safetensors"
        raise InputError(path, "unsupported", message)
    where = _Targets.of(seen)
    for adapter in found:
        yield _merge(adapter, checkpoint, refs, where)
    for ref in refs.values():
        if part(ref.name) is None and _MAGNITUDE not in ref.name and not _is_alpha(ref.name):
            yield _replaced(ref, where)
    for file in {ref.file for ref in checkpoint.tensors}:
        check_unchanged(file, checkpoint.stamps[file])


@dataclass(frozen=True, slots=True)
class _Targets:
    """The weights of the base by their names without wrappers, and with dots as kohya's tools."""

    by_name: Mapping[str, Seen]
    flat: Mapping[str, Seen]

    @classmethod
    def of(cls, seen: Sequence[Seen]) -> _Targets:
        by_name = {canonical(name): s for s in seen for name in (s.base.name, s.new.name)}
        return cls(by_name, {name.replace(".", "_"): s for name, s in by_name.items()})

    def weight(self, module: str) -> Seen | None:
        """The weight of a module, or the parameter of that name."""
        for name in (f"{module}.weight", module):
            if (found := self.by_name.get(canonical(name))) is not None:
                return found
        bare = module.removeprefix("lora_unet_").removeprefix("lora_transformer_")
        return self.flat.get(f"{bare}_weight")


def _is_alpha(name: str) -> bool:
    return name.rpartition(".")[2] == "alpha"


def _merge(
    adapter: Adapter, checkpoint: Checkpoint, refs: Mapping[str, TensorRef], where: _Targets
) -> Merge:
    target = where.weight(adapter.module)
    plain = Merge(module=adapter.module, name=None, scale=None)
    if target is None:
        return plain.model_copy(update={"reason": "the base has no weight of that name"})
    plain = plain.model_copy(update={"name": target.new.name})
    config = next((c for c in adapter_configs(checkpoint) if c.about(adapter)), None)
    scale = _scale(adapter, refs, config)
    reason = _unfit(adapter, target, scale)
    if reason is not None or scale is None:
        return plain.model_copy(update={"reason": reason, "scale": scale})
    product = _Product.of(adapter, refs, config, target.base, scale)
    if product is None:
        return plain.model_copy(update={"reason": "its shape is not that of the weight"})
    return _compared(plain, target, product)


def _unfit(adapter: Adapter, target: Seen, scale: float | None) -> str | None:
    layout = adapter.layout
    if adapter.method != "lora" or layout is None or layout.grouped or adapter.tucker:
        return f"merges of {adapter.method} are not computed in this form"
    if target.base.shape != target.new.shape:
        return "the weight has another shape in the new checkpoint"
    if target.new.dtype not in FORMATS or target.base.dtype not in FORMATS:
        return "the weight is not a float"
    return "adapter_config.json does not say its alpha" if scale is None else None


def _scale(
    adapter: Adapter, refs: Mapping[str, TensorRef], config: AdapterConfig | None
) -> float | None:
    """The alpha beside the factors (kohya), else the configuration's."""
    beside, layout = refs.get(f"{adapter.module}.alpha"), adapter.layout
    if beside is not None and beside.numel == 1 and layout is not None and layout.rank:
        return float(values(beside)[0]) / layout.rank
    return None if config is None else config.scale(adapter)


@dataclass(frozen=True)
class _Product:
    """s B A as a matrix of the weight's rows, and DoRA's magnitudes of these."""

    left: Values
    right: Values
    scale: float
    magnitude: Values | None = None

    @classmethod
    def of(
        cls,
        adapter: Adapter,
        refs: Mapping[str, TensorRef],
        config: AdapterConfig | None,
        weight: TensorRef,
        scale: float,
    ) -> _Product | None:
        """None where the shapes do not fit."""
        a, b = (_matrix(refs[adapter.names[f]]) for f in ("A", "B"))
        assert adapter.layout is not None
        if adapter.layout.flipped:
            a, b = a.T, b.T
        rows = weight.shape[0]
        shape = rows, weight.numel // rows
        turned = bool(config is not None and config.fields.get("fan_in_fan_out"))
        fits, other = (len(b), a.shape[1]) == shape, (a.shape[1], len(b)) == shape
        if not fits and not other:
            return None
        left, right = (a.T, b.T) if other and (turned or not fits) else (b, a)
        return cls(left, right, scale, _magnitude(adapter, refs))

    def expected(self, first: int, last: int, weight: Values) -> Values:
        """What rows of the weight become."""
        merged = weight + self.scale * (self.left[first:last] @ self.right)
        if self.magnitude is None:
            return np.asarray(merged)
        norms = np.linalg.norm(merged, axis=1, keepdims=True)
        return np.asarray(self.magnitude[first:last, None] / norms * merged)


def _matrix(ref: TensorRef) -> Values:
    found = np.concatenate([values(ref, i, min(i + PIECE, ref.numel)) for i in _starts(ref)])
    return np.asarray(found.reshape(ref.shape[0], -1))


def _starts(ref: TensorRef) -> range:
    return range(0, ref.numel, PIECE)


def _magnitude(adapter: Adapter, refs: Mapping[str, TensorRef]) -> Values | None:
    """DoRA's norms of the rows (Liu et al. 2024, arXiv 2402.09353)."""
    start = f"{adapter.module}.{_MAGNITUDE}"
    ref = next((r for name, r in refs.items() if name.startswith(start)), None)
    return None if ref is None else values(ref).reshape(-1)


def _compared(plain: Merge, target: Seen, product: _Product) -> Merge:
    rows = target.base.shape[0]
    width = target.base.numel // rows
    step = max(1, PIECE // width)
    sums = np.zeros(5)
    most = 0.0
    for first in range(0, rows, step):
        last = min(first + step, rows)
        base, new = (
            values(ref, first * width, last * width).reshape(-1, width)
            for ref in (target.base, target.new)
        )
        wanted = product.expected(first, last, base)
        change, meant = new - base, wanted - base
        # Where base and change cancel, what was rounded are these, not the small sum.
        rounded = np.maximum(np.abs(new), np.maximum(np.abs(base), np.abs(meant)))
        left = (new - wanted) / step_of(rounded, target.new.dtype)
        sums += [np.vdot(x, y) for x, y in (
            (change, change), (change, meant), (meant, meant), (new - wanted, new - wanted),
            (left, left))]  # fmt: skip
        most = max(most, float(np.abs(left).max()))
    return plain.model_copy(update=_described(target, product, sums, most))


def _described(
    target: Seen, product: _Product, sums: Values, most: float
) -> dict[str, float | bool | None]:
    changed, both, meant, left, ulps = map(float, sums)
    m, why = target.measures, target.explanation
    as_base = m is not None and (m.identical or (why is not None and why.kind == "rounded"))
    return {
        "scale": product.scale,
        "fitted_scale": product.scale * both / meant if meant else None,
        "cosine": both / math.sqrt(changed * meant) if changed and meant else None,
        "residual_ulps": math.sqrt(ulps / target.new.numel),
        "max_ulps": most,
        "residual": math.sqrt(left / meant) if meant else None,
        "unchanged": as_base and most > 1,
    }


def _replaced(ref: TensorRef, where: _Targets) -> Merge:
    """A module that was trained whole and saved with the adapter: the new weight must be it."""
    name = ref.name.replace(".modules_to_save.default.", ".").replace(".modules_to_save.", ".")
    target = where.by_name.get(canonical(name))
    plain = Merge(module=ref.name, name=None, scale=None)
    if target is None or target.new.shape != ref.shape:
        return plain.model_copy(update={"reason": "the base has no tensor of that name and shape"})
    rounding = rounding_between(ref.dtype, target.new.dtype)
    m = compare_all(ref, target.new, rounding)
    as_saved = m.identical or (m.roundings is not None and max(m.roundings[:3]) == m.numel)
    same = target.measures is not None and target.measures.identical
    return plain.model_copy(
        update={
            "name": target.new.name,
            "residual": m.relative_drift,
            "residual_ulps": 0.0 if as_saved else math.inf if m.ulps is None else float(m.ulps[0]),
            "unchanged": same and not as_saved,
        }
    )
