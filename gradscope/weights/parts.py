"""What one of several jobs found of some checkpoints, written into its report and joined again.

Rules, health and whatever is pooled rest on all tensors, so they wait for ``merge``, which ends as
a run of one job does: an ``Examination`` of each checkpoint is made of its parts, and judged.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from gradscope.checkpoints.integrity import sample, without
from gradscope.checkpoints.tensors import Checkpoint, Checksum, TensorRef
from gradscope.errors import InputError
from gradscope.quantization.weights import Quantization
from gradscope.report.config import ConfigLike
from gradscope.report.model import InputFailure, NotEvaluated, Skip
from gradscope.report.partial import (
    Part,
    Partial,
    PartialReport,
    Source,
    damaged,
    digest,
    packed,
    spelled,
    unpacked,
)
from gradscope.report.request import Request, requested
from gradscope.statistics.description import Member, Pool
from gradscope.statistics.moments import Moments
from gradscope.statistics.records import CodeUse, TableRows
from gradscope.weights.adapter_config import described
from gradscope.weights.casting import Wanted, wanted_casts
from gradscope.weights.ending import judged, report
from gradscope.weights.examining import Examination, Origin, among, errors_of, without_lost
from gradscope.weights.masters import compared
from gradscope.weights.patterns import narrowed
from gradscope.weights.result import (
    AdapterResult,
    AttentionResult,
    Examined,
    IndexResult,
    Need,
    TensorResult,
    WeightsReport,
    WeightsResult,
)
from gradscope.weights.shares import Share

V = TypeVar("V")


class _Facts(BaseModel):
    """Base of what is packed, which never holds how elements are computed."""

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)


class _Opened(_Facts):
    """What headers say."""

    checkpoints: tuple[Checkpoint, ...]


class Found(_Facts):
    """What a job found of one checkpoint, beside what its report has.

    Of the report's tensors and attentions as many belong to it as are counted here.
    """

    tensors: int
    attentions: int
    #: As the headers describe it, and what is to be told of it; in the first part alone.
    opened: Checkpoint | None
    notes: tuple[str, ...]
    #: Bytes of the tensors whose elements are not stored but computed.
    sizes: Mapping[str, int]
    #: See ``Origin``.
    damaged: tuple[Checksum, ...]
    lost: tuple[str, ...]
    failures: tuple[InputFailure, ...]
    digests: Mapping[str, Mapping[str, str]]
    #: See ``Examined``.
    quantization: Quantization
    lost_codes: Mapping[str, float]
    tables: Mapping[str, TableRows]
    codebooks: Mapping[str, tuple[CodeUse, ...]]
    tokens: Mapping[int, str]
    indices: tuple[IndexResult, ...]
    left_out: tuple[Skip, ...]
    #: Effective rank and norm of the products that were computed, by their place.
    products: Mapping[int, tuple[float | None, float]]
    #: The moments of each tensor that is pooled, and by role the buckets that occur, each as the
    #: distance to the one before, with their counts.
    moments: Mapping[str, Moments]
    buckets: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]]


class _State(_Facts):
    """What a partial report carries of all its checkpoints."""

    #: Of the checkpoints that could not be opened.
    failures: tuple[InputFailure, ...]
    checkpoints: tuple[Found, ...]


# -- a part written -------------------------------------------------------------------------------


def partial_report(
    request: Request,
    part: Share,
    options: Mapping[str, Any],
    examinations: Sequence[Examination],
    failures: Sequence[InputFailure],
) -> WeightsReport:
    """The report of one job, with what the others' parts are joined by."""
    mine = [_own(e) for e in examinations]
    whole = any(ref.numel for e in examinations for ref in e.examined.checkpoint.tensors)
    waiting = [_waiting(e, request, options) for e in mine]
    asked = replace(
        request,
        narrowed=(*request.narrowed, f"--shard {part}"),
        allow_empty=request.allow_empty or whole,  # there may be more jobs than tensors
    )
    said = report(asked, waiting, failures, Wanted())
    total = sum(len(e.examined.tensors) for e in examinations)
    others = total - sum(len(e.examined.tensors) for e in mine)
    coverage = said.coverage.model_copy(update={"total": said.coverage.total + others})
    note = (
        f"part {part} of a run, with {coverage.analyzed:,} of {coverage.total:,} tensors: no "
        "verdict of the whole, which `gradscope merge` makes of all parts"
    )
    gate = said.gate.model_copy(update={"notes": (note, *said.gate.notes)})
    state = packed(
        _State(
            failures=tuple(failures),
            checkpoints=tuple(
                _found(e, m, first=part.index == 0) for e, m in zip(examinations, mine, strict=True)
            ),
        ).model_dump()
    )
    return PartialReport[WeightsResult](
        **{name: getattr(said, name) for name in type(said).model_fields}
        | {"coverage": coverage, "gate": gate},
        partial=Partial(
            index=part.index,
            of=part.of,
            options=options,
            files=tuple(_sources(examinations)),
            headers=_headers(examinations),
            state=state,
            digest=digest(state),
        ),
    )


