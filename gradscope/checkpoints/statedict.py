"""Finding a model's tensors inside what a training script happened to save around them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from gradscope.checkpoints.tensors import Skipped
from gradscope.checkpoints.torch_pickle import TensorRecord
from gradscope.containers.pickle_machine import Instance
from gradscope.errors import UsageError
from gradscope.text import escaped, listed, plural, quoted

#: What wraps a state dict at any depth, most telling first.
WRAPPERS = ("state_dict", "model_state_dict", "model_state", "model", "module")
#: Where training scripts put the model at the top level, most telling first.
KNOWN_NAMES = (
    *WRAPPERS, "params", "params_ema",
    "ema", "ema_state_dict", "model_ema", "state_dict_ema", "net", "network", "generator", "g_ema",
    "weights", "model_weights",
)  # fmt: skip
SHARED_PREFIXES = ("module.", "_orig_mod.")
_MAX_DEPTH = 64
_MAX_SCALARS = 100
_MAX_LISTED = 12
_MAX_DESCENT = 4

NamedTensors = list[tuple[str, TensorRecord]]

#: The key of everything there is, by its whole name, rather than one state dict.
WHOLE = ""


@dataclass(frozen=True, slots=True)
class StateDict:
    """The tensors taken from a pickled value, and an account of what was left."""

    tensors: NamedTensors
    notes: tuple[str, ...] = ()
    skipped: tuple[Skipped, ...] = ()
    scalars: Mapping[str, object] = field(default_factory=dict)


@dataclass(slots=True)
class Budget:
    """Bounds a walk: sharing lets a short pickle describe a structure of astronomical size."""

    left: int

    def spend(self, steps: int) -> None:
        """Raise ValueError once the walk is longer than any honest structure needs."""
        self.left -= steps
        if self.left < 0:
            raise ValueError("its containers are shared so often that listing them would not end")


@dataclass(frozen=True, slots=True)
class _Branch:
    """One entry of a container that holds tensors."""

    name: str
    node: object
    count: int
    is_optimizer: bool


@dataclass(slots=True)
class _Walk:
    """What is gathered on the way down to the state dict."""

    budget: Budget
    notes: list[str] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    scalars: dict[str, object] = field(default_factory=dict)


def choose_tensors(root: object, key: str | None, path: str, budget: Budget) -> StateDict:
    """The tensors at ``key``, or of the state dict that ``root`` is or most plausibly holds.

    Raises UsageError naming the entries there are when ``key`` is none of them, and ValueError
    when the value is nested or shared beyond reason.
    """
    walk = _Walk(budget)
    if isinstance(root, TensorRecord) and key is None:
        return StateDict([("tensor", root)])
    if key == WHOLE:
        return StateDict(collect_tensors(root, budget))
    node = root if key is None else _entry_at(root, key, path, budget)
    walk.scalars.update(_scalars(root))
    if isinstance(node, TensorRecord):
        tensors = [(key or "tensor", node)]
    elif key is None:
        tensors = _descend(node, (), walk)
    else:
        tensors = collect_tensors(node, budget)
        walk.notes.append(f"read {escaped(key)} ({plural(len(tensors), 'tensor')}), as --key asks")
    stripped = _without_shared_prefix(tensors, walk)
    return StateDict(stripped, tuple(walk.notes), tuple(walk.skipped), walk.scalars)


def collect_tensors(root: object, budget: Budget) -> NamedTensors:
    """Every tensor below a container, in order, with dotted names; cycles end where they close."""
    return list(_tensors_below("", root, budget, ()))


def _tensors_below(
    name: str, node: object, budget: Budget, above: tuple[int, ...]
) -> Iterator[tuple[str, TensorRecord]]:
    budget.spend(1 + len(name) // 64)
    node = _unwrapped(node)
    if isinstance(node, TensorRecord):
        yield name, node
        return
    if len(above) > _MAX_DEPTH:
        raise ValueError(f"its containers are nested more than {_MAX_DEPTH} deep")
    if id(node) in above:
        return
    for key, child in _entries(node):
        yield from _tensors_below(_joined(name, key), child, budget, (*above, id(node)))


def _unwrapped(node: object) -> object:
    """A Parameter as torch before 0.4 saved it: an object whose state starts with its tensor."""
    if isinstance(node, Instance) and node.name == "torch.nn.parameter.Parameter":
        parts = node.state if isinstance(node.state, tuple) else node.args
        return parts[0] if parts else node
    return node


def _descend(node: object, at: tuple[str, ...], walk: _Walk) -> NamedTensors:
    """Go down to the state dict, accounting for what is left at each level."""
    branches = _branches(node, walk.budget)
    taken = _most_plausible(node, branches, is_root=not at)
    if taken is None or len(at) >= _MAX_DESCENT:
        return _all_but_optimizers(node, at, branches, walk)
    path = (*at, taken.name)
    others = [branch for branch in branches if branch is not taken]
    _account_for(others, at, walk)
    walk.scalars.update(_scalars(taken.node))
    tensors = _descend(taken.node, path, walk)
    if not any(note.startswith("took ") for note in walk.notes):
        walk.notes.insert(0, _taken_note(path, len(tensors), others, at))
    return tensors


def _branches(node: object, budget: Budget) -> list[_Branch]:
    branches = []
    for key, child in _entries(node):
        budget.spend(1)
        count = len(collect_tensors(child, budget))
        if count:
            name = _joined("", key)
            branches.append(_Branch(name, child, count, _is_optimizer(name, child)))
    return branches


def _most_plausible(node: object, branches: list[_Branch], is_root: bool) -> _Branch | None:
    """The branch to go down, or None when ``node`` is the state dict itself."""
    nested = [b for b in branches if not isinstance(b.node, TensorRecord) and not b.is_optimizer]
    direct = sum(isinstance(b.node, TensorRecord) for b in branches)
    names = KNOWN_NAMES if is_root else WRAPPERS
    known = [b for name in names for b in nested if b.name == name]
    if known and direct <= sum(b.count for b in nested):
        return known[0]
    if not nested or direct or not is_root or not isinstance(node, (dict, list, tuple)):
        return None
    return max(nested, key=lambda branch: branch.count)


def _all_but_optimizers(
    node: object, at: tuple[str, ...], branches: list[_Branch], walk: _Walk
) -> NamedTensors:
    left = [branch for branch in branches if branch.is_optimizer]
    if len(left) == len(branches) or isinstance(node, Instance):
        left = [branch for branch in left if isinstance(node, dict)]
    _account_for(left, at, walk)
    names = {branch.name for branch in left}
    return [
        (_joined(branch.name, name), record)
        for branch in branches
        if branch.name not in names
        for name, record in collect_tensors(branch.node, walk.budget)
    ]


def _account_for(branches: list[_Branch], at: tuple[str, ...], walk: _Walk) -> None:
    loose = [b for b in branches if isinstance(b.node, TensorRecord)]
    for branch in branches:
        if not isinstance(branch.node, TensorRecord):
            walk.skipped.append(_skipped_branch(branch, ".".join((*at, branch.name))))
    if loose:
        names = listed((escaped(b.name) for b in loose), len(loose), _MAX_LISTED)
        reason = f"{plural(len(loose), 'tensor')} beside the state dict ({names})"
        walk.skipped.append(Skipped(".".join(at) or "(top level)", reason))


def _skipped_branch(branch: _Branch, path: str) -> Skipped:
    shown = escaped(path)
    what = "optimizer state" if branch.is_optimizer else "another entry"
    count = plural(branch.count, "tensor")
    reason = f"{what} ({count}): not part of the model; --key {shown} reads it"
    return Skipped(shown, reason, deliberate=True)


def _taken_note(
    path: tuple[str, ...], count: int, others: list[_Branch], at: tuple[str, ...]
) -> str:
    taken = f"took {escaped('.'.join(path))} ({plural(count, 'tensor')}) as the model's state dict"
    nested = [b for b in others if not isinstance(b.node, TensorRecord)]
    if not nested:
        return taken
    there = (f"{escaped('.'.join((*at, b.name)))} ({plural(b.count, 'tensor')})" for b in nested)
    shown = listed(there, len(nested), _MAX_LISTED)
    return f"{taken}; also there: {shown} (--key NAME reads another)"


def _is_optimizer(name: str, node: object) -> bool:
    """torch's optimizers save ``state`` and ``param_groups``; Lightning keeps a list of those."""
    if isinstance(node, dict):
        return {"state", "param_groups"} <= node.keys() or name.lower().startswith("optim")
    if isinstance(node, (list, tuple)):
        return bool(node) and all(
            isinstance(item, dict) and {"state", "param_groups"} <= item.keys() for item in node
        )
    return False


