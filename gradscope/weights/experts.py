"""The experts of a checkpoint, however they are stored: one tensor each, or stacked in one.

What is said of an expert must not depend on that: rules see the matrices of each expert with the
same facts (norm, content, dead units), under the path and number that they have in either form.
"""

from __future__ import annotations

import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from gradscope.checkpoints.numbering import NUMBERED
from gradscope.report.model import Finding
from gradscope.weights.result import Examined, TensorResult
from gradscope.weights.roles import MATRICES, TABLES, Role

_SERIES = r"(?P<path>(?:.*[./])?(?!shared)\w*experts?)"
#: ``mlp.experts.7.w1.weight``, ``mlp.experts.expert_7.wi.weight``, ``experts.mlp.7.w1.weight``,
#: ``ffn.expert_list.7.up.weight``, ``moe.mlps.7.fc1.weight``.
_SPLIT = re.compile(
    _SERIES[:-1]
    + r"(?:[./](?:mlps?|ffns?|layers|list|modules)|_?(?:list|layers|modules|mlps|ffns|networks))?"
    + r"|(?:.*[./])?\w*moe[./](?:mlps|ffns|networks))"
    + r"[./](?:expert_?)?(?P<number>\d+)[./](?P<kind>.+)"
)
#: ``moe.expert7.w1.weight``.
_GLUED = re.compile(_SERIES + r"_?(?P<number>\d+)[./](?P<kind>.+)")
#: ``mlp.experts.linear_fc1.weight7``, as Transformer Engine's grouped layers have them.
_GROUPED = re.compile(_SERIES + r"\.(?P<kind>\w+)\.weight(?P<number>\d+)")
_STACKED = re.compile(
    r"(?P<path>(?:.*[./])?(?:(?!shared)\w*experts?|\w*moe|\w+(?=[./](?:in|out)put_linear\.weight)))"
    r"[./](?P<kind>.+)"
)
_LEAF = re.compile(r"[./](weight|kernel)$")
#: First matrices of an expert that are two in one: without its gate, or what it gates, it is dead.
_GATED = re.compile(r"gate_up|up_gate|input_linear|w13|linear_fc1")
_ROUTER = re.compile(
    r"(?P<outer>(?:.*?[./])?)(?:router|gate|gating|gate_network|switch)(?:[./]|$)"
    r"(?:(?:layer|wg|classifier|dense|proj|linear|gate)[./])?(?:weight|kernel|w)?"
)
#: Roles of what an expert computes with.
_WEIGHTS = (MATRICES - TABLES - {Role.LORA_A, Role.LORA_B}) | {Role.QUANTIZED, Role.PACKED}


class Place(NamedTuple):
    """Where a tensor is among experts; ``number`` is None where they are stacked."""

    path: str
    number: int | None
    kind: str


def _split(name: str) -> re.Match[str] | None:
    return _SPLIT.fullmatch(name) or _GLUED.fullmatch(name)


def place(name: str) -> Place | None:
    """Which expert a tensor is part of by its name, if any."""
    if "expert" not in name and "moe" not in name and "put_linear" not in name:
        return None
    if found := _split(name) or _GROUPED.fullmatch(name):
        return Place(found["path"], int(found["number"]), _LEAF.sub("", found["kind"]))
    if found := _STACKED.fullmatch(name):
        return Place(found["path"], None, _LEAF.sub("", found["kind"]))
    return None


@dataclass(frozen=True, slots=True)
class Matrix:
    """One matrix of one expert."""

    norm: float
    content: str | None
    #: It is two matrices in one, and one of them has no living unit.
    half_dead: bool = False


@dataclass(frozen=True, slots=True)
class Experts:
    """The experts of one layer: the matrices of each kind by the expert's number."""

    path: str
    kinds: Mapping[str, Mapping[int, Matrix]]
    router: TensorResult | None

    @property
    def numbers(self) -> tuple[int, ...]:
        """The experts that there are, ascending."""
        return tuple(sorted({n for matrices in self.kinds.values() for n in matrices}))


