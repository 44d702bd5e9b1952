"""Attention heads: which rows are whose queries and keys, and what their logits can become."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy.typing as npt

from gradscope.checkpoints.tensors import TensorRef
from gradscope.spectra.attention import Heads as Computed
from gradscope.spectra.attention import Input, Side, heads
from gradscope.spectra.marchenko import random_rank
from gradscope.spectra.matrices import read
from gradscope.statistics.dtypes import is_float
from gradscope.statistics.layout import UnitLayout
from gradscope.weights import inputs
from gradscope.weights.family import place
from gradscope.weights.layouts import as_rows
from gradscope.weights.result import AttentionResult, Examined

Array = npt.NDArray[Any]
Layout = Callable[[TensorRef], UnitLayout | None]

#: What queries are called, and the keys and values beside them.
_QUERY = re.compile(r"(.*?)(q_proj|q_lin|to_q|wq|query|q)((?:\.|/)(?:weight|kernel))")
_BESIDE = {
    "q_proj": ("k_proj", "v_proj"), "q_lin": ("k_lin", "v_lin"), "to_q": ("to_k", "to_v"),
    "wq": ("wk", "wv"), "query": ("key", "value"), "q": ("k", "v"),
}  # fmt: skip
#: What the gain and the offset of a norm are called.
_LEAVES = (("weight", "bias"), ("gamma", "beta"))


@dataclass(frozen=True, slots=True)
class Attention:
    """The module, and where its queries, keys and values are."""

    module: str
    query: TensorRef
    key: TensorRef
    #: None where it is not known or does not lie in heads of that size.
    value: TensorRef | None
    #: Units of a fused tensor; None for all of it.
    rows: tuple[Array | None, Array | None, Array | None]
    size: int


@dataclass(frozen=True)
class Heads:
    """What is known of the heads of a checkpoint."""

    examined: Examined
    #: The tensors that can be decomposed, and how their units lie.
    refs: Mapping[str, TensorRef]
    layout: Layout

    @classmethod
    def of(cls, examined: Examined, refs: Mapping[str, TensorRef], layout: Layout) -> Heads:
        """Of the float tensors whose every element is finite."""
        sound = {
            t.name
            for t in examined.tensors
            if t.statistics and t.statistics.finite_count == t.statistics.count > 0
        }
        kept = {n: ref for n, ref in refs.items() if n in sound and is_float(ref.dtype)}
        return cls(examined, kept, layout)

    def attentions(self) -> Iterator[Attention]:
        """Every attention whose heads are known: by a configuration, or a norm of its queries."""
        for name, ref in self.refs.items():
            units = self.layout(ref) if len(ref.shape) == 2 else None
            if units is None or units.head is None:
                continue
            if [part.name for part in units.parts] == ["q", "k", "v"]:
                q, k, v = units.members
                module = place(place(name)[0].rstrip("./"))[0]
                if len(q) % len(k) == 0:
                    yield Attention(module, ref, ref, ref, (q, k, v), units.head)
            elif (match := _QUERY.fullmatch(name)) and not units.parts:
                beside = (match[1] + other + match[3] for other in _BESIDE[match[2]])
                key, value = (self._in_heads(other, units.head) for other in beside)
                if key is not None and units.units % self._many(key) == 0:
                    yield Attention(match[1], ref, key, value, (None, None, None), units.head)

    def _in_heads(self, name: str, size: int) -> TensorRef | None:
        """The matrix of a name, if it may be heads of that size."""
        ref = self.refs.get(name)
        fits = ref is not None and len(ref.shape) == 2 and self._many(ref) % size == 0
        return ref if fits else None

    def _many(self, ref: TensorRef) -> int:
        return as_rows(ref, self.layout(ref))[1]

    def reads(self, found: Attention) -> Iterator[str]:
        """Names of all that the result of an attention can depend on, there or not."""
        for ref in filter(None, (found.query, found.key, found.value)):
            yield from (ref.name, _bias(ref))
        yield from inputs.against(found.module)
        norms = (norm for pair in inputs.norms_of_queries(found.module) for norm in pair)
        for norm in (*norms, *inputs.norms_before(found.module, self._config)):
            yield from (f"{norm}.{leaf}" for leaves in _LEAVES for leaf in leaves)

    def result(self, found: Attention) -> AttentionResult:
        """What the heads of an attention can do.

        Raises InputError when a file changes or ends while it is read.
        """
        query, key = (
            self._side(ref, rows)
            for ref, rows in zip((found.query, found.key), found.rows[:2], strict=True)
        )
        value = None if found.value is None else self._side(found.value, found.rows[2]).matrix
        query, key = self._from_norms(found, query, key)
        scale = inputs.scale(found.module, found.size, self._config)
        return self._described(found, heads(query, key, found.size, value, scale))

    def _side(self, ref: TensorRef, rows: Array | None) -> Side:
        seen, count, columns = as_rows(ref, self.layout(ref))
        matrix = read(seen, 0, seen.numel).reshape(count, columns)
        found = self.refs.get(_bias(ref))
        bias = read(found, 0, found.numel).reshape(-1) if found is not None else None
        if rows is None:
            return Side(matrix, bias)
        return Side(matrix[rows], None if bias is None else bias[rows])

    def _from_norms(self, found: Attention, query: Side, key: Side) -> tuple[Side, Side]:
        """Queries and keys with the norm that tells how long they can be, where one is known."""
        module = found.module
        if inputs.is_scaled_by_position(module, self._config):
            return query, key
        if any(name in self.refs for name in inputs.against(module)):
            return query, key
        for names in inputs.norms_of_queries(module):
            q, k = (self._norm(module, name) for name in names)
            if q is not None or k is not None:
                fit = _fits(q, query, found.size) and _fits(k, key, found.size)
                return (replace(query, normed=q), replace(key, normed=k)) if fit else (query, key)
        width = query.matrix.shape[1]
        for name in inputs.norms_before(module, self._config):
            given = self._norm(module, name)
            if given is not None and given.gain.shape == (width,):
                return replace(query, given=given), replace(key, given=given)
        return query, key

    def _norm(self, module: str, name: str) -> Input | None:
        gain_, offset_ = next(
            (both for both in _LEAVES if f"{name}.{both[0]}" in self.refs), _LEAVES[0]
        )
        gain, offset = self.refs.get(f"{name}.{gain_}"), self.refs.get(f"{name}.{offset_}")
        if gain is None:
            return None
        added = None if offset is None else read(offset, 0, offset.numel).reshape(offset.shape)
        stored = read(gain, 0, gain.numel).reshape(gain.shape)
        return Input(stored + inputs.less(module, self._config), added)

    @property
    def _config(self) -> Mapping[str, object]:
        return self.examined.document("config")

    def _described(self, found: Attention, seen: Computed) -> AttentionResult:
        return AttentionResult(
            input=self.examined.checkpoint.path,
            module=found.module.rstrip("./"),
            tensor=found.query.name,
            key_tensor=found.key.name,
            value_tensor=None if found.value is None else found.value.name,
            dtype=self.examined.by_name[found.query.name].dtype,
            heads=len(seen.norms),
            key_heads=len(seen.key_ranks),
            head_size=found.size,
            qk_norms=_floats(seen.norms),
            effective_ranks=_floats(seen.ranks),
            query_ranks=_floats(seen.query_ranks),
            key_ranks=_floats(seen.key_ranks),
            value_ranks=None if seen.value_ranks is None else _floats(seen.value_ranks),
            random_rank=random_rank(found.size, found.query.numel // self._many(found.query)),
            logit_rms=None if seen.typical is None else _floats(seen.typical),
            logit_bounds=None if seen.bounds is None else _floats(seen.bounds),
        )


def _bias(ref: TensorRef) -> str:
    """What the bias of a matrix is called."""
    module, leaf = place(ref.name)
    return module + ("bias" if leaf in ("weight", "kernel") else f"{leaf}_bias")


def _fits(norm: Input | None, side: Side, size: int) -> bool:
    """Whether a norm is one of heads of that size, or of all of them together."""
    return norm is not None and norm.gain.size in (size, len(side.matrix))


def _floats(values: Array) -> tuple[float, ...]:
    return tuple(map(float, values))