def _entry_at(root: object, key: str, path: str, budget: Budget) -> object:
    """The entry at a dotted path whose parts may hold dots themselves."""
    for node in _matches(root, key.split(".")):
        return node
    branches = _branches(root, budget)
    entries = (f"{escaped(b.name)} ({plural(b.count, 'tensor')})" for b in branches)
    shown = listed(entries, len(branches), _MAX_LISTED)
    there = f"it holds {shown}" if branches else "it holds no tensors"
    raise UsageError(f"--key {escaped(key)}: no such entry in {path}; {there}")


def _matches(node: object, parts: list[str]) -> Iterator[object]:
    if not parts:
        yield node
        return
    children = {_joined("", name): child for name, child in _entries(node)}
    for length in range(min(len(parts), _MAX_DEPTH), 0, -1):
        name = ".".join(parts[:length])
        if name in children:
            yield from _matches(children[name], parts[length:])


def _entries(node: object) -> Iterator[tuple[object, object]]:
    """The children of a container: dicts, lists, tuples, and objects by their attributes."""
    if isinstance(node, dict):
        yield from node.items()
    elif isinstance(node, (list, tuple)):
        yield from enumerate(node)
    elif isinstance(node, Instance):
        yield from _attributes(node)


def _attributes(node: Instance) -> Iterator[tuple[object, object]]:
    if isinstance(node.state, dict):
        yield from node.state.items()
    elif isinstance(node.state, (list, tuple)):
        yield from enumerate(node.state)
    for index, argument in enumerate(node.args):
        if isinstance(argument, TensorRecord):
            yield index, argument


