"""``analyze_weights``: checkpoint -> statistics -> rules -> report."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gradscope.checkpoints.files import check_unchanged
from gradscope.checkpoints.open import open_checkpoint
from gradscope.checkpoints.tensors import Checkpoint, Skipped, TensorRef
from gradscope.errors import InputError, UsageError
from gradscope.report.gate import gate
from gradscope.report.model import (
    Coverage,
    Finding,
    Input,
    InputFailure,
    NotEvaluated,
    Severity,
    Skip,
)
from gradscope.report.rules import Rule, evaluate, load_rules, select
from gradscope.statistics.records import Statistics, TensorProfile
from gradscope.weights.health import health, overall_health
from gradscope.weights.result import (
    Examined,
    Overall,
    RolePool,
    TensorResult,
    WeightsReport,
    WeightsResult,
    tensor_result,
)
from gradscope.weights.roles import AUXILIARY, Role, roles

if TYPE_CHECKING:  # compiled kernels, which --headers-only has no use for
    from gradscope.statistics.profile import Engine, Pool
    from gradscope.statistics.tally import Scan

Progress = Callable[[int, int], None]


def analyze_weights(
    *checkpoints: str | Path,
    key: str | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    headers_only: bool = False,
    select: Sequence[str] = (),
    ignore: Sequence[str] = (),
    fail_on: str = "high",
    allow_empty: bool = False,
    keep_going: bool = False,
    device: str = "cpu",
    jobs: int | None = None,
    progress: Progress = lambda _done, _total: None,
) -> WeightsReport:
    """Diagnose one or more checkpoints.

    ``include`` and ``exclude`` are shell patterns of tensor names, ``key`` the dotted path of the
    nested dict that is the state dict, ``select`` and ``ignore`` rule codes, prefixes or names.
    ``progress`` is called with bytes done and bytes in all. An input that cannot be read is an
    entry of ``errors``, never an exception; with ``keep_going`` the other shards of a checkpoint
    one of whose files fails while it is read are still analysed.

    Raises UsageError for an unknown rule, key, device or severity.
    """
    if fail_on not in (*Severity, "never"):
        raise UsageError(f"fail_on is {fail_on!r}; it is one of {', '.join(Severity)} or never")
    chosen = _chosen_rules(select, ignore)
    opened, errors = _open_all(checkpoints, key)
    opened = [_filtered(c, include, exclude) for c in opened]
    if headers_only:
        examinations = [_headers(c) for c in opened]
    else:
        meter = _Meter(progress, sum(ref.nbytes for c in opened for ref in c.tensors))
        examinations = _measure_all(opened, device, jobs, meter, keep_going)
    measured = frozenset({"headers"} if headers_only else {"headers", "statistics"})
    judged = [_judged(e, chosen, measured, many=len(opened) > 1) for e in examinations]
    return _report(judged, errors, fail_on, allow_empty)


def scan_for(device: str) -> Scan:
    """The kernels of a device; torch is imported for any but the CPU. Raises UsageError."""
    if device == "cpu":
        from gradscope.statistics.scan import scan

        return scan
    from gradscope.statistics.torch_scan import scan_on

    return scan_on(device)


def _chosen_rules(selected: Sequence[str], ignored: Sequence[str]) -> list[Rule]:
    known = [r for r in load_rules().values() if r.code[0] in "CW"]
    return select(known, selected, ignored)


@dataclass
class _Meter:
    """Bytes done of the whole run, told to whoever draws the progress bar."""

    progress: Progress
    total: int
    done: int = 0

    def __call__(self, amount: int) -> None:
        self.done += amount
        self.progress(self.done, self.total)


@dataclass(frozen=True, slots=True)
class _Examination:
    """One checkpoint examined, before it is judged."""

    examined: Examined
    pools: Mapping[str, Pool]
    errors: tuple[InputFailure, ...]
    findings: tuple[Finding, ...] = ()
    not_evaluated: tuple[NotEvaluated, ...] = ()


def _open_all(
    paths: Iterable[str | Path], key: str | None
) -> tuple[list[Checkpoint], list[InputFailure]]:
    opened: list[Checkpoint] = []
    errors: list[InputFailure] = []
    for path in paths:
        try:
            opened.append(open_checkpoint(str(path), key))
        except InputError as error:
            errors.append(_failure(error))
    return opened, errors


def _failure(error: InputError) -> InputFailure:
    return InputFailure(input=error.path, kind=error.kind, message=error.message)


def _filtered(checkpoint: Checkpoint, include: Sequence[str], exclude: Sequence[str]) -> Checkpoint:
    def wanted(ref: TensorRef) -> bool:
        included = not include or any(fnmatchcase(ref.name, glob) for glob in include)
        return included and not any(fnmatchcase(ref.name, glob) for glob in exclude)

    kept = tuple(ref for ref in checkpoint.tensors if wanted(ref))
    left_out = (
        Skipped(ref.name, "left out by --include or --exclude", deliberate=True)
        for ref in checkpoint.tensors
        if not wanted(ref)
    )
    return replace(checkpoint, tensors=kept, skipped=(*checkpoint.skipped, *left_out))


def _headers(checkpoint: Checkpoint) -> _Examination:
    names = roles(checkpoint.tensors)
    tensors = (
        tensor_result(TensorProfile(ref, Statistics()), names[ref.name])
        for ref in checkpoint.tensors
    )
    bare = tuple(t.model_copy(update={"statistics": None}) for t in tensors)
    return _Examination(Examined(checkpoint, bare), {}, _part_failures(checkpoint))


def _measure_all(
    opened: Sequence[Checkpoint],
    device: str,
    jobs: int | None,
    meter: Callable[[int], None],
    keep_going: bool,
) -> list[_Examination]:
    from gradscope.statistics.profile import threads

    scan = scan_for(device)
    return [_measured(c, scan, threads(jobs), meter, keep_going) for c in opened]


def _measured(
    checkpoint: Checkpoint,
    scan: Scan,
    engine: Engine[Any, Any],
    meter: Callable[[int], None],
    keep_going: bool,
) -> _Examination:
    """Read the data once; a file that fails meanwhile costs its tensors, and is said."""
    from gradscope.statistics.profile import profile

    names = roles(checkpoint.tensors)
    failures: list[InputFailure] = []
    refs = list(checkpoint.tensors)
    while True:
        try:
            result = profile(
                refs, group=lambda ref: names[ref.name], engine=engine, scan=scan, progress=meter
            )
            for path in {ref.file for ref in refs}:
                check_unchanged(path, checkpoint.stamps[path])
            break
        except InputError as error:
            failures.append(_failure(error))
            refs = [ref for ref in refs if ref.file != error.path] if keep_going else []
    checkpoint = _without_unread(checkpoint, refs, failures)
    tensors = tuple(tensor_result(t, names[t.ref.name]) for t in result.tensors)
    return _Examination(
        Examined(checkpoint, tensors), result.pools, (*_part_failures(checkpoint), *failures)
    )


def _without_unread(
    checkpoint: Checkpoint, read: Sequence[TensorRef], failures: Sequence[InputFailure]
) -> Checkpoint:
    if not failures:
        return checkpoint
    kept = set(read)
    reason = f"not read: {failures[0].input} failed ({failures[0].kind})"
    lost = tuple(Skipped(ref.name, reason) for ref in checkpoint.tensors if ref not in kept)
    return replace(checkpoint, tensors=tuple(read), skipped=(*checkpoint.skipped, *lost))


def _part_failures(checkpoint: Checkpoint) -> tuple[InputFailure, ...]:
    return tuple(
        InputFailure(input=checkpoint.path, kind=f.kind, message=f.message)
        for f in checkpoint.failures
    )


def _judged(
    examination: _Examination, chosen: Sequence[Rule], measured: frozenset[str], many: bool
) -> _Examination:
    """Ask the rules, and give each tensor the health its findings leave."""
    examined = examination.examined
    artefact = Path(examined.checkpoint.path).name if many else ""
    found = list(evaluate(chosen, examined, measured, artefact))
    findings = tuple(f for f in found if isinstance(f, Finding))
    by_subject: dict[str, list[Finding]] = defaultdict(list)
    for finding in findings:
        by_subject[finding.subject].append(finding)
    tensors = tuple(_with_health(t, by_subject[t.name]) for t in examined.tensors)
    return replace(
        examination,
        examined=replace(examined, tensors=tensors),
        findings=findings,
        not_evaluated=tuple(n for n in found if isinstance(n, NotEvaluated)),
    )


def _with_health(tensor: TensorResult, findings: Sequence[Finding]) -> TensorResult:
    if tensor.statistics is None or tensor.numel == 0:
        return tensor
    return tensor.model_copy(update={"health": health(findings)})


def _report(
    judged: Sequence[_Examination], errors: list[InputFailure], fail_on: str, allow_empty: bool
) -> WeightsReport:
    all_errors = (*errors, *(e for j in judged for e in j.errors))
    findings = tuple(
        sorted((f for j in judged for f in j.findings), key=lambda f: -f.severity.rank)
    )
    coverage = _coverage(judged)
    tensors = tuple(t for j in judged for t in j.examined.tensors)
    lost = [s for j in judged for s in j.examined.checkpoint.skipped if not s.deliberate]
    complete = not lost and not all_errors
    result = WeightsResult(
        tensors=tensors,
        overall=_overall(judged, tensors),
        health=overall_health(tensors, findings, complete),
        notes=tuple(note for j in judged for note in j.examined.checkpoint.notes),
    )
    return WeightsReport(
        command="weights",
        inputs=tuple(
            Input(path=c.path, format=c.format, bytes=c.nbytes)
            for c in (j.examined.checkpoint for j in judged)
        ),
        coverage=coverage,
        findings=findings,
        result=result if judged else None,
        gate=gate(findings, all_errors, coverage, fail_on=fail_on, allow_empty=allow_empty),
        errors=all_errors,
    )


def _coverage(judged: Sequence[_Examination]) -> Coverage:
    refs = [ref for j in judged for ref in j.examined.checkpoint.tensors]
    skipped = [s for j in judged for s in j.examined.checkpoint.skipped]
    not_evaluated = dict.fromkeys(n for j in judged for n in j.not_evaluated)
    return Coverage(
        analyzed=len(refs),
        total=len(refs) + len(skipped),
        unit="tensors",
        bytes=sum(ref.nbytes for ref in refs),
        skipped=tuple(Skip(subject=s.subject, reason=s.reason) for s in skipped),
        not_evaluated=tuple(not_evaluated),
    )


def _overall(judged: Sequence[_Examination], tensors: Sequence[TensorResult]) -> Overall:
    pools = _pooled(judged)
    model = [pool for role, pool in pools.items() if role not in AUXILIARY]
    everything = None
    for pool in model:
        everything = pool if everything is None else everything.merge(pool)
    trained = [t for t in tensors if t.role not in AUXILIARY]
    return Overall(
        tensors=len(tensors),
        parameters=sum(t.numel for t in trained),
        statistics=None if everything is None else everything.statistics(),
        by_role={
            role: RolePool(tensors=pool.tensors, statistics=pool.statistics())
            for role, pool in pools.items()
        },
    )


def _pooled(judged: Sequence[_Examination]) -> dict[Role, Pool]:
    pools: dict[Role, Pool] = {}
    for name, pool in (item for j in judged for item in j.pools.items()):
        role = Role(name)
        pools[role] = pools[role].merge(pool) if role in pools else pool
    return pools
