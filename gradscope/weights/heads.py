"""Attention heads: which rows are whose queries and keys, and what their logits can become."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy.typing as npt

from gradscope.checkpoints.tensors import TensorRef
from gradscope.spectra.attention import Heads, Input, Side, heads
from gradscope.spectra.matrices import read
from gradscope.statistics.dtypes import is_float
from gradscope.statistics.layout import UnitLayout
from gradscope.weights.family import place
from gradscope.weights.layouts import as_rows
from gradscope.weights.result import AttentionResult, Examined

Array = npt.NDArray[Any]
Layout = Callable[[TensorRef], UnitLayout | None]

#: What queries are called, and the keys beside them.
_QUERY = re.compile(r"(.*?)(q_proj|q_lin|to_q|wq|query|q)((?:\.|/)(?:weight|kernel))")
_KEYS = {"q_proj": "k_proj", "q_lin": "k_lin", "to_q": "to_k", "wq": "wk", "query": "key", "q": "k"}
#: Models that store a gain of 1 + w as w.
_CENTRED = re.compile(r"gemma|qwen3_next", re.IGNORECASE)
#: Norms whose output an attention takes, by the place beside the attention's module.
_BEFORE = (
    "input_layernorm", "ln_1", "norm1", "attention_norm", "attn_norm", "layernorm_before",
    "self_attn_layer_norm", "norm_1",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Attention:
    """The module, and where its queries and keys are."""

    module: str
    query: TensorRef
    key: TensorRef
    #: Units of a fused tensor; None for all of it.
    rows: tuple[Array | None, Array | None]
    size: int


def attention(
    examined: Examined, refs: Mapping[str, TensorRef], layout: Layout
) -> Iterator[AttentionResult]:
    """Every attention whose heads are known: by a configuration, or a norm of its queries.

    Raises InputError when a file changes or ends while it is read.
    """
    sound = {
        t.name
        for t in examined.tensors
        if t.statistics and t.statistics.finite_count == t.statistics.count > 0
    }
    config = examined.document("config")
    kept = {n: ref for n, ref in refs.items() if n in sound and is_float(ref.dtype)}
    for found in _attentions(kept, layout):
        sides = (
            _side(ref, rows, kept, layout)
            for ref, rows in zip((found.query, found.key), found.rows, strict=True)
        )
        query, key = sides
        if len(query.matrix) % len(key.matrix) == 0:
            given = _input(found, kept, query.matrix.shape[1])
            if given is not None and _CENTRED.search(str(config.get("model_type"))):
                given = replace(given, gain=1 + given.gain)
            seen = heads(query, key, found.size, given)
            yield _result(examined, found, seen, len(key.matrix) // found.size)


def _attentions(refs: Mapping[str, TensorRef], layout: Layout) -> Iterator[_Attention]:
    for name, ref in refs.items():
        units = layout(ref) if len(ref.shape) == 2 else None
        if units is None or units.head is None:
            continue
        if [part.name for part in units.parts] == ["q", "k", "v"]:
            q, k, _ = units.members
            module = place(place(name)[0].rstrip("./"))[0]
            yield _Attention(module, ref, ref, (q, k), units.head)
        elif (match := _QUERY.fullmatch(name)) and not units.parts:
            key = refs.get(match[1] + _KEYS[match[2]] + match[3])
            if key is not None and len(key.shape) == 2:
                yield _Attention(match[1], ref, key, (None, None), units.head)


def _side(
    ref: TensorRef, rows: Array | None, refs: Mapping[str, TensorRef], layout: Layout
) -> Side:
    seen, count, columns = as_rows(ref, layout(ref))
    matrix = read(seen, 0, seen.numel).reshape(count, columns)
    module, leaf = place(ref.name)
    found = refs.get(module + ("bias" if leaf in ("weight", "kernel") else f"{leaf}_bias"))
    bias = read(found, 0, found.numel).reshape(-1) if found is not None else None
    if rows is None:
        return Side(matrix, bias)
    return Side(matrix[rows], None if bias is None else bias[rows])


def _input(found: _Attention, refs: Mapping[str, TensorRef], width: int) -> Input | None:
    """The norm before; None where none is known, or queries and keys are normed, too."""
    if any(f"{found.module}{name}.weight" in refs for name in ("q_norm", "k_norm", "q_layernorm")):
        return None
    outer = place(found.module.rstrip("./"))[0]
    for norm in (outer + name for name in _BEFORE):
        gain = refs.get(f"{norm}.weight")
        if gain is not None and gain.shape == (width,):
            offset = refs.get(f"{norm}.bias")
            added = None if offset is None else read(offset, 0, width)
            return Input(read(gain, 0, width), added)
    return None


def _result(examined: Examined, found: _Attention, seen: Heads, key_heads: int) -> AttentionResult:
    return AttentionResult(
        input=examined.checkpoint.path,
        module=found.module.rstrip("./"),
        tensor=found.query.name,
        dtype=examined.by_name[found.query.name].dtype,
        heads=len(seen.norms),
        key_heads=key_heads,
        head_size=found.size,
        qk_norms=tuple(map(float, seen.norms)),
        effective_ranks=tuple(map(float, seen.ranks)),
        logit_rms=None if seen.typical is None else tuple(map(float, seen.typical)),
        logit_bounds=None if seen.bounds is None else tuple(map(float, seen.bounds)),
    )
