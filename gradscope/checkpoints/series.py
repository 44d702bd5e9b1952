"""Names of a folder that belong together: shards by number, ranks, variants, series of steps."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

from gradscope.checkpoints.numbering import NUMBERED

#: Meta's and MLX' ``consolidated.00.pth``, ``weights.01.safetensors``.
_COUNTED = re.compile(r"(?P<prefix>.+\.)(?P<number>\d\d)(?P<suffix>\.\w+)")
#: ``rank0.pt``, ``model_world_size_8_rank_3.pt``: what each process of a training run saved.
_RANK = re.compile(r"(?P<prefix>(?:.*[._-])?rank[_-]?)(?P<number>\d+)(?P<suffix>\.\w+)")
#: Words by which copies of one model differ, the most faithful first.
_VARIANTS = (
    "fp32", "float32", "bf16", "bfloat16", "fp16", "float16", "half", "fp8", "int8", "int4",
)  # fmt: skip
_VARIANT = re.compile(rf"[._-]({'|'.join(_VARIANTS)}|non_ema|ema)(?=[._-])", re.IGNORECASE)
_STATE_DICT = re.compile(r"[._-]?state_?dict(?=\.)")


@dataclass(frozen=True, slots=True)
class Group:
    """Files of one checkpoint: one, or several that count."""

    key: str
    files: tuple[str, ...]
    numbered: bool = False


def groups(names: Iterable[str]) -> list[Group]:
    """Names as checkpoints: those that differ in a shard's or a rank's number are one."""
    found: dict[str, list[str]] = {}
    numbered: set[str] = set()
    names = list(names)
    counted = _counting(names)
    for name in names:
        match = NUMBERED.fullmatch(name) or (counted.get(name))
        key = f"{match['prefix']}{match['suffix']}" if match else name
        if match:
            numbered.add(key)
        found.setdefault(key, []).append(name)
    return [
        Group(key, tuple(by_number(files)), key in numbered and _are_several(files))
        for key, files in found.items()
    ]


def _are_several(files: Sequence[str]) -> bool:
    return len(files) > 1 or NUMBERED.fullmatch(files[0]) is not None


def _counting(names: Sequence[str]) -> Mapping[str, re.Match[str]]:
    """Names that count from 0: ``consolidated.00``; steps and epochs do not."""
    matches = {
        name: match
        for name in names
        if (match := _COUNTED.fullmatch(name) or _RANK.fullmatch(name))
    }
    starts = {(m["prefix"], m["suffix"]) for m in matches.values() if int(m["number"]) == 0}
    return {n: m for n, m in matches.items() if (m["prefix"], m["suffix"]) in starts}


def preferred(found: Sequence[Group]) -> list[Group]:
    """Without copies: variants of a model in another precision, a module beside its state dict."""
    best: dict[str, Group] = {}
    for group in sorted(found, key=_rank):
        best.setdefault(_STATE_DICT.sub("", _VARIANT.sub("", group.key, count=1), count=1), group)
    return [group for group in found if group in best.values()]


def _rank(group: Group) -> tuple[int, bool]:
    """The plain name first, then by precision; a state dict before what else it was saved as."""
    match = _VARIANT.search(group.key)
    word = match[1].lower() if match else ""
    place = 0 if not word else 1 + (_VARIANTS.index(word) if word in _VARIANTS else len(_VARIANTS))
    return place, _STATE_DICT.search(group.key) is None


def is_variant(name: str) -> bool:
    """Whether a name says that it is a copy in another precision, or of averaged weights."""
    return _VARIANT.search(name) is not None


def gap(group: Group) -> list[str]:
    """The files that are missing between those that count from 0."""
    match = _counting(group.files).get(group.files[0])
    if match is None:
        return []
    width, last = len(match["number"]), max(_numbers(group.files[-1])[-1:], default=0)
    wanted = (f"{match['prefix']}{n:0{width}d}{match['suffix']}" for n in range(last))
    return [name for name in islice(wanted, 100_000) if name not in group.files]


def by_number(names: Iterable[str]) -> list[str]:
    """Names in the order of their numbers."""
    return sorted(names, key=lambda name: [_order(part) for part in re.split(r"(\d+)", name)])


def _order(part: str) -> tuple[bool, int, str]:
    return (True, int(part), "") if part.isdecimal() else (False, 0, part)


def newest(names: Sequence[str]) -> str | None:
    """The last of names that count steps, ``last`` before all; None where they do not count."""
    latest = [name for name in names if re.fullmatch(r"(.*/)?(last|latest)(-v\d+)?\.\w+", name)]
    if latest:
        return latest[-1]
    counted = [name for name in names if re.search(r"\d", name)]
    return max(counted, key=_numbers) if len(counted) == len(names) > 1 else None


def _numbers(name: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", name)]
