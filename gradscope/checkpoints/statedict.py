"""Finding a model's tensors inside what a training script happened to save around them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

from gradscope.checkpoints.prefixes import shared_prefix
from gradscope.checkpoints.tensors import Part, Skipped
from gradscope.checkpoints.torch_pickle import TensorRecord
from gradscope.checkpoints.training import (
    is_average,
    is_optimizer_state,
    is_random_state,
    part_beside_model,
    part_in_optimizer,
)
from gradscope.checkpoints.tree import (
    Budget,
    NamedTensors,
    collect_tensors,
    entries,
    is_module,
    is_tensor,
    joined,
    seen,
    text,
)
from gradscope.containers.pickle_machine import Described, Instance
from gradscope.errors import UsageError
from gradscope.text import escaped, listed, plural, quoted

#: What wraps a state dict at any depth, most telling first.
WRAPPERS = ("state_dict", "model_state_dict", "model_state", "model", "module")
#: Where training scripts put the model at the top level, most telling first.
KNOWN_NAMES = (
    *WRAPPERS, "params", "net", "network", "generator", "weights", "model_weights",
    "params_ema", "ema", "ema_state_dict", "model_ema", "state_dict_ema", "g_ema",
)  # fmt: skip
_MAX_DEPTH = 64
_MAX_SCALARS = 100
_MAX_LISTED = 12
_MAX_DESCENT = 4

#: The key of everything there is, by its whole name, rather than one state dict.
WHOLE = ""


@dataclass(frozen=True, slots=True)
class Aside:
    """Tensors beside the model, under their whole names, and what they are."""

    part: Part
    tensors: NamedTensors


@dataclass(frozen=True, slots=True)
class StateDict:
    """The tensors taken from a pickled value, and an account of what was left."""

    tensors: NamedTensors
    asides: tuple[Aside, ...] = ()
    notes: tuple[str, ...] = ()
    skipped: tuple[Skipped, ...] = ()
    scalars: Mapping[str, object] = field(default_factory=dict)
    #: The class of the pickled module that was found, rather than a state dict.
    module: str | None = None
    #: The version of each module's code, by the module's name; see ``torch.nn.Module._version``.
    versions: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Branch:
    """One entry of a container that holds tensors."""

    name: str
    node: object
    tensors: NamedTensors
    is_optimizer: bool

    @property
    def is_loose(self) -> bool:
        """Whether it is a tensor itself."""
        return is_tensor(self.node)

    @property
    def is_average(self) -> bool:
        """Whether its name is that of averaged weights."""
        return is_average(self.name)

    @property
    def is_beside_model(self) -> bool:
        """Whether it cannot be a second model: averages, single numbers, loose tensors."""
        return self.is_loose or all(
            math.prod(record.shape) <= 1 or any(map(is_average, joined(self.name, name).split(".")))
            for name, record in self.tensors
        )

    @property
    def keeps_training(self) -> bool:
        """Whether no model, whatever its layers are called, has it."""
        return self.is_optimizer or all(
            is_random_state(joined(self.name, name), record) for name, record in self.tensors
        )

    def counted(self, above: tuple[str, ...]) -> str:
        """Its whole name, with the number of its tensors."""
        name = escaped(".".join((*above, self.name)))
        return f"{name} ({plural(len(self.tensors), 'tensor')})"


@dataclass(slots=True)
class _Walk:
    """What is gathered on the way down to the state dict."""

    budget: Budget
    taken: str = ""
    module: str | None = None
    notes: list[str] = field(default_factory=list)
    asides: list[Aside] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    scalars: dict[str, object] = field(default_factory=dict)
    versions: Mapping[str, int] = field(default_factory=dict)


def choose_tensors(root: object, key: str | None, path: str, budget: Budget) -> StateDict:
    """The tensors at ``key``, or of the state dict that ``root`` is or most plausibly holds.

    What training keeps beside the model is ``asides``. Raises UsageError naming the entries there
    are when ``key`` is none of them, and ValueError when the value is nested or shared beyond
    reason.
    """
    walk = _Walk(budget)
    if isinstance(root, TensorRecord) and key is None:
        return StateDict([("tensor", root)])
    if key == WHOLE:
        return StateDict(collect_tensors(root, budget))
    node = root if key is None else _entry_at(root, key, path, budget)
    walk.scalars.update(_scalars(root))
    tensors = _found(node, walk) if key is None else _asked_for(node, key, walk)
    stripped = _without_shared_prefix(tensors, walk)
    return StateDict(
        tensors=stripped,
        asides=tuple(walk.asides),
        notes=tuple(walk.notes),
        skipped=tuple(walk.skipped),
        scalars=walk.scalars,
        module=walk.module,
        versions=walk.versions,
    )


def _asked_for(node: object, key: str, walk: _Walk) -> NamedTensors:
    node = seen(node)
    if isinstance(node, TensorRecord):
        return [(key or "tensor", node)]
    walk.module = _module_class(node)
    walk.versions = _versions(node)
    tensors = collect_tensors(node, walk.budget)
    shown = escaped(key)
    if is_optimizer_state(key.rpartition(".")[2], node, tensors):
        _set_aside_parts("", tensors, part_in_optimizer, walk)
        walk.notes.append(
            f"read {shown} ({plural(len(tensors), 'tensor')}), as --key asks: the state of an "
            "optimizer, no model"
        )
        return []
    walk.notes.append(f"read {shown} ({plural(len(tensors), 'tensor')}), as --key asks")
    return tensors


def _found(root: object, walk: _Walk) -> NamedTensors:
    whole = collect_tensors(root, walk.budget)
    if is_optimizer_state("", root, whole):
        _set_aside_parts("", whole, part_in_optimizer, walk)
        walk.notes.append(f"the state of an optimizer ({plural(len(whole), 'tensor')}), no model")
        return []
    if is_module(root):
        walk.notes.append(_pickled(root))
    tensors = _descend(root, (), walk)
    beside = sum(len(aside.tensors) for aside in walk.asides)
    if not tensors and beside:
        walk.notes.append(f"no model in it, only training state ({plural(beside, 'tensor')})")
    return tensors


def _set_aside_parts(
    name: str, tensors: NamedTensors, part_of: Callable[[str], Part], walk: _Walk
) -> None:
    """The tensors of an entry by what they are."""
    parts: dict[Part, NamedTensors] = {}
    for inner, record in tensors:
        whole = joined(name, inner)
        parts.setdefault(part_of(whole), []).append((whole, record))
    walk.asides.extend(Aside(part, found) for part, found in parts.items())


# --- the way down ---------------------------------------------------------------------------------


def _descend(node: object, at: tuple[str, ...], walk: _Walk) -> NamedTensors:
    """Go down to the state dict, accounting for what is left at each level."""
    walk.module = _module_class(node) or walk.module
    branches = _branches(node, walk.budget)
    taken = _most_plausible(node, branches, is_root=not at)
    if taken is None or len(at) >= _MAX_DESCENT:
        return _all_but_training(node, at, branches, walk)
    others = [branch for branch in branches if branch is not taken]
    walk.scalars.update(_scalars(taken.node))
    tensors = _descend(taken.node, (*at, taken.name), walk)
    if not walk.taken:  # by the call for a deeper level
        walk.taken = taken.name
        walk.notes.insert(0, _taken_note((*at, taken.name), taken.node, len(tensors)))
    walk.notes.extend(_account_for(others, at, walk))
    return tensors


def _branches(node: object, budget: Budget) -> list[_Branch]:
    branches = []
    for key, child in entries(node):
        budget.spend(1)
        tensors = collect_tensors(child, budget)
        if tensors:
            name = joined("", key)
            optimizer = not is_tensor(child) and is_optimizer_state(name, child, tensors)
            branches.append(_Branch(name, child, tensors, optimizer))
    return branches


def _most_plausible(node: object, branches: list[_Branch], is_root: bool) -> _Branch | None:
    """The branch to go down, or None when ``node`` is the state dict itself."""
    if is_module(node):
        return None
    nested = [b for b in branches if not b.is_loose and not b.is_optimizer]
    direct = sum(b.is_loose for b in branches)
    names = KNOWN_NAMES if is_root else WRAPPERS
    known = [b for name in names for b in nested if b.name == name]
    if known and direct <= sum(len(b.tensors) for b in nested):
        return known[0]
    if not nested or direct or not is_root or not isinstance(node, (dict, list, tuple)):
        return None
    return max(nested, key=lambda branch: (not branch.is_average, len(branch.tensors)))


def _all_but_training(
    node: object, at: tuple[str, ...], branches: list[_Branch], walk: _Walk
) -> NamedTensors:
    """Everything here is the model, apart from optimizers and random states."""
    walk.versions = _versions(node)
    apart = [b for b in branches if b.keeps_training] if isinstance(node, dict) else []
    walk.notes.extend(_account_for(apart, at, walk))
    if isinstance(node, dict) and apart:
        names = {branch.name for branch in apart}
        node = {key: child for key, child in node.items() if joined("", key) not in names}
    return collect_tensors(node, walk.budget)


# --- what is left ---------------------------------------------------------------------------------


def _account_for(branches: list[_Branch], at: tuple[str, ...], walk: _Walk) -> Iterator[str]:
    """Set aside what training keeps beside a model and name the rest; notes about both."""
    apart = [b for b in branches if b.keeps_training or b.is_beside_model]
    left = [b for b in branches if b not in apart]
    for branch in apart:
        _set_aside(branch, at, walk)
    walk.skipped.extend(_skipped_branch(branch, at) for branch in left)
    for said, found, hint in (
        ("judged apart from the model", apart, ""),
        ("also there", left, " (--key NAME reads another)"),
    ):
        if found:
            yield f"{said}: {listed((b.counted(at) for b in found), len(found), _MAX_LISTED)}{hint}"


def _set_aside(branch: _Branch, at: tuple[str, ...], walk: _Walk) -> None:
    name = ".".join((*at, branch.name))
    if branch.is_optimizer:
        _set_aside_parts(name, branch.tensors, part_in_optimizer, walk)
    else:
        _set_aside_parts(name, branch.tensors, part_beside_model, walk)


def _skipped_branch(branch: _Branch, at: tuple[str, ...]) -> Skipped:
    shown = escaped(".".join((*at, branch.name)))
    count = plural(len(branch.tensors), "tensor")
    reason = f"another entry ({count}): not part of the model; --key {shown} reads it"
    return Skipped(shown, reason, deliberate=True)


def _taken_note(path: tuple[str, ...], node: object, count: int) -> str:
    what = f"the model, {_pickled(node)}" if is_module(node) else "the model's state dict"
    return f"took {escaped('.'.join(path))} ({plural(count, 'tensor')}) as {what}"


def _module_class(node: object) -> str | None:
    return escaped(node.name, 120) if isinstance(node, Instance) and is_module(node) else None


def _pickled(node: object) -> str:
    return f"a pickled module ({_module_class(node)}), of which parameters and buffers were read"


# --- by key ---------------------------------------------------------------------------------------


def _entry_at(root: object, key: str, path: str, budget: Budget) -> object:
    """The entry at a dotted path whose parts may hold dots themselves."""
    for node in _matches(root, key.split(".")):
        return node
    branches = _branches(root, budget)
    shown = listed((b.counted(()) for b in branches), len(branches), _MAX_LISTED)
    there = f"it holds {shown}" if branches else "it holds no tensors"
    raise UsageError(f"--key {escaped(key)}: no such entry in {path}; {there}")


def _matches(node: object, parts: list[str]) -> Iterator[object]:
    if not parts:
        yield node
        return
    children = {joined("", name): child for name, child in entries(node)}
    for length in range(min(len(parts), _MAX_DEPTH), 0, -1):
        name = ".".join(parts[:length])
        if name in children:
            yield from _matches(children[name], parts[length:])


# --- scalars and prefixes -------------------------------------------------------------------------


def _scalars(node: object) -> dict[str, object]:
    """Whole numbers and fractions beside the tensors: ``step``, ``epoch``, ``global_step``."""
    if not isinstance(node, dict):
        return {}
    numbers = (
        (text(key), value)
        for key, value in node.items()
        if isinstance(key, str) and type(value) in (int, float) and abs(value) < 1 << 63
    )
    return {name: value for (name, value), _ in zip(numbers, range(_MAX_SCALARS), strict=False)}


def _versions(node: object) -> dict[str, int]:
    """What ``state_dict`` notes of each module in ``_metadata``."""
    noted = node.attributes.get("_metadata") if isinstance(node, Described) else None
    if not isinstance(noted, dict):
        return {}
    versions = (
        (name, entry.get("version")) for name, entry in noted.items() if isinstance(entry, dict)
    )
    return {n: v for n, v in versions if isinstance(n, str) and type(v) is int}


def _without_shared_prefix(tensors: NamedTensors, walk: _Walk) -> NamedTensors:
    prefix = shared_prefix([name for name, _ in tensors])
    if not prefix:
        return tensors
    walk.versions = below(prefix, walk.versions)
    walk.notes.append(f"stripped the prefix {quoted(prefix)}, which all tensor names shared")
    return [(name.removeprefix(prefix), record) for name, record in tensors]


def below(prefix: str, versions: Mapping[str, int]) -> dict[str, int]:
    """The versions of the modules below a prefix (with its dot), under their names there."""
    return {
        f"{name}."[len(prefix) : -1]: version
        for name, version in versions.items()
        if f"{name}.".startswith(prefix)
    }
