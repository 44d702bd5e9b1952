"""A saved adapter: what it does to which weights of a checkpoint."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from gradscope.checkpoints.integrity import check_unchanged, verified
from gradscope.checkpoints.open import open_checkpoint
from gradscope.checkpoints.tensors import Checkpoint, TensorRef
from gradscope.drift.describing import Seen
from gradscope.drift.matching import canonical
from gradscope.drift.updates import Dora, Product, Stack, Tokens, Update, whole
from gradscope.errors import InputError
from gradscope.statistics.dtypes import FORMATS
from gradscope.text import quoted
from gradscope.weights.adapter_config import AdapterConfig, adapter_configs
from gradscope.weights.adapters import Adapter, adapters, part
from gradscope.weights.products import values

#: What stands behind the module in the names of what PEFT saves beside the factors.
_MAGNITUDE, _BIAS, _TOKENS = "lora_magnitude_vector", "lora_B.bias", "trainable_tokens_delta"
_BESIDE = (_MAGNITUDE, _BIAS, _TOKENS)
_BASE = ".base_layer.weight"


@dataclass(frozen=True, slots=True)
class Targets:
    """The weights of the base by their names without wrappers, and with dots as kohya's tools."""

    by_name: Mapping[str, Seen]
    flat: Mapping[str, Seen]

    @classmethod
    def of(cls, seen: Sequence[Seen]) -> Targets:
        """Of the tensors of both."""
        by_name = {canonical(name): s for s in seen for name in (s.base.name, s.new.name)}
        return cls(by_name, {name.replace(".", "_"): s for name, s in by_name.items()})

    def weight(self, module: str, leaf: str = "weight") -> Seen | None:
        """The weight of a module, or the parameter of that name."""
        for name in (f"{module}.{leaf}", module):
            if (found := self.by_name.get(canonical(name))) is not None:
                return found
        bare = module.removeprefix("lora_unet_").removeprefix("lora_transformer_")
        return self.flat.get(f"{bare}_{leaf}")

    def stacks(self, module: str) -> list[Seen]:
        """The parameters of a module, whatever PEFT wrapped it in, that experts share."""
        while module.endswith(".base_layer"):
            module = module.removesuffix(".base_layer")
        start = f"{canonical(module)}."
        found = (s for name, s in self.by_name.items() if name.startswith(start))
        return list({id(s): s for s in found if len(s.base.shape) == 3}.values())


@dataclass(frozen=True, slots=True)
class Change:
    """What one adapter does to one weight, or why that is not known."""

    module: str
    target: Seen | None
    update: Update | None = None
    reason: str | None = None
    #: The weight as the adapter was trained on it, where it was saved beside it.
    base: TensorRef | None = None
    #: Why the base may be another one than the checkpoint's.
    doubt: str | None = None


