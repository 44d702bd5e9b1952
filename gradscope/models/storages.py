"""Tensors in what operators read and make, and where they lie."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors of arguments or an output, however nested."""
    return (leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor))


def storage_of(tensor: Tensor) -> int:
    """A number that tensors over the same memory share."""
    number: int = tensor.untyped_storage()._cdata
    return number