def _own(examination: Examination) -> Examination:
    """What a job examined, without the tensors of which it knows the headers alone."""
    seen = examination.examined
    refs = tuple(among(seen.checkpoint.tensors, examination.origin.own))
    names = {ref.name for ref in refs}
    own = replace(
        seen,
        checkpoint=replace(seen.checkpoint, tensors=refs),
        tensors=tuple(t for t in seen.tensors if t.name in names),
        adapters=(),
    )
    return replace(examination, examined=own)


def _waiting(examination: Examination, request: Request, options: Mapping[str, Any]) -> Examination:
    """With the rules that will be asked said to wait for that."""
    known = _measured(options)
    later = {r.name for r in request.rules if r.needs in known}
    reason = "waits for `gradscope merge`, which has all parts"
    absent = tuple(
        NotEvaluated(rule=n.rule, reason=reason) if n.rule in later else n
        for n in examination.judged.not_evaluated
    )
    return replace(examination, judged=replace(examination.judged, not_evaluated=absent))


def _measured(options: Mapping[str, Any]) -> frozenset[Need]:
    """The kinds of facts that there are once all parts are joined."""
    whole = options["spectral"] and not options["norms_only"]
    known = {Need.HEADERS, Need.TENSOR, Need.STATISTICS}
    return frozenset(known | {Need.SPECTRA} if whole else known)


def _sources(examinations: Iterable[Examination]) -> Iterator[Source]:
    """The files of the checkpoints, each once."""
    stamps = {path: s for e in examinations for path, s in e.origin.opened.stamps.items()}
    for path, (nbytes, *_) in stamps.items():
        try:
            yield Source(path=path, bytes=nbytes, sample=sample(path, nbytes))
        except InputError:  # it is gone: what read it has said so
            yield Source(path=path, bytes=nbytes, sample="")


def _headers(examinations: Iterable[Examination]) -> str:
    """A digest of what the headers say; stamps differ between machines."""
    opened = tuple(replace(_plain(e.origin.opened), stamps={}) for e in examinations)
    return digest(spelled(_Opened(checkpoints=opened).model_dump()))


def _found(examination: Examination, own: Examination, first: bool) -> Found:
    seen, origin = own.examined, examination.origin
    pools = examination.pools
    names = {t.name for t in seen.tensors}
    return Found(
        tensors=len(seen.tensors),
        attentions=len(seen.attention),
        opened=_plain(origin.opened) if first else None,
        notes=seen.checkpoint.notes if first else (),
        sizes={r.name: r.nbytes for r in origin.opened.tensors if first and r.decoding is not None},
        damaged=tuple(origin.damaged),
        lost=tuple(sorted(origin.lost)),
        failures=origin.failures,
        digests=origin.digests,
        quantization=_without_values(seen.quantization, names, first),
        lost_codes=seen.lost,
        tables=seen.tables,
        codebooks=seen.codebooks,
        tokens=seen.tokens,
        indices=seen.indices,
        left_out=seen.left_out,
        products={
            place: (adapter.effective_rank, adapter.norm)
            for place, adapter in enumerate(examination.examined.adapters)
            if adapter.norm is not None
        },
        moments={m.name: m.moments for pool in pools.values() for m in pool.members},
        buckets={role: _buckets(pool) for role, pool in pools.items()},
    )


def _plain(opened: Checkpoint) -> Checkpoint:
    """Without what only reading data takes."""
    stored = (
        ref if ref.decoding is None else replace(ref, decoding=None) for ref in opened.tensors
    )
    return replace(opened, tensors=tuple(stored), left_out=())


def _without_values(found: Quantization, names: Collection[str], first: bool) -> Quantization:
    """The weights whose codes are among a job's tensors; their values can only be read."""
    return Quantization(
        tuple(replace(w, decoding=None) for w in found.weights if w.codes.name in names),
        tuple(ref for ref in found.bare if ref.name in names),
        found.faults if first else (),
    )


def _buckets(pool: Pool) -> tuple[tuple[int, ...], tuple[int, ...]]:
    buckets, counts = pool.histogram.counted()
    apart = np.diff(buckets.astype(np.int64), prepend=0)
    return tuple(apart.tolist()), tuple(counts.tolist())


# -- parts joined ---------------------------------------------------------------------------------


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


def _state(part: Part) -> _State:
    try:
        return _State.model_validate(unpacked(part))
    except ValidationError as error:
        raise damaged(part, "it is not what this version writes") from error


@dataclass(frozen=True, slots=True)
class _Share:
    """What one job found of one checkpoint, with what is in its report."""

    part: Part
    found: Found
    tensors: Mapping[str, TensorResult]
    attention: tuple[AttentionResult, ...]


def _shares(part: Part, state: _State) -> list[_Share]:
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
    seen = Examined(
        checkpoint,
        tuple(tensors.values()),
        _measured(options),
        tables=_united((f.tables for f in found), place),
        codebooks=_united((f.codebooks for f in found), place),
        tokens=next((f.tokens for f in found if f.tokens), {}),
        quantization=_quantization(found, place),
        lost=_united((f.lost_codes for f in found), place),
        masters=compared(checkpoint.tensors, digests),
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
