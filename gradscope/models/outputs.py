"""Which of the tensors that a model returns is its answer: told by names, and by what is made from
what, never by position alone."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

from torch import Tensor

from gradscope.errors import UsageError
from gradscope.models.graph import made_from
from gradscope.text import listed, quoted

#: Names under which libraries return the answer, alone or beside other things.
_ANSWERS = ("logits", "out")
#: Words in the names of what is returned beside the answer.
_BESIDE = frozenset(
    ("feature", "features", "feat", "feats", "embedding", "embeddings", "embed", "embeds", "pool",
     "pooled", "pooler", "aux", "auxiliary", "loss", "losses", "attention", "attentions", "attn",
     "latent", "latents", "intermediate", "representation", "representations", "penultimate",
     "prelogits", "backbone", "hidden", "state", "states", "token", "tokens", "mask", "masks")
)  # fmt: skip

#: Pixels of the input to one of a map of values, along an edge; with more it is of other things.
_COARSEST = 4


@dataclass(frozen=True, slots=True)
class Choice:
    """The output that is the answer, and those that could be taken for it."""

    name: str
    #: As likely to be meant.
    competing: tuple[str, ...] = ()
    #: Of the same form, but told apart by name or origin.
    others: tuple[str, ...] = ()


def outputs(answer: Any) -> dict[str, Tensor]:
    """The floating-point tensors in what a model returned, by name or position.

    Names of nested ones are joined by dots; a single tensor has no name.
    """
    return {name: t for name, t in _parts("", answer) if t.is_floating_point()}


def _parts(name: str, answer: Any) -> Iterator[tuple[str, Tensor]]:
    if isinstance(answer, Tensor):
        yield name, answer
        return
    for key, part in _members(answer):
        yield from _parts(f"{name}.{key}" if name else str(key), part)


def _members(answer: Any) -> Iterator[tuple[Any, Any]]:
    if isinstance(answer, Mapping):
        yield from answer.items()
    elif hasattr(answer, "_fields"):
        yield from zip(answer._fields, answer, strict=True)
    elif isinstance(answer, tuple | list):
        yield from enumerate(answer)
    elif is_dataclass(answer) and not isinstance(answer, type):
        yield from ((field.name, getattr(answer, field.name)) for field in fields(answer))
    elif hasattr(answer, "logits"):
        yield "logits", answer.logits


def described(found: Mapping[str, Tensor]) -> str:
    """``logits [1, 10] and features [1, 512]``."""
    shapes = (f"{quoted(n)} {list(t.shape)}" if n else str(list(t.shape)) for n, t in found.items())
    return listed(shapes, len(found), 6)


def choose(
    found: Mapping[str, Tensor],
    wanted: str | None,
    fits: Callable[[Tensor], bool],
    likely: Sequence[Callable[[str], bool]] = (),
) -> Choice | None:
    """The output that is meant, of those that ``fits``; None where none does.

    ``wanted`` is a name or a position. Otherwise a name decides; then features do not count, nor
    does what another output is made from; then, one after the other, what is ``likely``. Raises
    UsageError for an output that does not exist, or does not fit.
    """
    if wanted is not None:
        return Choice(_asked(found, wanted, fits))
    fitting = [name for name, tensor in found.items() if fits(tensor)]
    named = [name for name in _ANSWERS if name in fitting]
    left = named[:1] or _told_apart({name: found[name] for name in fitting})
    for is_likely in likely if len(left) > 1 else ():
        left = [name for name in left if is_likely(name)] or left
    if not left:
        return None
    others = tuple(name for name in fitting if name not in left)
    return Choice(left[0], tuple(left[1:]), others)


def _asked(found: Mapping[str, Tensor], wanted: str, fits: Callable[[Tensor], bool]) -> str:
    by_position = list(found)[int(wanted) :][:1] if re.fullmatch(r"[0-9]{1,6}", wanted) else []
    name = wanted if wanted in found else next(iter(by_position), None)
    if name is None:
        raise UsageError(
            f"--output-name {wanted}: the model returns no such output, but {described(found)}"
        )
    if not fits(found[name]):
        raise UsageError(
            f"--output-name {wanted}: its shape {list(found[name].shape)} does not fit the target; "
            f"the model returns {described(found)}"
        )
    return name


def _told_apart(found: Mapping[str, Tensor]) -> list[str]:
    """The names of outputs that are neither features nor what another is made from."""
    plain = [name for name in found if not is_beside(name)]
    left = plain or list(found)
    return [n for n in left if not any(_before(found[n], found[o]) for o in left if o != n)] or left


def _before(one: Tensor, other: Tensor) -> bool:
    """Whether ``one`` counts less: ``other`` is made from it, or it is ``other``'s softmax."""
    if one.shape == other.shape:
        return made_from(one, other)
    return made_from(other, one)


def is_beside(name: str) -> bool:
    """Whether an output's name is that of something returned beside the answer."""
    return not _BESIDE.isdisjoint(_words(name))


def is_picture(maps: Tensor, inputs: Tensor) -> bool:
    """Whether maps [N, h, w] are the inputs' [N, C, H, W], perhaps at a larger or smaller scale."""
    (h, w), (height, width) = maps.shape[1:], inputs.shape[2:]
    return h * width == w * height and _COARSEST * h >= height


def _words(name: str) -> Sequence[str]:
    return re.findall(r"[a-z]+", name.lower())
