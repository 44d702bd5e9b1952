"""What the documents beside a checkpoint say of its quantisation."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal

from gradscope.checkpoints.documents import DOCUMENTS

Document = Mapping[str, object]
Number = Literal["int", "float"]


@dataclass(frozen=True, slots=True)
class Config:
    """One document's account. None where it says nothing, or different things of several layers."""

    #: The file that says so.
    source: str
    method: str
    number: Number | None = None
    bits: int | None = None
    group: int | None = None
    block: tuple[int, int] | None = None
    #: Modules that stay as they were: names, parts of names, globs, ``re:`` expressions.
    excluded: tuple[str, ...] = ()
    #: Whether GPTQ's zero points are stored as they are, not less one.
    second_format: bool = False
    #: Whether GPTQ took the inputs in an order of its own, which ``g_idx`` tells.
    ordered: bool = False
    #: Whether it promises codes in the file, rather than a way of making them.
    promises: bool = True

    def excludes(self, module: str) -> bool:
        """Whether a module is among those that are not quantised."""
        return any(_matches(pattern, module) for pattern in self.excluded)


def described(metadata: Mapping[str, object]) -> Config | None:
    """What the documents of a checkpoint say; the first that says something."""
    return next((c for c in _accounts(metadata) if c is not None), None)


def _accounts(metadata: Mapping[str, object]) -> Iterator[Config | None]:
    config = _section(metadata, "config")
    for holder in (config, _section(config, "text_config")):
        yield _account(DOCUMENTS["config"], _section(holder, "quantization_config"))
        yield _account(DOCUMENTS["config"], _section(holder, "compression_config"))
    yield _mlx(_section(config, "quantization"))
    modelopt = _section(_section(metadata, "hf_quant_config"), "quantization")
    yield _account(DOCUMENTS["hf_quant_config"], modelopt, "modelopt")
    yield _account(DOCUMENTS["quantize_config"], _section(metadata, "quantize_config"), "gptq")
    yield _account(DOCUMENTS["quant_config"], _section(metadata, "quant_config"), "awq")


def _section(holder: Mapping[str, object], key: str) -> Document:
    found = holder.get(key)
    return found if isinstance(found, Mapping) else {}


def _account(source: str, said: Document, method: str = "") -> Config | None:
    if not said:
        return None
    method = str(said.get("quant_method") or method).lower()
    if not method:
        return None
    if any(said.get(key) for key in ("dynamic", "extra_config", "quantized_layers")):
        return Config(source, method, excluded=_excluded(said))  # layer by layer
    number, bits, group, block = _numbers(method, said)
    status = str(said.get("quantization_status", "compressed"))
    return Config(
        source,
        method,
        number,
        bits,
        group if group is not None and group > 0 else None,
        block,
        _excluded(said),
        "v2" in str(said.get("checkpoint_format", "")),
        said.get("desc_act") is True,
        method in _PROMISING and status == "compressed",
    )


_PROMISING = frozenset(
    {"fp8", "fbgemm_fp8", "gptq", "awq", "compressed-tensors", "mxfp4", "modelopt"}
)

Numbers = tuple[Number | None, int | None, int | None, tuple[int, int] | None]


def _numbers(method: str, said: Document) -> Numbers:
    """Kind of number, bits, group size and block."""
    block = _pair(said.get("weight_block_size"))
    group = _whole(said.get("group_size")) or _whole(said.get("q_group_size"))
    if method in ("fp8", "fbgemm_fp8"):
        return "float", 8, None, block
    if method == "mxfp4":
        return "float", 4, 32, None
    if method in ("gptq", "awq"):
        return "int", _whole(said.get("bits")) or _whole(said.get("w_bit")), group, None
    if method == "bitsandbytes":
        four = bool(said.get("load_in_4bit") or said.get("_load_in_4bit"))
        return ("float", 4, None, None) if four else ("int", 8, None, None)
    if method == "modelopt" and (algorithm := str(said.get("quant_algo", "")).upper()):
        return _algorithm(algorithm, group)
    return _groups(said)


def _algorithm(name: str, group: int | None) -> Numbers:
    """NVIDIA's names of the ways to quantise a weight."""
    if name.startswith("FP8"):
        return "float", 8, None, None
    if "FP4" in name:
        return "float", 4, group, None
    if name.startswith("W4"):
        return "int", 4, group, None
    return (None, None, None, None)


def _groups(said: Document) -> Numbers:
    """compressed-tensors: one description for each group of layers; they may differ."""
    groups = [
        _section(g, "weights")
        for g in _section(said, "config_groups").values()
        if isinstance(g, Mapping)
    ]
    numbers = {str(g.get("type")) for g in groups}
    bits = {_whole(g.get("num_bits")) for g in groups}
    sizes = {_whole(g.get("group_size")) for g in groups}
    blocks = {_pair(g.get("block_structure")) for g in groups}
    number: Number | None = (
        "int" if numbers == {"int"} else "float" if numbers == {"float"} else None
    )
    return number, *(found.pop() if len(found) == 1 else None for found in (bits, sizes, blocks))  # type: ignore[return-value]


def _mlx(said: Document) -> Config | None:
    bits, group = _whole(said.get("bits")), _whole(said.get("group_size"))
    return Config(DOCUMENTS["config"], "mlx", "int", bits, group) if bits and group else None


def _excluded(said: Document) -> tuple[str, ...]:
    keys = (
        "ignore",
        "modules_to_not_convert",
        "exclude_modules",
        "llm_int8_skip_modules",
        "ignored_layers",
    )
    lists = (said.get(key) for key in keys)
    return tuple(str(name) for found in lists if isinstance(found, list) for name in found)


def _matches(pattern: str, module: str) -> bool:
    if pattern.startswith("re:"):
        try:
            return re.match(pattern[3:], module) is not None
        except re.error:
            return False
    if "*" in pattern:
        return fnmatchcase(module, pattern)
    return f".{pattern}." in f".{module}."


def _whole(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _pair(value: object) -> tuple[int, int] | None:
    if isinstance(value, list) and len(value) == 2:
        first, second = map(_whole, value)
        if first and second and first > 0 and second > 0:
            return first, second
    return None
