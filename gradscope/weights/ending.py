"""How an analysis of checkpoints ends: rules, health, what is pooled, the report."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from gradscope.checkpoints.tensors import Checkpoint
from gradscope.report.model import Coverage, Finding, Input, InputFailure, Skip
from gradscope.report.request import Request
from gradscope.weights.casting import Wanted, casting
from gradscope.weights.examining import Examination
from gradscope.weights.experts import concerns, place
from gradscope.weights.health import health, overall_health
from gradscope.weights.result import (
    Need,
    Overall,
    RolePool,
    TensorResult,
    WeightsReport,
    WeightsResult,
)
from gradscope.weights.roles import AUXILIARY, Role

if TYPE_CHECKING:  # compiled kernels, which --headers-only has no use for
    from gradscope.statistics import Pool


def judged(examination: Examination, request: Request) -> Examination:
    """Ask the rules, and give each tensor the health that its findings leave."""
    examined = examination.examined
    said = request.judged(examined, examined.checkpoint.path)
    by_subject: dict[str, list[Finding]] = defaultdict(list)
    for finding in said.findings:
        by_subject[finding.subject].append(finding)
    of_experts = {
        path: [f for f in found if f.name == "dead-expert"] for path, found in by_subject.items()
    }
    measured = Need.STATISTICS in examined.measured
    tensors = tuple(
        _with_health(t, by_subject[t.name] + _of_expert(t.name, of_experts))
        if measured and t.numel
        else t
        for t in examined.tensors
    )
    return replace(examination, examined=replace(examined, tensors=tensors), judged=said)


def _of_expert(name: str, findings: Mapping[str, Sequence[Finding]]) -> list[Finding]:
    """Those about the expert that a tensor is part of, by the path of its series."""
    where = place(name)
    found = findings.get(where.path, ()) if where is not None else ()
    return [finding for finding in found if concerns(finding, name)]


def _with_health(tensor: TensorResult, findings: Sequence[Finding]) -> TensorResult:
    if tensor.statistics is None and not findings:
        return tensor
    return tensor.model_copy(update={"health": health(findings)})


def report(
    request: Request,
    examinations: Sequence[Examination],
    failures: Sequence[InputFailure],
    casts: Wanted,
) -> WeightsReport:
    """The report of some checkpoints, of which each was judged."""
    errors = (*failures, *(error for e in examinations for error in e.errors))
    checkpoints = [e.examined.checkpoint for e in examinations]
    return request.report(
        WeightsReport,
        _result(examinations, casts, complete=not errors) if examinations else None,
        inputs=(Input(path=c.path, format=c.format, bytes=c.nbytes) for c in checkpoints),
        coverage=_coverage(checkpoints, [s for e in examinations for s in e.examined.left_out]),
        judged=[e.judged for e in examinations],
        errors=errors,
    )


def _result(examinations: Sequence[Examination], casts: Wanted, complete: bool) -> WeightsResult:
    tensors = tuple(t for e in examinations for t in e.examined.tensors)
    checkpoints = [e.examined.checkpoint for e in examinations]
    lost = [s for c in checkpoints for s in c.skipped if not s.deliberate]
    beside = set(_beside(examinations))
    findings = [
        f for e in examinations for f in e.judged.findings if (f.input, f.subject) not in beside
    ]
    return WeightsResult(
        tensors=tensors,
        overall=_overall(examinations, tensors),
        health=overall_health(tensors, findings, complete and not lost),
        notes=tuple(note for c in checkpoints for note in c.notes),
        adapters=tuple(adapter for e in examinations for adapter in e.examined.adapters),
        casting=casting([e.examined for e in examinations], tensors, casts),
        attention=tuple(found for e in examinations for found in e.examined.attention),
    )


def _beside(examinations: Iterable[Examination]) -> Iterator[tuple[str, str]]:
    """Input and name of what training keeps beside the models."""
    for checkpoint in (e.examined.checkpoint for e in examinations):
        yield from ((checkpoint.path, r.name) for r in checkpoint.tensors if r.part != "model")


def _coverage(checkpoints: Sequence[Checkpoint], left_out: Iterable[Skip]) -> Coverage:
    refs = [ref for c in checkpoints for ref in c.tensors]
    skipped = [s for c in checkpoints for s in c.skipped]
    return Coverage(
        # Names and shapes alone are no analysis: ZeRO-3 leaves every tensor empty.
        analyzed=len(refs) if any(ref.numel for ref in refs) else 0,
        total=len(refs) + len(skipped),
        unit="tensors",
        bytes=sum(ref.nbytes for ref in refs),
        skipped=(*(Skip(subject=s.subject, reason=s.reason) for s in skipped), *left_out),
    )


def _overall(examinations: Sequence[Examination], tensors: Sequence[TensorResult]) -> Overall:
    pools = _pooled(examinations)
    model = [pool for role, pool in pools.items() if role not in AUXILIARY]
    everything = None
    for pool in model:
        everything = pool if everything is None else everything.merge(pool)
    trained = [t for t in tensors if t.role not in AUXILIARY]
    return Overall(
        tensors=len(tensors) - sum(1 for _ in _beside(examinations)),
        parameters=sum(t.numel for t in trained),
        statistics=None if everything is None else everything.statistics(),
        by_role={
            role: RolePool(tensors=pool.tensors, statistics=pool.statistics())
            for role, pool in pools.items()
        },
    )


def _pooled(examinations: Sequence[Examination]) -> dict[Role, Pool]:
    pools: dict[Role, Pool] = {}
    for name, pool in (item for e in examinations for item in e.pools.items()):
        role = Role(name)
        pools[role] = pools[role].merge(pool) if role in pools else pool
    return pools