@dataclass(frozen=True)
class File:
    """An adapter as it was saved: its tensors, and what its configuration says."""

    checkpoint: Checkpoint
    refs: Mapping[str, TensorRef]
    configs: Sequence[AdapterConfig]

    @classmethod
    def of(cls, path: str) -> File:
        """Raises InputError for what cannot be read, or is none."""
        checkpoint = verified(open_checkpoint(path))
        made = cls(checkpoint, {r.name: r for r in checkpoint.tensors}, adapter_configs(checkpoint))
        if not made.adapters:
            message = "holds no adapter: --adapter takes the folder with adapter_model.safetensors"
            raise InputError(path, "unsupported", message)
        return made

    @cached_property
    def adapters(self) -> tuple[Adapter, ...]:
        """Of each module."""
        return adapters(self.refs.values())

    def check(self) -> None:
        """Raises InputError for a file that was written to since its header was read."""
        for file in {ref.file for ref in self.checkpoint.tensors}:
            check_unchanged(file, self.checkpoint.stamps[file])

    def changes(self, where: Targets) -> Iterator[Change]:
        """Of each module its weight, then its bias; then tables of which tokens were trained."""
        for adapter in self.adapters:
            yield self._weight(adapter, where)
            yield from self._bias(adapter, where)
        for name, ref in self.refs.items():
            if _TOKENS in name:
                yield self._tokens(ref, where)

    def replaced(self) -> Iterator[TensorRef]:
        """What was trained whole and saved with the adapter."""
        factored = {adapter.module for adapter in self.adapters}
        for name, ref in self.refs.items():
            beside = any(word in name for word in _BESIDE) or name.rpartition(".")[2] == "alpha"
            base = name.endswith(_BASE) and name.removesuffix(_BASE) in factored
            if part(name) is None and not beside and not base:
                yield ref

    def _config(self, adapter: Adapter) -> AdapterConfig | None:
        return next((c for c in self.configs if c.about(adapter)), None)

    def _weight(self, adapter: Adapter, where: Targets) -> Change:
        found = Change(adapter.module, where.weight(adapter.module))
        if found.target is None:
            return self._stack(adapter, where)
        config, scale = self._config(adapter), self._scale(adapter)
        base = self.refs.get(f"{adapter.module}{_BASE}") or found.target.base
        reason = _unfit(adapter, base, found.target.new, scale)
        if reason is not None or scale is None:
            return replace(found, reason=reason)
        update = self._update(adapter, config, base, scale)
        if update is None:
            return replace(found, reason="its shape is not that of the weight")
        return replace(found, update=update, base=base, doubt=_doubt(config))

    def _stack(self, adapter: Adapter, where: Targets) -> Change:
        """Of ``target_parameters``: experts that are stacked in one parameter of the module."""
        found = Change(adapter.module, None, reason="the base has no weight of that name")
        config, factors = self._config(adapter), [adapter.shapes.get(f, ()) for f in ("A", "B")]
        alpha = None if config is None else config.alpha(adapter)
        if config is None or alpha is None or [len(f) for f in factors] != [2, 2]:
            return found
        (many, into), (out, _) = factors
        sides = sorted((into, out))
        likely = (s for s in where.stacks(adapter.module) if many % s.base.shape[0] == 0)
        stacks = [s for s in likely if sorted(s.base.shape[1:]) == sides]
        if len(stacks) > 1 or (stacks and into == out):
            return replace(found, reason="which stack of experts it changes is not told")
        if not stacks:
            return found
        (target,) = stacks
        a, b = (whole(self.refs[adapter.names[f]]) for f in ("A", "B"))
        root = bool(config.fields.get("use_rslora"))
        update = Stack.of(a, b, target.base.shape, alpha, root)
        return Change(adapter.module, target, update, _unlike(target.base, target.new))

    def _scale(self, adapter: Adapter) -> float | None:
        """The alpha beside the factors (kohya), else the configuration's."""
        beside, layout = self.refs.get(f"{adapter.module}.alpha"), adapter.layout
        if beside is not None and beside.numel == 1 and layout is not None and layout.rank:
            return float(values(beside)[0]) / layout.rank
        config = self._config(adapter)
        return None if config is None else config.scale(adapter)

    def _update(
        self, adapter: Adapter, config: AdapterConfig | None, weight: TensorRef, scale: float
    ) -> Update | None:
        """None where the shapes do not fit."""
        a, b = (whole(self.refs[adapter.names[f]]) for f in ("A", "B"))
        assert adapter.layout is not None
        made = Product(a.T, b.T, scale) if adapter.layout.flipped else Product(b, a, scale)
        shape = weight.shape[0], weight.numel // weight.shape[0]
        table = "embedding" in adapter.names["A"]
        turned = table or bool(config is not None and config.fields.get("fan_in_fan_out"))
        if shape not in (made.shape, made.turned.shape):
            return None
        turned = made.turned.shape == shape and (turned or made.shape != shape)
        product = made.turned if turned else made
        start = f"{adapter.module}.{_MAGNITUDE}"
        magnitudes = next((r for name, r in self.refs.items() if name.startswith(start)), None)
        if magnitudes is None:
            return product
        return Dora.of(product, whole(magnitudes).reshape(-1), weight, rows=not turned)

    def _bias(self, adapter: Adapter, where: Targets) -> Iterator[Change]:
        """Of ``lora_bias``: the second factor has an offset of its own."""
        ref, scale = self.refs.get(f"{adapter.module}.{_BIAS}"), self._scale(adapter)
        if ref is None:
            return
        target = where.weight(adapter.module, "bias")
        if target is None or scale is None or target.base.numel != ref.numel:
            yield Change(adapter.module, None, reason="the base has no bias for its offset")
        else:
            offset = Product(whole(ref).reshape(-1, 1), np.ones((1, 1)), scale)
            yield Change(adapter.module, target, offset)

    def _tokens(self, ref: TensorRef, where: Targets) -> Change:
        module = ref.name.partition(f".{_TOKENS}")[0].removesuffix(".token_adapter")
        target, trained = where.weight(module), whole(ref)
        rows = next((r for c in self.configs if (r := c.trained_tokens(module))), ())
        found = Change(module, target)
        if target is None:
            return replace(found, reason="the base has no table of that name")
        if len(rows) != len(trained) or max(rows, default=0) >= target.base.shape[0]:
            return replace(found, reason="adapter_config.json does not say which rows it has")
        return replace(found, update=Tokens(dict(zip(rows, trained, strict=True))))


def _unfit(adapter: Adapter, base: TensorRef, new: TensorRef, scale: float | None) -> str | None:
    layout = adapter.layout
    if adapter.method != "lora" or layout is None or layout.grouped or adapter.tucker:
        return f"merges of {adapter.method} are not computed in this form"
    if scale is None:
        return "adapter_config.json does not say its alpha"
    return _unlike(base, new)


def _unlike(base: TensorRef, new: TensorRef) -> str | None:
    if base.shape != new.shape:
        return "the weight has another shape in the new checkpoint"
    if new.dtype not in FORMATS or base.dtype not in FORMATS:
        return "the weight is not a float"
    return None


def _doubt(config: AdapterConfig | None) -> str | None:
    """Initialisations that take their product off the base, so that training starts from it."""
    if config is None or config.changes_base is None:
        return None
    return (
        f"an adapter initialised by {quoted(config.changes_base)} changes the base as well: "
        "compare with the base that was saved after that, or save the adapter as plain LoRA "
        "(path_initial_model_for_weight_conversion)"
    )
