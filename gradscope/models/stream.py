"""How a model's tensors come from each other, and which of them its residual stream passes through.

A transformer's blocks add what they computed to what they were given. That sum, and its normalised
forms, keep a place's own contents; queries, hidden layers and what attention returns do not. Names
of operators cannot tell them apart, the flow of data can.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from gradscope.models.storages import storage_of, tensors_in

#: Operators that compute nothing.
_VIEWS = frozenset(
    ("view", "_unsafe_view", "reshape", "flatten", "squeeze", "unsqueeze", "expand", "select",
     "slice", "alias", "detach", "t", "transpose", "permute", "split", "chunk", "unbind",
     "_reshape_alias", "split_with_sizes", "as_strided", "clone", "contiguous")
)  # fmt: skip
#: Parts of the names of operators that mix channels or places, rather than treat each value alone.
_MIXING = ("mm", "conv", "linear", "attention", "einsum", "rnn", "lstm", "gru", "fft", "pool")
_ADDING = ("add", "addcmul")
#: Products, whose result has the rows of one factor.
_PRODUCTS = ("mm", "linear", "attention", "einsum")


@dataclass(frozen=True, slots=True)
class Operation:
    """One operator that ran; others are told by their numbers, in the order of execution."""

    name: str
    mixes: bool
    #: Those whose results it read.
    read: tuple[int, ...]
    #: Those whose results, of its own result's shape, it added up.
    added: tuple[int, ...]
    #: As bits: itself and all that it was computed from, and of these what was not mixed since.
    above: int
    near: int
    #: The result's rows and columns.
    size: tuple[int, int] = (0, 0)
    #: Whether its rows are no places of the image: queries, which ask for objects of it.
    queries: bool = False
    #: Whether such rows follow those of the image, in one sequence with them.
    followed: bool = False


class Flow(TorchDispatchMode):
    """Follows every operator from the images on, in a model of any form, while it is entered."""

    def __init__(self, images: Tensor) -> None:
        super().__init__()
        self.images = images
        self.operations = [Operation("image", mixes=True, read=(), added=(), above=1, near=1)]
        self._makers = {storage_of(images): 0}

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Runs an operator and notes what it read."""
        name = function._schema.name.removeprefix("aten::")
        # Before it runs: it may write to what it reads.
        read = [(self.maker(t), t) for t in tensors_in((args, kwargs or {}))]
        found = function(*args, **(kwargs or {}))
        same = {storage_of(tensor) for _, tensor in read} if name in _VIEWS else set()
        made = [tensor for tensor in tensors_in(found) if storage_of(tensor) not in same]
        known = [(maker, tensor) for maker, tensor in read if maker is not None]
        # Fused attention asks with its first argument.
        asked = "attention" in name and isinstance(args[0], Tensor) and self.maker(args[0]) is None
        follows = name == "cat" and read[-1][0] is None and _joins_rows(args, made)
        self._note(name, known, made, asked, follows)
        return found

    def maker(self, tensor: Tensor) -> int | None:
        """The operation that a tensor, or what it is a view of, came from; None for parameters."""
        return self._makers.get(storage_of(tensor))

    def _note(
        self,
        name: str,
        read: Sequence[tuple[int, Tensor]],
        made: Sequence[Tensor],
        asked: bool,
        follows: bool,
    ) -> None:
        if not read:
            # Made of parameters, perhaps in the place of a tensor that is gone.
            for tensor in made:
                self._makers.pop(storage_of(tensor), None)
        if not read or not made:
            return
        number = len(self.operations)
        above = near = 1 << number
        for maker, _ in read:
            above |= self.operations[maker].above
            near |= self.operations[maker].near
        # A copy is told by what it copies.
        name = self.operations[read[0][0]].name if name in _VIEWS else name
        mixes = any(part in name for part in _MIXING)
        adds = name.rstrip("_") in _ADDING
        self.operations.append(
            Operation(
                name,
                mixes,
                tuple(maker for maker, _ in read),
                tuple(maker for maker, t in read if adds and t.shape == made[0].shape),
                above,
                1 << number if mixes else near,
                _size(made[0]),
                asked or self._are_queries(name, read, made[0]),
                follows or self._are_followed(read, made[0]),
            )
        )
        self._makers |= dict.fromkeys(map(storage_of, made), number)

    def _are_queries(self, name: str, read: Sequence[tuple[int, Tensor]], made: Tensor) -> bool:
        """Whether a result's rows come from parameters, or are the least part of a sequence.

        Detectors ask for objects by so many learned tokens, beside the patches or apart. Their
        number may be that of a grid.
        """
        of = read
        if any(part in name for part in _PRODUCTS):
            of = [(maker, t) for maker, t in read if _size(made)[0] in t.shape]
        return all(self.operations[maker].queries or self._is_part(maker, t) for maker, t in of)

    def _are_followed(self, read: Sequence[tuple[int, Tensor]], made: Tensor) -> bool:
        """Whether a result has the rows of a sequence whose last ones are no places."""
        return any(
            self.operations[maker].followed and _size(t)[0] == _size(made)[0] for maker, t in read
        )

    def _is_part(self, maker: int, tensor: Tensor) -> bool:
        """Whether a tensor [T, C] or [1, T, C] is less than half of the rows that were made."""
        (rows, columns), (all_rows, all_columns) = _size(tensor), self.operations[maker].size
        flat = tensor.dim() == 2 or (tensor.dim() == 3 and len(tensor) == 1)
        return flat and columns == all_columns and 2 * rows < all_rows


def _joins_rows(arguments: Sequence[Any], made: Sequence[Tensor]) -> bool:
    """Whether ``cat`` was called to put the tokens [N, T, C] of several tensors in a row."""
    dim = arguments[1] if len(arguments) > 1 else 0
    return len(made) == 1 and made[0].dim() == 3 and dim in (1, -2)


def _size(tensor: Tensor) -> tuple[int, int]:
    """Rows and columns of [T, C] or [1, ..., T, C]; nothing for what has more dimensions."""
    if tensor.dim() < 2 or tensor.shape[:-2].numel() != 1:
        return (tensor.shape[-2] if tensor.dim() > 1 else 0), 0
    return tensor.shape[-2], tensor.shape[-1]


def on_stream(operations: Sequence[Operation]) -> list[bool]:
    """Whether each operation's result is the residual stream, or a form of it without mixing.

    The stream begins where something is added to what was computed from it by mixing (a branch);
    it goes on through further sums, and through whatever treats each of its values alone.
    """
    begins = {
        one
        for operation in operations
        for one, other in permutations(operation.added, 2)
        if operations[other].above >> one & ~(operations[other].near >> one) & 1
    }
    found: list[bool] = []
    for number, operation in enumerate(operations):
        before = [found[one] for one in operation.read]
        added = len(operation.added) > 1 and (
            any(found[one] for one in operation.added) or not begins.isdisjoint(operation.added)
        )
        alone = not operation.mixes and bool(before) and all(before)
        found.append(number in begins or added or alone)
    return found
