"""The report of one of several jobs, with what ``joining`` needs to make one run of their parts.

Rules, health and whatever is pooled rest on all tensors, so they wait for ``merge``, which ends as
a run of one job does: an ``Examination`` of each checkpoint is made of its parts, and judged.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict

from gradscope.checkpoints.tensors import Checkpoint, Checksum
from gradscope.quantization.weights import Quantization
from gradscope.report.model import InputFailure, NotEvaluated, Skip
from gradscope.report.partial import PartialReport
from gradscope.report.request import Request
from gradscope.statistics.description import Pool
from gradscope.statistics.moments import Moments
from gradscope.statistics.records import CodeUse, TableRows
from gradscope.weights.casting import Wanted
from gradscope.weights.ending import report
from gradscope.weights.examining import Examination, among
from gradscope.weights.result import (
    IndexResult,
    Need,
    WeightsReport,
    WeightsResult,
)
from gradscope.weights.sealing import WAITING, asked_of, plain, sealed
from gradscope.weights.shares import Share


class _Facts(BaseModel):
    """Base of what is packed, which never holds how elements are computed."""

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)


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


class State(_Facts):
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
    asked = asked_of(request, part, whole)
    said = report(asked, waiting, failures, Wanted())
    total = sum(len(e.examined.tensors) for e in examinations)
    others = total - sum(len(e.examined.tensors) for e in mine)
    coverage = said.coverage.model_copy(update={"total": said.coverage.total + others})
    said = said.model_copy(update={"coverage": coverage})
    state = State(
        failures=tuple(failures),
        checkpoints=tuple(
            _found(e, m, first=part.index == 0) for e, m in zip(examinations, mine, strict=True)
        ),
    )
    opened = [e.origin.opened for e in examinations]
    return sealed(PartialReport[WeightsResult], said, part, options, opened, state)


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
    known = measured(options)
    later = {r.name for r in request.rules if r.needs in known}
    absent = tuple(
        NotEvaluated(rule=n.rule, reason=WAITING) if n.rule in later else n
        for n in examination.judged.not_evaluated
    )
    return replace(examination, judged=replace(examination.judged, not_evaluated=absent))


def measured(options: Mapping[str, Any]) -> frozenset[Need]:
    """The kinds of facts that there are once all parts are joined."""
    whole = options["spectral"] and not options["norms_only"]
    known = {Need.HEADERS, Need.TENSOR, Need.STATISTICS}
    return frozenset(known | {Need.SPECTRA} if whole else known)


def _found(examination: Examination, own: Examination, first: bool) -> Found:
    seen, origin = own.examined, examination.origin
    pools = examination.pools
    names = {t.name for t in seen.tensors}
    return Found(
        tensors=len(seen.tensors),
        attentions=len(seen.attention),
        opened=plain(origin.opened) if first else None,
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