def experts_of(examined: Examined) -> tuple[Experts, ...]:
    """The experts of every layer, in file order. What has no finite values is left out."""
    found: dict[str, dict[str, dict[int, Matrix]]] = defaultdict(lambda: defaultdict(dict))
    codes = examined.quantization.codes()
    for tensor in examined.tensors:
        where = place(tensor.name) if tensor.role in _WEIGHTS else None
        if where is None or tensor.statistics is None or tensor.numel == 0:
            continue
        if tensor.name in codes and tensor.dequantized is None:  # codes without values
            continue
        if tensor.statistics.finite_count < tensor.statistics.count:
            continue
        for number, matrix in _matrices(tensor, where):
            found[where.path][where.kind][number] = matrix
    routers = _routers(examined.tensors)
    return tuple(
        Experts(
            path, kinds, router_of(path, 1 + max(n for m in kinds.values() for n in m), routers)
        )
        for path, kinds in found.items()
    )


def _matrices(tensor: TensorResult, where: Place) -> Iterator[tuple[int, Matrix]]:
    gated = _GATED.search(where.kind) is not None
    units, s = tensor.units, tensor.statistics
    if where.number is None:
        for number, part in enumerate((units and units.parts) or ()):
            half = gated and 2 * part.dead_rows >= part.rows
            yield number, Matrix(part.norm, part.content_hash, half)
    elif s is not None and s.l2_norm is not None:
        half = gated and units is not None and 2 * units.dead_rows >= units.rows
        yield where.number, Matrix(s.l2_norm, tensor.content_hash, half)


# -- routers --------------------------------------------------------------------------------------


def _routers(tensors: Iterable[TensorResult]) -> Mapping[str, TensorResult]:
    """What chooses among experts, by the module that it and they are in."""
    found = {}
    for tensor in tensors:
        named = _ROUTER.fullmatch(tensor.name) if len(tensor.shape) == 2 else None
        if named is not None and not _split(tensor.name):
            found[named["outer"]] = tensor
    return found


def router_of(path: str, count: int, routers: Mapping[str, TensorResult]) -> TensorResult | None:
    """The router nearest above some experts that has a row (or column) for each of them."""
    parts = re.split(r"(?<=[./])", path + ("/" if "/" in path else "."))
    for end in range(len(parts), -1, -1):
        found = routers.get("".join(parts[:end]))
        if found is not None and max(found.shape) >= count:
            return found
    return None


# -- what is wrong with them ----------------------------------------------------------------------


def dead(series: Iterable[Experts], share: float) -> dict[str, dict[int, list[str]]]:
    """By path, the dead experts with the kinds of matrices that they are dead in.

    A matrix is dead whose norm is below ``share`` of the reference: the greatest norm of its kind
    in the layer, or where that is a thousand times off, what is usual over the layers. No dead
    majority moves it, and no exploded layer. An expert without one of its matrices is dead.
    """
    listed = list(series)
    usual = _usual(listed)
    found: dict[str, dict[int, list[str]]] = {}
    for experts in listed:
        here: dict[int, list[str]] = defaultdict(list)
        for kind, matrices in experts.kinds.items():
            own = max(m.norm for m in matrices.values())
            common = usual[kind]
            reference = own if share * common <= own <= common / share else common
            for number, matrix in sorted(matrices.items()):
                if matrix.norm < share * reference or matrix.norm == 0 or matrix.half_dead:
                    here[number].append(kind)
        if here:
            found[experts.path] = dict(sorted(here.items()))
    return found


