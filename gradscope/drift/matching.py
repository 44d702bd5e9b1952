"""Which tensor of the one checkpoint is which of the other, by name without what wraps it."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from gradscope.checkpoints.tensors import TensorRef
from gradscope.text import plural, quoted

#: What wrappers put before every name.
_PREFIXES = ("module.", "_orig_mod.", "base_model.model.", "base_model.", "model.")
#: What wrappers put between the parts of a name (torch.compile, FSDP, checkpointing, PEFT).
_SEGMENTS = re.compile(
    r"(?:^|(?<=\.))(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|base_layer)\."
)
#: What TensorFlow calls the parameters of a norm.
_LEAVES = {"gamma": "weight", "beta": "bias"}


@dataclass(frozen=True, slots=True)
class Matched:
    """One tensor in both checkpoints; ``base`` and ``new`` may differ in name, type and shape."""

    base: TensorRef
    new: TensorRef


@dataclass(frozen=True, slots=True)
class Matching:
    """Pairs in the base's order, what only one has, and what was taken off names."""

    pairs: tuple[Matched, ...]
    removed: tuple[TensorRef, ...]
    added: tuple[TensorRef, ...]
    notes: tuple[str, ...] = ()
    #: By the new name of pairs that exist because one side stores a tensor twice: what is tied.
    ties: Mapping[str, str] = field(default_factory=dict)


def matched(
    base: Sequence[TensorRef],
    new: Sequence[TensorRef],
    translated: Callable[[str], str] | None = None,
) -> Matching:
    """Match by name; then what is left by its name without wrappers, then without one prefix.

    A shorter name must be that of one tensor alone on either side. ``translated`` turns the names
    that one of them has into those of the other.
    """
    partner = {ref.name: ref.name for ref in new}
    pairs = {ref.name: partner[ref.name] for ref in base if ref.name in partner}
    notes: list[str] = []
    if translated is not None:
        found = _by(translated, base, new, pairs)
        pairs |= found
        notes += _said(found, "by what llama.cpp calls them")
    for shorten in (canonical, _common(base, new, pairs)):
        found = _by(shorten, base, new, pairs)
        pairs |= found
        notes += _said(found, "without what wrappers put into names")
    return _matching(base, new, pairs, notes)


def _matching(
    base: Sequence[TensorRef],
    new: Sequence[TensorRef],
    pairs: Mapping[str, str],
    notes: Iterable[str],
) -> Matching:
    there = {ref.name: ref for ref in new}
    taken = set(pairs.values())
    return Matching(
        tuple(Matched(ref, there[pairs[ref.name]]) for ref in base if ref.name in pairs),
        tuple(ref for ref in base if ref.name not in pairs),
        tuple(ref for ref in new if ref.name not in taken),
        tuple(notes),
    )


def renamed(
    matching: Matching,
    base: Sequence[TensorRef],
    new: Sequence[TensorRef],
    content: Callable[[TensorRef], str | None],
) -> Matching:
    """The same, with tensors paired whose ``content`` (a hash) is under another name.

    Only asked of what could have a partner: of one type and shape on either side.
    """
    kinds = {(r.dtype, r.shape) for r in matching.removed} & {
        (r.dtype, r.shape) for r in matching.added
    }
    here, there = (
        _unique((content(r), r) for r in refs if (r.dtype, r.shape) in kinds and r.numel > 1)
        for refs in (matching.removed, matching.added)
    )
    moved = {here[key].name: there[key].name for key in here if key in there}
    pairs = {m.base.name: m.new.name for m in matching.pairs} | moved
    if not moved:
        return matching
    note = f"{plural(len(moved), 'tensor')} of equal content under another name: "
    first = next(iter(moved))
    return _matching(
        base, new, pairs, (*matching.notes, f"{note}{quoted(first)} is {quoted(moved[first])}")
    )