def _joined(name: str, key: object) -> str:
    part = _text(key)
    return f"{name}.{part}" if name and part else name or part


def _text(key: object) -> str:
    if isinstance(key, bytes):
        key = key.decode("latin1")
    if isinstance(key, Instance):
        return "?"
    # Surrogates cannot be written to a report.
    return str(key).encode("utf-8", "backslashreplace").decode()


def _scalars(node: object) -> dict[str, object]:
    """Whole numbers and fractions beside the tensors: ``step``, ``epoch``, ``global_step``."""
    if not isinstance(node, dict):
        return {}
    numbers = (
        (_text(key), value)
        for key, value in node.items()
        if isinstance(key, str) and type(value) in (int, float) and abs(value) < 1 << 63
    )
    return {name: value for (name, value), _ in zip(numbers, range(_MAX_SCALARS), strict=False)}


def _without_shared_prefix(tensors: NamedTensors, walk: _Walk) -> NamedTensors:
    prefix = shared_prefix([name for name, _ in tensors])
    if not prefix:
        return tensors
    walk.notes.append(f"stripped the prefix {quoted(prefix)}, which all tensor names shared")
    return [(name.removeprefix(prefix), record) for name, record in tensors]


def shared_prefix(names: Sequence[str]) -> str:
    """What wrappers put before all of some names (DDP, torch.compile), perhaps several of them."""
    found = ""
    while prefix := next((p for p in SHARED_PREFIXES if _all_start(names, found + p)), None):
        found += prefix
    return found


def _all_start(names: Sequence[str], prefix: str) -> bool:
    return bool(names) and all(n.startswith(prefix) and len(n) > len(prefix) for n in names)
