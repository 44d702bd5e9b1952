"""The tensors of one checkpoint as each other's witnesses: biases, siblings, like names."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property

from gradscope.checkpoints.tensors import TensorRef

#: What Flax and Keras call a matrix or a convolution: [..., in, out].
KERNEL = re.compile(r"(.+_)?kernel")
_OTHER_BIASES = {"w": ("b",), "W": ("b",), "weights": ("biases",)}


@dataclass(frozen=True)
class Family:
    """The tensors of one checkpoint by name, and its configuration."""

    refs: Mapping[str, TensorRef]
    config: Mapping[str, object] = field(default_factory=dict)

    def bias(self, ref: TensorRef) -> tuple[int, ...] | None:
        """The shape of the bias that is added to what a matrix gives; None without one."""
        module, leaf = place(ref.name)
        own = (leaf.replace("weight", "bias"), leaf.replace("kernel", "bias"), f"{leaf}_bias")
        for name in (*_OTHER_BIASES.get(leaf, own), "bias", "bias:0"):
            found = self.refs.get(module + name)
            if found is not None and found is not ref and found.shape:
                return found.shape
        return None

    def numbers(self, *names: str) -> list[int]:
        """What the configuration, or one of its parts, says under any of some names."""
        parts = [self.config, *(p for p in self.config.values() if isinstance(p, Mapping))]
        found = (part[name] for part in parts for name in names if name in part)
        return [n for n in found if isinstance(n, int) and not isinstance(n, bool) and n > 0]

    def orientation(self, ref: TensorRef) -> int | None:
        """The axis of the units of matrices of like names, where these agree."""
        known = (self._orientations.get(kind) for kind in _kinds(ref))
        return next((axis for axis in known if axis is not None), None)

    @cached_property
    def _orientations(self) -> Mapping[str, int | None]:
        votes: dict[str, set[int]] = defaultdict(set)
        for ref in self.refs.values():
            axis = told(ref, self.bias(ref)) if len(ref.shape) >= 2 else None
            for kind in _kinds(ref) if axis is not None else ():
                votes[kind].add(axis if axis is not None else 0)
        return {kind: found.pop() if len(found) == 1 else None for kind, found in votes.items()}


def place(name: str) -> tuple[str, str]:
    """A tensor's module path, with its separator, and its leaf name, in any framework's style."""
    cut = max(name.rfind("."), name.rfind("/")) + 1
    return name[:cut], name[cut:].removesuffix(":0")


def own_name(module: str) -> str:
    """The last name of a module path."""
    return re.split(r"[./]", module.rstrip("./"))[-1]


def told(ref: TensorRef, bias: tuple[int, ...] | None) -> int | None:
    """The axis of the units that a matrix's shape and its bias tell; None where several fit."""
    if bias is None or len(bias) != 1 or KERNEL.fullmatch(place(ref.name)[1]):
        return None
    (n,), shape, last = bias, ref.shape, len(ref.shape) - 1
    if shape[0] == n:
        return None if shape[1] == n else 0
    if shape[-1] == n and (last == 1 or shape[1] != n):
        return last
    return 1 if last > 1 and n % shape[1] == 0 and shape[0] % (n // shape[1]) == 0 else None


def _kinds(ref: TensorRef) -> Iterator[str]:
    """What a matrix's like are found by, the nearest first: its module's name, then its stem."""
    module, leaf = place(ref.name)
    own = own_name(module)
    yield f"{len(ref.shape)} {own}.{leaf}"
    if "_" in own:
        yield f"{len(ref.shape)} {own.partition('_')[0]}_*.{leaf}"