def tied(
    matching: Matching,
    base: Sequence[TensorRef],
    new: Sequence[TensorRef],
    same: Callable[[TensorRef, TensorRef], bool],
) -> Matching:
    """The same, with what one side stores once and the other twice paired with the one copy.

    A matrix that only one side has, and that equals another one there, is that one: output layers
    tied to the table of tokens. ``same`` compares two tensors of one type and shape.
    """
    partners = {m.base.name: m.new for m in matching.pairs}
    origins = {m.new.name: m.base for m in matching.pairs}
    pairs: list[Matched] = []
    ties: dict[str, str] = {}
    for alone, refs, others, which in (
        (matching.removed, base, partners, "new checkpoint"),
        (matching.added, new, origins, "base"),
    ):
        for ref in alone:
            twin = _twin(ref, [r for r in refs if r.name in others], same)
            if twin is not None:
                once = replace(others[twin.name], name=ref.name)
                pairs.append(Matched(ref, once) if others is partners else Matched(once, ref))
                ties[ref.name] = (
                    f"tied differently: the {which} stores it once, as "
                    f"{quoted(others[twin.name].name)}"
                )
    return replace(
        matching,
        pairs=(*matching.pairs, *pairs),
        removed=tuple(r for r in matching.removed if r.name not in ties),
        added=tuple(r for r in matching.added if r.name not in ties),
        ties=ties,
    )


def _twin(
    ref: TensorRef, refs: Iterable[TensorRef], same: Callable[[TensorRef, TensorRef], bool]
) -> TensorRef | None:
    if len(ref.shape) < 2:
        return None
    alike = (r for r in refs if (r.dtype, r.shape) == (ref.dtype, ref.shape))
    return next((r for r in alike if same(ref, r)), None)


def _unique(items: Iterable[tuple[str | None, TensorRef]]) -> dict[str, TensorRef]:
    found: dict[str, list[TensorRef]] = defaultdict(list)
    for key, ref in items:
        if key is not None:
            found[key].append(ref)
    return {key: refs[0] for key, refs in found.items() if len(refs) == 1}


def _by(
    shorten: Callable[[str], str],
    base: Sequence[TensorRef],
    new: Sequence[TensorRef],
    pairs: Mapping[str, str],
) -> dict[str, str]:
    """Partners among what is not paired yet, by a shorter name."""
    taken = set(pairs.values())
    here = _unique((shorten(r.name), r) for r in base if r.name not in pairs)
    there = _unique((shorten(r.name), r) for r in new if r.name not in taken)
    return {here[key].name: there[key].name for key in here if key in there}


def canonical(name: str) -> str:
    """A name without what wrappers put around its parts."""
    short = _SEGMENTS.sub("", name)
    while prefix := next((p for p in _PREFIXES if short.startswith(p)), None):
        short = short.removeprefix(prefix)
    head, dot, leaf = short.rpartition(".")
    return head + dot + _LEAVES.get(leaf, leaf)


def _common(
    base: Sequence[TensorRef], new: Sequence[TensorRef], pairs: Mapping[str, str], tried: int = 8
) -> Callable[[str], str]:
    """Take off the one prefix that most of the unpaired names of one side lack on the other."""
    taken = set(pairs.values())
    here = [canonical(r.name) for r in base if r.name not in pairs]
    there = [canonical(r.name) for r in new if r.name not in taken]
    votes: Counter[str] = Counter()
    for long, short in ((here, there), (there, here)):
        for tail in short[:tried]:
            votes.update(n.removesuffix(tail) for n in long if n.endswith(f".{tail}"))
    prefix = next(iter(p for p, _ in votes.most_common(1)), "")
    return lambda name: canonical(name).removeprefix(prefix)


def _said(found: Mapping[str, str], how: str) -> Iterator[str]:
    """One note on the names that were matched without being equal."""
    if found:
        first, other = next(iter(found.items()))
        yield (f"{plural(len(found), 'tensor')} matched {how}: {quoted(first)} is {quoted(other)}")
