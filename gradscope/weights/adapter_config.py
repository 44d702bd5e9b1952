"""What an adapter was meant to be: ``adapter_config.json``, or the header's metadata."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from gradscope.checkpoints.tensors import Checkpoint
from gradscope.weights.adapters import Adapter
from gradscope.weights.result import AdapterResult, Examined

Fields = Mapping[str, object]


@dataclass(frozen=True, slots=True)
class AdapterConfig:
    """The fields of PEFT's configuration, or of MLX's, under PEFT's names."""

    fields: Fields
    #: Which part of a pipeline it is about (``transformer``, ``unet``); empty for all.
    component: str = ""

    def about(self, adapter: Adapter) -> bool:
        """Whether it describes this module's adapter."""
        return not self.component or adapter.module.startswith(f"{self.component}.")

    @property
    def is_lora(self) -> bool:
        """Whether r is the rank of every module, as a pattern may change it."""
        return self.fields.get("peft_type", "LORA") == "LORA"

    def rank(self, adapter: Adapter) -> int | None:
        """The rank that a module should have."""
        found = _number(self._matching("rank_pattern", adapter.module, self.fields.get("r")))
        return int(found) if found and found.is_integer() else None

    def alpha(self, adapter: Adapter) -> float | None:
        """What the update of a module is multiplied by, times its rank (rsLoRA: its root)."""
        alpha = self.fields.get("lora_alpha", self.fields.get("alpha"))
        return _number(self._matching("alpha_pattern", adapter.module, alpha))

    @property
    def given_scale(self) -> float | None:
        """What MLX multiplies every product by."""
        return _number(self.fields.get("scale"))

    def scale(self, adapter: Adapter) -> float | None:
        """What the product is multiplied by: alpha / r; alpha / sqrt(r) of rsLoRA (2312.03732)."""
        if self.given_scale is not None:
            return self.given_scale
        alpha, layout = self.alpha(adapter), adapter.layout
        if alpha is None or layout is None or not layout.rank:
            return None
        return alpha / (math.sqrt(layout.rank) if self.fields.get("use_rslora") else layout.rank)

    @property
    def targets(self) -> tuple[str, ...]:
        """The modules by name; none where a pattern or a keyword chose them."""
        return _strings(self.fields.get("target_modules"))

    @property
    def saved_whole(self) -> tuple[str, ...]:
        """Modules that were trained and saved themselves."""
        return _strings(self.fields.get("modules_to_save"))

    @property
    def changes_base(self) -> str | None:
        """The initialisation, where it takes what the adapter begins with off the base."""
        named = self.fields.get("init_lora_weights")
        start = named.partition("_")[0] if isinstance(named, str) else None
        return start if start in ("pissa", "olora", "corda", "loftq", "lora") else None

    def trained_tokens(self, module: str) -> tuple[int, ...]:
        """The rows of a table that were trained themselves, as PEFT lists them."""
        given = self.fields.get("trainable_token_indices")
        if isinstance(given, Mapping):
            given = next((rows for name, rows in given.items() if ends(module, name)), None)
        rows: Sequence[object] = given if isinstance(given, list) else ()
        return tuple(n for n in rows if isinstance(n, int) and n >= 0)

    @property
    def excluded(self) -> bool:
        """Whether some modules were left out by name."""
        return bool(self.fields.get("exclude_modules"))

    @property
    def layers(self) -> frozenset[int]:
        """The layers that were chosen; none means all of them."""
        chosen = self.fields.get("layers_to_transform")
        listed = chosen if isinstance(chosen, list) else [chosen]
        return frozenset(n for n in listed if isinstance(n, int) and not isinstance(n, bool))

    @property
    def chooses_layers(self) -> bool:
        """Whether layers were chosen by number, by a pattern or by the modules' whole paths."""
        targets = self.fields.get("target_modules")
        whole_paths = any(re.search(r"\.\d+\.", target) for target in self.targets)
        pattern = isinstance(targets, str) and targets != "all-linear"
        return bool(self.layers) or self.excluded or whole_paths or pattern

    def _matching(self, field: str, module: str, otherwise: object) -> object:
        """What the first name that ends a module's path says, as PEFT matches them.

        They may be regular expressions, which strangers wrote: those are not run, and nothing is
        known of any module then.
        """
        patterns = self.fields.get(field)
        for pattern, value in patterns.items() if isinstance(patterns, Mapping) else ():
            name = pattern.removeprefix("^").removesuffix("$").replace("\\.", ".")
            if not re.fullmatch(r"[\w.\-]+", name):
                return None
            if ends(module, name):
                return value
        return otherwise