def _usual(series: Iterable[Experts]) -> dict[str, float]:
    """The upper median over the layers of the greatest norm of each kind of matrix."""
    peaks: dict[str, list[float]] = defaultdict(list)
    for experts in series:
        for kind, matrices in experts.kinds.items():
            peaks[kind].append(max(m.norm for m in matrices.values()))
    return {kind: sorted(found)[len(found) // 2] for kind, found in peaks.items()}


class Copy(NamedTuple):
    """An expert that is equal to an earlier one in some kinds of matrices."""

    path: str
    number: int
    original_path: str
    original: int
    kinds: tuple[str, ...]


def copies(series: Iterable[Experts], dead: Mapping[str, Mapping[int, object]]) -> tuple[Copy, ...]:
    """Experts that are equal to others of their layer, or else of an earlier layer.

    A layer all of whose experts equal the same ones of another was copied as a layer: that is left
    to ``duplicate-tensors``.
    """
    first: dict[tuple[str, str], tuple[str, int]] = {}
    found: list[Copy] = []
    for experts in series:
        here: dict[tuple[int, str, int], list[str]] = defaultdict(list)
        for kind, matrices in experts.kinds.items():
            for number, matrix in sorted(matrices.items()):
                if matrix.content is None or number in dead.get(experts.path, {}):
                    continue
                origin = first.setdefault((kind, matrix.content), (experts.path, number))
                if origin != (experts.path, number):
                    here[(number, *origin)].append(kind)
        if not _whole_layer(experts, here):
            found += [
                Copy(experts.path, number, path, original, tuple(kinds))
                for (number, path, original), kinds in sorted(here.items())
            ]
    return tuple(found)


def _whole_layer(experts: Experts, here: Iterable[tuple[int, str, int]]) -> bool:
    origins = {path for _, path, _ in here}
    same = {n for n, path, original in here if path != experts.path and n == original}
    return len(origins) == 1 and same == set(experts.numbers)


@dataclass(frozen=True)
class Judged:
    """The experts of a checkpoint, and those that ``dead-expert`` speaks of."""

    series: tuple[Experts, ...]
    dead: Mapping[str, Mapping[int, list[str]]]
    copies: tuple[Copy, ...]

    @classmethod
    def of(cls, examined: Examined, share: float = 1e-3) -> Judged:
        """Found once a checkpoint: several rules leave to one what it says of experts."""
        series = experts_of(examined)
        lost = dead(series, share)
        return cls(series, lost, copies(series, lost))

    def covers(self, name: str, number: int | None = None) -> bool:
        """Whether it speaks of the expert that a tensor (or its part ``number``) belongs to.

        Of stacked ones without ``number``: whether it calls any of them dead.
        """
        where = place(name)
        if where is None:
            return False
        which = where.number if number is None else number
        lost = self.dead.get(where.path, {})
        if which is None:
            return bool(lost)
        return which in lost or (where.path, which) in self._copied

    @cached_property
    def _copied(self) -> frozenset[tuple[str, int]]:
        return frozenset((c.path, c.number) for c in self.copies)

    @cached_property
    def routers(self) -> frozenset[str]:
        """Names of what chooses among them."""
        return frozenset(e.router.name for e in self.series if e.router is not None)


def missing_experts(examined: Examined) -> Iterator[tuple[str, Sequence[int], int, int]]:
    """Path, missing numbers, how many are there and should be, of experts stored one by one.

    There should be as many as the router has rows, or up to the highest number. Where half or more
    are missing, a part of a larger checkpoint was given; so it was if its name says so.
    """
    if NUMBERED.fullmatch(os.path.basename(examined.checkpoint.path)):
        return
    routers = _routers(examined.tensors)
    weights = [t.name for t in examined.tensors if t.role in _WEIGHTS]
    elsewhere = _numbered(skipped.subject for skipped in examined.checkpoint.skipped)
    for path, found in _numbered(weights).items():
        commonest = Counter(kind for kinds in found.values() for kind in kinds)
        wanted = {kind for kind, count in commonest.items() if 2 * count > len(found)}
        router = None if "local_experts" in path else router_of(path, max(found) + 1, routers)
        total = max(max(found) + 1, router.shape[0] if router is not None else 0)
        left_out = elsewhere.get(path, {})
        whole = {n for n in range(total) if wanted <= found.get(n, set()) | left_out.get(n, set())}
        lost = sorted(set(range(total)) - whole)
        if lost and 2 * len(lost) < total:
            yield path, lost, len(whole), total


def _numbered(names: Iterable[str]) -> Mapping[str, Mapping[int, set[str]]]:
    """Kinds of matrices by path and number."""
    found: dict[str, dict[int, set[str]]] = defaultdict(lambda: defaultdict(set))
    for name in names:
        if (where := place(name)) is not None and where.number is not None:
            found[where.path][where.number].add(where.kind)
    return found


def concerns(finding: Finding, name: str) -> bool:
    """Whether a finding about experts of a layer is about one that this tensor is part of."""
    where = place(name)
    if where is None or finding.subject != where.path:
        return False
    numbers = str(finding.evidence.get("experts", "")).split(", ")
    return where.number is None or str(where.number) in numbers
