"""Experts that one side stores stacked and the other one by one: each is compared by itself."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from gradscope.checkpoints.tensors import DTYPE_BITS, TensorRef
from gradscope.drift.logical import Logical

if TYPE_CHECKING:
    import numpy.typing as npt

Names = Callable[[str], str]

_NUMBERED = re.compile(r"^(?P<before>.*?experts)\.(?P<number>\d{1,6})\.(?P<after>.+)$")


def unstacked(base: Logical, new: Logical, names: Names | None) -> tuple[Logical, Logical, Names]:
    """Both, with each stack in slices whose experts the other side has one by one; and what the
    names of those experts become: that of the stack with a number.

    ``names`` turns the names that one side has into those of the other, without the number.
    """
    known = names or (lambda name: name)
    moved: dict[str, str] = {}
    here, some = _sliced(base, new, known)
    there, others = _sliced(new, base, known)
    moved = some | others
    return here, there, lambda name: moved.get(name) or known(name)


def _sliced(one: Logical, other: Logical, names: Names) -> tuple[Logical, dict[str, str]]:
    """The one, its stacks in slices; and the names of the other's experts as those slices'."""
    series = _series(other.tensors, names)
    tensors: list[TensorRef] = []
    quantized, moved = dict(one.quantized), {}
    for ref in one.tensors:
        members = series.get(ref.name, [])
        if not _is_stack(ref, members):
            tensors.append(ref)
            continue
        for number, member in enumerate(members):
            expert = _slice(ref, number)
            tensors.append(expert)
            moved[member.name] = expert.name
            if ref.name in quantized:
                quantized[expert.name] = quantized[ref.name]
    return Logical(tuple(tensors), quantized), moved


def _series(tensors: Sequence[TensorRef], names: Names) -> Mapping[str, list[TensorRef]]:
    """Experts by the name that a stack of them has, in the order of their numbers."""
    found: dict[str, dict[int, TensorRef]] = defaultdict(dict)
    for ref, match in _numbered(tensors):
        stack = names(f"{match['before']}.{match['after']}")
        found[stack][int(match["number"])] = ref
    return {
        stack: [members[n] for n in range(len(members))]
        for stack, members in found.items()
        if set(members) == set(range(len(members)))
    }


def _numbered(tensors: Sequence[TensorRef]) -> Iterator[tuple[TensorRef, re.Match[str]]]:
    for ref in tensors:
        if (match := _NUMBERED.match(ref.name)) is not None:
            yield ref, match


def _is_stack(ref: TensorRef, members: Sequence[TensorRef]) -> bool:
    return (
        len(ref.shape) > 1
        and len(members) == ref.shape[0]
        and all(member.shape == ref.shape[1:] for member in members)
    )


def _slice(ref: TensorRef, number: int) -> TensorRef:
    """One of a stack."""
    name, size = f"{ref.name}[{number}]", ref.numel // ref.shape[0]
    part = replace(ref, name=name, shape=ref.shape[1:])
    bits = size * DTYPE_BITS[ref.dtype]
    if ref.decoding is not None or ref.strides is not None or bits % 8:
        return replace(part, strides=None, decoding=_Part(ref, number * size, size))
    return replace(part, offset=ref.offset + number * bits // 8)


@dataclass(frozen=True, slots=True)
class _Part:
    """Some elements of a tensor: a ``Decoding``."""

    ref: TensorRef
    first: int
    numel: int

    @property
    def nbytes(self) -> int:
        """Their share of the tensor's."""
        return self.ref.nbytes * self.numel // self.ref.numel

    def read(self, start: int, stop: int) -> npt.NDArray[Any]:
        """Elements ``start`` to ``stop`` of them."""
        from gradscope.checkpoints.tiles import read_range

        return read_range(self.ref, self.first + start, self.first + stop)
