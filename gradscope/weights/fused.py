"""Matrices that are several in one, and attention heads: which units belong together."""

from __future__ import annotations

import re
from collections.abc import Iterator

from gradscope.checkpoints.tensors import TensorRef
from gradscope.statistics.layout import Part, UnitLayout
from gradscope.weights.family import Family, own_name, place

_QKV = re.compile(r"in_proj_weight|c_attn|(to_|attn_)?qkv(_proj)?|W_?pack|[Ww]qkv", re.IGNORECASE)
#: Queries, keys and values of one head (or of those that share keys) after another.
_BY_HEAD = re.compile(r"query_key_value|linear_qkv")
#: Keys and values in one.
_KV = re.compile(r"(to_|c_|in_proj_)?kv(_proj|_lin)?|key_value|[Ww]kv", re.IGNORECASE)
_GATED = re.compile(r"(\w+_)?(gate|up)_(and_)?(up|gate)(_proj)?|w_?12|w_?13|wi_fused|in_proj_glu")
_QUERY = re.compile(r"(self_)?(wq|to_q|q(_proj|_lin)?|query)")
_KEY = re.compile(r"(self_)?(w[kv]|to_[kv]|[kv](_proj|_lin)?|key|value)")
_RECURRENT = re.compile(r"(weight_)[ih]h(\w*)")


def divided(ref: TensorRef, layout: UnitLayout, family: Family) -> UnitLayout:
    """The layout with the parts and heads that a tensor's name and neighbours give it."""
    module, leaf = place(ref.name)
    names = {leaf, own_name(module)}
    if any(_QKV.fullmatch(name) for name in names):
        return _projections(ref, layout, family)
    if any(_BY_HEAD.fullmatch(name) for name in names):
        return _by_head(layout, family)
    for pattern, parts in ((_GATED, ("gate", "up")), (_KV, ("k", "v"))):
        if any(pattern.fullmatch(name) for name in names) and layout.units % 2 == 0:
            return layout.divided(*_equal(layout, *parts))
    if _is_gated_by_shape(ref, module, layout, family):
        return layout.divided(*_equal(layout, "value", "gate"))
    if gates := _RECURRENT.fullmatch(leaf):
        return _gates(module, gates, layout, family)
    return _in_heads(layout, module, names, family)


def _is_gated_by_shape(ref: TensorRef, module: str, layout: UnitLayout, family: Family) -> bool:
    """diffusers' GEGLU: ``net.0.proj`` gives twice what ``net.2`` takes."""
    if not module.endswith("net.0.proj.") or len(ref.shape) != 2:
        return False
    taking = family.refs.get(module.removesuffix("0.proj.") + "2.weight")
    return taking is not None and layout.units == 2 * taking.shape[-1]


def _equal(layout: UnitLayout, *names: str) -> Iterator[Part]:
    return (Part(name, layout.units // len(names)) for name in names)


def _projections(ref: TensorRef, layout: UnitLayout, family: Family) -> UnitLayout:
    """Queries, keys, values: by the heads of the configuration, else thirds of a square each."""
    for heads, shared, size in _heads(layout, family):
        if (heads + 2 * shared) * size == layout.units:
            sizes = zip("qkv", (heads, shared, shared), strict=True)
            return layout.divided(*(Part(n, many * size) for n, many in sizes), head=size)
    queries = layout.unit_numel if layout.units == 3 * layout.unit_numel else _attended(ref, family)
    rest = layout.units - (queries or layout.units)
    if not queries or rest <= 0 or rest % 2:
        return layout
    return layout.divided(Part("q", queries), Part("k", rest // 2), Part("v", rest // 2))


def _attended(ref: TensorRef, family: Family) -> int | None:
    """How wide the queries are: what the projection after the attention takes."""
    module = place(ref.name)[0]
    outer = module[: module.rstrip("./").rfind(own_name(module))]
    for name in ("out_proj", "o_proj", "proj", "dense", "c_proj", "wo", "Wo"):
        for found in (family.refs.get(f"{m}{name}.weight") for m in (module, outer)):
            if found is not None and len(found.shape) == 2:
                axis = family.orientation(found) or 0
                return found.shape[1 - axis]
    return None


def _by_head(layout: UnitLayout, family: Family) -> UnitLayout:
    for heads, shared, size in _heads(layout, family):
        if (heads + 2 * shared) * size == layout.units and heads % shared == 0:
            if "chatglm" in str(family.config.get("model_type")):
                sizes = (heads * size, shared * size, shared * size)
            else:
                sizes = (heads // shared * size, size, size)
            return layout.divided(*map(Part, "qkv", sizes), head=size)
    return layout


def _heads(layout: UnitLayout, family: Family) -> Iterator[tuple[int, int, int]]:
    """(heads, heads of keys and values, size of one) that the configuration may mean."""
    names = ("num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads")
    for heads in family.numbers(*names):
        shared = family.numbers("num_key_value_heads", "num_kv_heads", "n_head_kv", "kv_n_heads")
        shared += family.numbers("multi_query_group_num")
        sizes = family.numbers("head_dim", "kv_channels", "attention_head_size")
        if layout.unit_numel % heads == 0:
            sizes.append(layout.unit_numel // heads)
        yield from ((heads, s, size) for size in sizes for s in (*shared, heads, 1))


def _gates(module: str, name: re.Match[str], layout: UnitLayout, family: Family) -> UnitLayout:
    """An LSTM's four, a GRU's three, as many times as hidden units give the recurrent matrix."""
    recurrent = family.refs.get(f"{module}{name[1]}hh{name[2]}")
    if recurrent is None or len(recurrent.shape) != 2:
        return layout
    if f"{module}{name[1]}hr{name[2]}" in family.refs:
        return layout.divided(*_equal(layout, *"ifgo"))
    gates = {4: "ifgo", 3: "rzn"}.get(layout.units // recurrent.shape[1], "")
    return layout.divided(*_equal(layout, *gates)) if gates else layout


def _in_heads(layout: UnitLayout, module: str, names: set[str], family: Family) -> UnitLayout:
    """One projection of heads, where the configuration or a norm of queries tells their size."""
    query = any(_QUERY.fullmatch(name) for name in names)
    if layout.head or not (query or any(_KEY.fullmatch(name) for name in names)):
        return layout
    outer = module[: module.rstrip("./").rfind(own_name(module))]
    norm = family.refs.get(f"{outer}q_norm.weight")
    sizes = [norm.shape[0]] if norm is not None and len(norm.shape) == 1 else []
    for heads, shared, size in _heads(layout, family):
        if layout.units == (heads if query else shared) * size:
            sizes.append(size)
    fitting = [size for size in sizes if layout.units % size == 0 and layout.units > size]
    return layout.divided(head=fitting[0]) if fitting else layout
