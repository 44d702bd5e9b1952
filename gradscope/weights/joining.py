"""The parts of a run joined: what its jobs found of each checkpoint, as if one had examined it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from pydantic import ValidationError

from gradscope.checkpoints.integrity import without
from gradscope.checkpoints.tensors import Checkpoint, TensorRef
from gradscope.quantization.weights import Quantization
from gradscope.report.config import ConfigLike
from gradscope.report.partial import Part, damaged, unpacked
from gradscope.report.request import requested
from gradscope.statistics.description import Member, Pool
from gradscope.weights.adapter_config import described
from gradscope.weights.casting import wanted_casts
from gradscope.weights.ending import judged, report
from gradscope.weights.examining import Examination, Origin, errors_of, without_lost
from gradscope.weights.masters import compared, compared_names
from gradscope.weights.parts import Found, State, measured
from gradscope.weights.patterns import narrowed
from gradscope.weights.result import (
    AdapterResult,
    AttentionResult,
    Examined,
    TensorResult,
    WeightsReport,
    WeightsResult,
)

V = TypeVar("V")


def merged(
    parts: Sequence[Part],
    *,
    select: Sequence[str] = (),
    ignore: Sequence[str] = (),
    fail_on: str | None = None,
    allow_empty: bool = False,
    config: ConfigLike = None,
    baseline: str | Path | None = None,
) -> WeightsReport:
    """The report of one run, of all its parts in order.

    Raises InputError for a part that is damaged, UsageError as ``analyze_weights`` does.
    """
    options = parts[0].partial.options
    request = requested(
        Examined,
        select=select,
        ignore=ignore,
        fail_on=fail_on,
        allow_empty=allow_empty,
        config=config,
        baseline=baseline,
        narrowed=narrowed(options["include"], options["exclude"]),
    )
    states = [_state(part) for part in parts]
    shares = [_shares(part, state) for part, state in zip(parts, states, strict=True)]
    examinations = [
        judged(_joined(of_one, options), request) for of_one in zip(*shares, strict=True)
    ]
    casts = wanted_casts(options["cast"], options["snr"])
    return report(request, examinations, states[0].failures, casts)


def _state(part: Part) -> State:
    try:
        return State.model_validate(unpacked(part))
    except ValidationError as error:
        raise damaged(part, "it is not what this version writes") from error


@dataclass(frozen=True, slots=True)
class _Share:
    """What one job found of one checkpoint, with what is in its report."""

    part: Part
    found: Found
    tensors: Mapping[str, TensorResult]
    attention: tuple[AttentionResult, ...]


def _shares(part: Part, state: State) -> list[_Share]:
    """Of each checkpoint, in their order."""
    result: WeightsResult | None = part.report.result
    if result is None:  # nothing could be opened
        return []
    tensors, attention = iter(result.tensors), iter(result.attention)
    return [
        _Share(
            part,
            found,
            {t.name: t for t in islice(tensors, found.tensors)},
            tuple(islice(attention, found.attentions)),
        )
        for found in state.checkpoints
    ]


def _joined(shares: Sequence[_Share], options: Mapping[str, Any]) -> Examination:
    """One checkpoint as one job would have examined it."""
    found = [s.found for s in shares]
    opened = found[0].opened
    if opened is None:
        raise damaged(shares[0].part, "it lacks the headers")
    sized = (_sized(ref, found[0].sizes.get(ref.name)) for ref in opened.tensors)
    opened = replace(opened, tensors=tuple(sized))
    broken = frozenset(c for f in found for c in f.damaged)
    failures = tuple(dict.fromkeys(failure for f in found for failure in f.failures))
    checkpoint = without(opened, broken)
    checkpoint = without_lost(checkpoint, _lost(checkpoint, found, options), failures)
    checkpoint = replace(checkpoint, notes=found[0].notes)
    place = {ref.name: n for n, ref in enumerate(checkpoint.tensors)}
    tensors = _united((s.tensors for s in shares), place)
    if len(tensors) < len(place):
        raise damaged(shares[0].part, "together with the others it has not every tensor")
    digests = {name: d for f in found for name, d in f.digests.items()}
    lacking = failures and not digests.keys() >= compared_names(checkpoint.tensors)
    seen = Examined(
        checkpoint,
        tuple(tensors.values()),
        measured(options),
        tables=_united((f.tables for f in found), place),
        codebooks=_united((f.codebooks for f in found), place),
        tokens=next((f.tokens for f in found if f.tokens), {}),
        quantization=_quantization(found, place),
        lost=_united((f.lost_codes for f in found), place),
        # Without all digests a file failed, which is told.
        masters=None if lacking else compared(checkpoint.tensors, digests),
        indices=_sorted((i for f in found for i in f.indices), place, lambda i: i.name),
        attention=_sorted((a for s in shares for a in s.attention), place, lambda a: a.tensor),
        left_out=tuple(
            sorted((s for f in found for s in f.left_out), key=lambda s: _where(s.subject, place))
        ),
    )
    seen = replace(seen, adapters=tuple(_adapters(described(seen), found)))
    origin = Origin(opened, damaged=broken, failures=failures)
    return Examination(seen, _pools(seen, found), errors_of(checkpoint, failures), origin)


@dataclass(frozen=True, slots=True)
class _Elsewhere:
    """In the place of how elements are computed, where no data is."""

    nbytes: int

    def read(self, start: int, stop: int) -> Any:
        """Never called: parts are joined without the files."""
        raise NotImplementedError


def _sized(ref: TensorRef, nbytes: int | None) -> TensorRef:
    return ref if nbytes is None else replace(ref, decoding=_Elsewhere(nbytes))


def _lost(
    checkpoint: Checkpoint, found: Iterable[Found], options: Mapping[str, Any]
) -> frozenset[str]:
    """The tensors that a file which failed in some job costs, as it costs those of one job."""
    names = {name for f in found for name in f.lost}
    if not names or not options["keep_going"]:
        return frozenset(ref.name for ref in checkpoint.tensors if names)
    files = {ref.file for ref in checkpoint.tensors if ref.name in names}
    return frozenset(ref.name for ref in checkpoint.tensors if ref.file in files)


def _united(found: Iterable[Mapping[str, V]], place: Mapping[str, int]) -> dict[str, V]:
    """What is known by the names of tensors, in their order."""
    known = {name: value for f in found for name, value in f.items() if name in place}
    return {name: known[name] for name in sorted(known, key=place.__getitem__)}


def _sorted(
    found: Iterable[V], place: Mapping[str, int], name: Callable[[V], str]
) -> tuple[V, ...]:
    """In the order of the tensors that they are about."""
    return tuple(sorted(found, key=lambda item: place.get(name(item), len(place))))


def _where(subject: str, place: Mapping[str, int]) -> tuple[bool, int]:
    """Tensors in their order, then modules in that of theirs."""
    if subject in place:
        return False, place[subject]
    return True, min((n for name, n in place.items() if name.startswith(subject)), default=0)


def _quantization(found: Sequence[Found], place: Mapping[str, int]) -> Quantization:
    parts = [f.quantization for f in found]
    return Quantization(
        _sorted((w for q in parts for w in q.weights), place, lambda w: w.codes.name),
        _sorted((ref for q in parts for ref in q.bare), place, lambda ref: ref.name),
        tuple(fault for q in parts for fault in q.faults),
    )


def _adapters(known: Sequence[AdapterResult], found: Iterable[Found]) -> Iterator[AdapterResult]:
    products = {place: product for f in found for place, product in f.products.items()}
    for place, adapter in enumerate(known):
        rank, norm = products.get(place, (None, None))
        yield adapter.model_copy(update={"effective_rank": rank, "norm": norm})


def _pools(seen: Examined, found: Sequence[Found]) -> dict[str, Pool]:
    """The pools of one job: those of what stands beside codes are pooled before all others."""
    moments = {name: m for f in found for name, m in f.moments.items()}
    beside = {c.name for w in seen.quantization.weights for c in w.companions}
    pooled = [t for t in seen.tensors if t.name in moments and t.statistics is not None]
    rest = [t for t in pooled if t.name not in beside]
    first = [t for t in pooled if t.name in beside]
    pools = {str(role): Pool() for role in dict.fromkeys(t.role for t in (*rest, *first))}
    for t in (*first, *rest):
        assert t.statistics is not None
        pools[t.role].members.append(Member(t.name, t.statistics, moments[t.name]))
    for role, (apart, counts) in (item for f in found for item in f.buckets.items()):
        if role in pools:
            buckets = np.cumsum(np.array(apart, np.int64)).astype(np.uint32)
            pools[role].histogram.add(buckets, np.array(counts, np.int64))
    return pools