def adapter_configs(checkpoint: Checkpoint) -> tuple[AdapterConfig, ...]:
    """The configurations that come with a checkpoint."""
    return tuple(_configs(checkpoint.metadata))


def _configs(metadata: Fields) -> Iterator[AdapterConfig]:
    beside = metadata.get("adapter_config")
    if isinstance(beside, Mapping) and beside:
        yield AdapterConfig(_with_mlx(beside))
        return
    written = _parsed(metadata.get("lora_adapter_metadata"))  # by diffusers: component.key
    components = dict.fromkeys(key.partition(".")[0] for key in written if "." in key)
    for component in components:
        start = f"{component}."
        own = {k.removeprefix(start): v for k, v in written.items() if k.startswith(start)}
        yield AdapterConfig(own, component)


def _with_mlx(fields: Fields) -> Fields:
    own = fields.get("lora_parameters")
    if not isinstance(own, Mapping):
        return fields
    return {"r": own.get("rank"), "scale": own.get("scale"), "lora_alpha": own.get("alpha")} | dict(
        fields
    )


def _parsed(text: object) -> Fields:
    try:
        found = json.loads(text) if isinstance(text, str) else None
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def ends(module: str, name: str) -> bool:
    """Whether a module's path ends in a name."""
    return module == name or module.endswith(f".{name}")


def _number(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) and abs(value) < 2**53 else None


def _strings(value: object) -> tuple[str, ...]:
    named: Sequence[object] = value if isinstance(value, list) else ()
    return tuple(item for item in named if isinstance(item, str))


def described(examined: Examined) -> tuple[AdapterResult, ...]:
    """What headers and documents say of the adapters of a checkpoint, in their order."""
    configs = adapter_configs(examined.checkpoint)
    return tuple(_described(adapter, examined, configs) for adapter in examined.adapted)


def _described(
    adapter: Adapter, examined: Examined, configs: Sequence[AdapterConfig]
) -> AdapterResult:
    layout = adapter.layout
    return AdapterResult(
        input=examined.checkpoint.path,
        module=adapter.module,
        method=adapter.method,
        rank=None if layout is None else layout.rank,
        scale=_scale(adapter, examined, configs),
    )


def _scale(adapter: Adapter, examined: Examined, configs: Sequence[AdapterConfig]) -> float | None:
    """By the alpha beside the factors, else by the configuration; unknown without either."""
    alpha, layout = alpha_beside(adapter, examined), adapter.layout
    if alpha is not None and layout is not None and layout.rank:
        return alpha / layout.rank
    config = next((c for c in configs if c.about(adapter)), None)
    return None if config is None else config.scale(adapter)


def alpha_of(adapter: Adapter, examined: Examined) -> float | None:
    """The alpha (of MLX: the scale) of a module, from wherever it is."""
    if (beside := alpha_beside(adapter, examined)) is not None:
        return beside
    config = next((c for c in adapter_configs(examined.checkpoint) if c.about(adapter)), None)
    if config is None:
        return None
    return config.alpha(adapter) if config.given_scale is None else config.given_scale


def alpha_beside(adapter: Adapter, examined: Examined) -> float | None:
    """The value of the scalar ``alpha`` that kohya and LyCORIS store with each module."""
    found = examined.by_name.get(f"{adapter.module}.alpha")
    statistics = found.statistics if found is not None and found.numel == 1 else None
    return None if statistics is None or statistics.min is None else float(statistics.min)
