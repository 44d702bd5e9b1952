"""Walking what a pickle holds: the tensors below a value, by dotted names."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain, islice

from gradscope.checkpoints.torch_names import is_tensor_like, object_in_place
from gradscope.checkpoints.torch_pickle import SparseRecord, TensorRecord
from gradscope.containers.pickle_machine import Global, Instance
from gradscope.text import escaped

_MAX_DEPTH = 64

_PLAIN = frozenset({str, bytes, int, float, bool, complex, type(None)})

NamedTensors = list[tuple[str, TensorRecord]]


@dataclass(slots=True)
class Budget:
    """Bounds a walk: sharing lets a short pickle describe a structure of astronomical size."""

    left: int

    def spend(self, steps: int) -> None:
        """Raise ValueError once the walk is longer than any honest structure needs."""
        self.left -= steps
        if self.left < 0:
            raise ValueError("its containers are shared so often that listing them would not end")


def is_tensor(node: object) -> bool:
    """Whether a value is a tensor, readable or not, rather than a container."""
    return isinstance(seen(node), (TensorRecord, SparseRecord))


def collect_tensors(root: object, budget: Budget) -> NamedTensors:
    """Every tensor below a container, in order, with dotted names; cycles end where they close.

    An object where a tensor belongs is one that cannot be read; a sparse tensor is its parts.
    """
    return list(_tensors_below("", root, budget, (), inside=False))


def _tensors_below(
    name: str, node: object, budget: Budget, above: tuple[int, ...], inside: bool
) -> Iterator[tuple[str, TensorRecord]]:
    """Those ``inside`` an object that is no module are its own: no place of a weight."""
    budget.spend(1 + len(name) // 64)
    node = seen(node)
    if isinstance(node, TensorRecord):
        if not (inside and node.unreadable):
            yield name, node
        return
    if isinstance(node, SparseRecord):
        yield from ((joined(name, part), record) for part, record in node.parts.items())
        return
    if len(above) > _MAX_DEPTH:
        raise ValueError(f"its containers are nested more than {_MAX_DEPTH} deep")
    if id(node) in above:
        return
    inside = inside or (isinstance(node, Instance) and not (is_module(node) or node.items))
    leaves = _leaves(node)
    for key, child in entries(node):
        if type(child) in _PLAIN:  # most of what lies beside tensors, in tables of millions
            budget.spend(1)
            continue
        path = joined(name, key)
        below = _tensors_below(path, child, budget, (*above, id(node)), inside)
        first = list(islice(below, 1))
        if not first and isinstance(child, (Instance, Global)) and _leaf(key) in leaves:
            yield path, _in_place(child.name)
        yield from chain(first, below)


def _leaves(node: object) -> set[str]:
    """What the tensors of a state dict are called at the end: what is called so is one, too."""
    if not isinstance(node, dict):
        return set()
    return {_leaf(key) for key, child in node.items() if isinstance(child, TensorRecord)} - {""}


def _leaf(key: object) -> str:
    return key.rpartition(".")[2] if isinstance(key, str) else ""


def seen(node: object) -> object:
    """A value as the walk takes it.

    A Parameter as torch before 0.4 saved it is an object whose state starts with its tensor;
    other objects of tensor classes cannot be read.
    """
    if not isinstance(node, Instance) or not is_tensor_like(node.name):
        return node
    if node.name == "torch.nn.parameter.Parameter":
        parts = node.state if isinstance(node.state, tuple) else node.args
        return parts[0] if parts else node
    return _in_place(node.name)


def _in_place(name: str) -> TensorRecord:
    return TensorRecord(None, 0, (), (), unreadable=object_in_place(escaped(name, 120)))


# --- the children of a value ----------------------------------------------------------------------


def entries(node: object) -> Iterable[tuple[object, object]]:
    """The children of a container: dicts, lists, tuples, modules, and objects by attributes."""
    if isinstance(node, dict):
        return _renamed(node).items()
    if isinstance(node, (list, tuple)):
        return () if _is_numpy_random_state(node) else enumerate(node)
    if isinstance(node, Instance):
        return _of_module(node) if is_module(node) else _of_object(node)
    return ()


def is_optimizer(node: object) -> bool:
    """Whether a value is what torch's optimizers save."""
    return isinstance(node, dict) and {"state", "param_groups"} <= node.keys()


def _renamed(node: Mapping[object, object]) -> Mapping[object, object]:
    """An optimizer's entries with its state under the parameters' names, where it tells them."""
    state, groups = node.get("state"), node.get("param_groups")
    if not isinstance(state, dict) or not isinstance(groups, (list, tuple)):
        return node
    names = dict(chain.from_iterable(map(_names_in, groups)))
    return {**node, "state": {names.get(key, key): value for key, value in state.items()}}


def _names_in(group: object) -> Iterable[tuple[object, object]]:
    """The numbers of a group's parameters with their names."""
    if not isinstance(group, dict):
        return ()
    numbers, names = group.get("params"), group.get("param_names")
    if not isinstance(numbers, list) or not isinstance(names, list):
        return ()
    return ((n, name) for n, name in zip(numbers, names, strict=False) if type(n) is int)


def _is_numpy_random_state(node: list[object] | tuple[object, ...]) -> bool:
    """What ``numpy.random.get_state()`` returns."""
    return len(node) == 5 and node[0] == "MT19937"


def is_module(node: object) -> bool:
    """Whether an object is a pickled ``torch.nn.Module``."""
    state = node.state if isinstance(node, Instance) else None
    return isinstance(state, dict) and {"_parameters", "_buffers", "_modules"} <= state.keys()


def _of_module(node: Instance) -> Iterator[tuple[object, object]]:
    """What ``state_dict`` returns of a module: its parameters, lasting buffers and submodules."""
    state = node.state if isinstance(node.state, dict) else {}
    passing = state.get("_non_persistent_buffers_set")
    left = {n for n in passing if isinstance(n, str)} if isinstance(passing, list) else set()
    for kind in ("_parameters", "_buffers", "_modules"):
        for name, child in entries(state[kind]):
            if kind != "_buffers" or name not in left:
                yield name, child


def _of_object(node: Instance) -> Iterator[tuple[object, object]]:
    if isinstance(node.state, dict):
        yield from node.state.items()
    elif isinstance(node.state, (list, tuple)):
        yield from enumerate(node.state)
    yield from node.items.items()
    yield from enumerate(node.elements)
    for index, argument in enumerate(node.args):
        yield from argument.items() if isinstance(argument, dict) else [(index, argument)]


# --- names ----------------------------------------------------------------------------------------


def joined(name: str, key: object) -> str:
    """A dotted name with one more part."""
    part = text(key)
    return f"{name}.{part}" if name and part else name or part


def text(key: object) -> str:
    """A key in words; surrogates cannot be written to a report."""
    if isinstance(key, bytes):
        key = key.decode("latin1")
    if isinstance(key, Instance):
        return "?"
    if isinstance(key, Global):
        key = key.name
    return str(key).encode("utf-8", "backslashreplace").decode()
