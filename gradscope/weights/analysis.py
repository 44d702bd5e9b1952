"""``analyze_weights``: checkpoint -> statistics -> rules -> report."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gradscope.checkpoints.documents import folder_of
from gradscope.checkpoints.integrity import check_unchanged, verified
from gradscope.checkpoints.left_out import unread
from gradscope.checkpoints.open import open_checkpoint
from gradscope.checkpoints.tensors import Checkpoint, Skipped, TensorRef
from gradscope.checkpoints.tokenizer import tokens_beside
from gradscope.errors import UsageError
from gradscope.quantization.headers import told_by_headers
from gradscope.quantization.weights import Quantization
from gradscope.report.config import ConfigLike
from gradscope.report.model import Coverage, Finding, Input, InputFailure, Skip
from gradscope.report.request import Failures, Judged, Request, part_failures, requested
from gradscope.weights.adapter_config import described
from gradscope.weights.casting import Wanted, casting, wanted_casts, with_casts
from gradscope.weights.experts import concerns
from gradscope.weights.health import health, overall_health
from gradscope.weights.patterns import filtered, narrowed
from gradscope.weights.result import (
    Examined,
    Need,
    Overall,
    RolePool,
    TensorResult,
    WeightsReport,
    WeightsResult,
    header_result,
)
from gradscope.weights.roles import AUXILIARY, Role, roles
from gradscope.weights.tables import codebooks, table_rows

if TYPE_CHECKING:  # compiled kernels, which --headers-only has no use for
    from gradscope.statistics import Engine, Pool, Scan
    from gradscope.weights.measuring import Measured

Progress = Callable[[int, int], None]
#: Another look at the tensors of a checkpoint, which is asked for; told the bytes that are done.
Look = Callable[[Examined, "Engine[Any, Any]", Callable[[int], None]], Examined]


def analyze_weights(
    *checkpoints: str | Path,
    key: str | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    headers_only: bool = False,
    select: Sequence[str] = (),
    ignore: Sequence[str] = (),
    fail_on: str | None = None,
    allow_empty: bool = False,
    config: ConfigLike = None,
    baseline: str | Path | None = None,
    keep_going: bool = False,
    cast: Sequence[str] = (),
    snr: str | float | None = None,
    spectral: bool = False,
    norms_only: bool = False,
    bootstrap: int = 0,
    budget: str | float | None = None,
    device: str = "cpu",
    jobs: int | None = None,
    progress: Progress = lambda _done, _total: None,
) -> WeightsReport:
    """Diagnose one or more checkpoints.

    ``include`` and ``exclude`` are shell patterns of tensor names, ``key`` the dotted path of the
    nested dict that is the state dict, ``select`` and ``ignore`` rule codes, prefixes or names,
    ``config`` a configuration or its file, ``baseline`` the file of accepted findings.
    ``progress`` is called with bytes done and bytes in all. An input that cannot be read is an
    entry of ``errors``, never an exception; with ``keep_going`` the other shards of a checkpoint
    one of whose files fails while it is read are still analysed. ``cast`` are types that casting
    is measured to, ``snr`` the decibels that the best of them must keep. ``spectral`` computes the
    singular values of every matrix, within ``budget`` seconds if any, with ``norms_only`` the
    greatest alone; ``bootstrap`` many drawn sets test each fitted exponent.

    Raises UsageError for an unknown rule, key, device, severity or type.
    """
    request = requested(
        Examined,
        select=select,
        ignore=ignore,
        fail_on=fail_on,
        allow_empty=allow_empty,
        config=config,
        baseline=baseline,
        narrowed=narrowed(include, exclude),
    )
    casts = wanted_casts(cast, snr)
    looks = list(_looks(casts, spectral, device, norms_only, bootstrap, budget))
    if headers_only and looks:
        one = "--cast" if casts.targets else "--spectral"
        raise UsageError(f"{one} reads the data, which --headers-only does not: give one of them")
    opened: list[Checkpoint] = []
    failures = Failures()
    for path in checkpoints:
        with failures.caught():
            opened.append(filtered(open_checkpoint(str(path), key), include, exclude))
    if headers_only:
        examinations = [_headers(c) for c in opened]
    else:
        nbytes = sum(ref.nbytes for c in opened for ref in c.tensors)
        meter = _Meter(progress, (1 + len(looks)) * nbytes)
        examinations = _measure_all(opened, device, jobs, meter, keep_going, looks)
    return _report(request, [_judged(e, request) for e in examinations], failures, casts)


def _looks(
    casts: Wanted,
    spectral: bool,
    device: str,
    norms_only: bool,
    bootstrap: int,
    budget: str | float | None,
) -> Iterator[Look]:
    """What is asked for beside the statistics. Raises UsageError."""
    if casts.targets:
        yield partial(with_casts, wanted=casts)
    if spectral:
        from gradscope.weights.spectral import wanted_spectra, with_spectra

        wanted = wanted_spectra(device, norms_only, bootstrap, budget)
        yield partial(with_spectra, wanted=wanted)
        return
    given = {"--norms-only": norms_only, "--bootstrap": bootstrap, "--budget": budget is not None}
    for option in (name for name, is_given in given.items() if is_given):
        raise UsageError(f"{option} is about spectra: give --spectral as well")


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
    """One checkpoint examined, and judged once the rules were asked."""

    examined: Examined
    pools: Mapping[str, Pool]
    errors: tuple[InputFailure, ...]
    judged: Judged = field(default_factory=Judged)


def _headers(checkpoint: Checkpoint) -> _Examination:
    weights = told_by_headers(checkpoint)
    values = {name: weight.values for name, weight in weights.items()}
    names = roles(values.get(ref.name) or ref for ref in checkpoint.tensors)
    tensors = tuple(
        header_result(ref, names[ref.name], checkpoint.path, weights.get(ref.name))
        for ref in checkpoint.tensors
    )
    examined = Examined(checkpoint, tensors, frozenset({Need.HEADERS}))
    examined = replace(examined, adapters=described(examined))
    return _Examination(examined, {}, tuple(part_failures(checkpoint.path, unread(checkpoint))))


def _measure_all(
    opened: Sequence[Checkpoint],
    device: str,
    jobs: int | None,
    meter: Callable[[int], None],
    keep_going: bool,
    looks: Sequence[Look],
) -> list[_Examination]:
    from gradscope.statistics import scan_for, threads

    scan = scan_for(device)
    return [_measured(c, scan, threads(jobs), meter, keep_going, looks) for c in opened]


def _measured(
    checkpoint: Checkpoint,
    scan: Scan,
    engine: Engine[Any, Any],
    meter: Callable[[int], None],
    keep_going: bool,
    looks: Sequence[Look],
) -> _Examination:
    from gradscope.quantization.recognise import recognise
    from gradscope.statistics import profile
    from gradscope.weights.masters import compare_masters
    from gradscope.weights.measuring import examined, measure

    checkpoint = verified(checkpoint, engine)
    failures = Failures()
    run = partial(profile, engine=engine, scan=scan, progress=meter)
    document = checkpoint.metadata.get("config")
    config = document if isinstance(document, Mapping) else {}
    quantization = Quantization()
    with failures.caught():
        quantization = recognise(checkpoint)

    def measured(refs: Sequence[TensorRef]) -> Measured:
        found = measure(checkpoint.tensors, refs, quantization, config, run)
        for path in {ref.file for ref in refs}:
            check_unchanged(path, checkpoint.stamps[path])
        return found

    refs, result = _read(checkpoint.tensors, measured, failures, keep_going)
    checkpoint = _without_unread(checkpoint, refs, failures)
    seen = examined(checkpoint, quantization, result)
    with failures.caught():
        for look in looks:
            seen = look(seen, engine, meter)
        seen = replace(_read_again(seen, engine), masters=compare_masters(refs))
    lost = unread(checkpoint, failed=bool(failures))
    errors = (*part_failures(checkpoint.path, lost), *failures)
    return _Examination(seen, result.pools, errors)


def _with_tables(examined: Examined, engine: Engine[Any, Any]) -> Examined:
    """What a second look at the tables shows, with the names of tokens where there is any."""
    refs = {ref.name: ref for ref in examined.checkpoint.tensors}
    folder = folder_of(examined.checkpoint)
    tables = table_rows(refs, examined.tensors, folder, engine)
    return replace(
        examined,
        tables=tables,
        codebooks=codebooks(refs, examined.tensors),
        tokens=tokens_beside(folder) if tables else {},
    )


def _read_again(examined: Examined, engine: Engine[Any, Any]) -> Examined:
    """With what needs another look: tables of tokens and of indices, the products of adapters.

    Raises InputError when a file changed meanwhile.
    """
    from gradscope.weights.indices import index_results
    from gradscope.weights.products import with_products

    checkpoint = examined.checkpoint
    examined = replace(examined, adapters=described(examined))
    examined = replace(
        _with_tables(examined, engine),
        adapters=with_products(examined, engine),
        indices=tuple(index_results(checkpoint.tensors)),
    )
    for path in {ref.file for ref in checkpoint.tensors}:
        check_unchanged(path, checkpoint.stamps[path])
    return examined


def _read(
    refs: Sequence[TensorRef],
    measure: Callable[[Sequence[TensorRef]], Measured],
    failures: Failures,
    keep_going: bool,
) -> tuple[Sequence[TensorRef], Measured]:
    """What could be measured, and of which tensors.

    A file that fails meanwhile costs its tensors, and without ``keep_going`` those of the whole
    checkpoint. Each failure leaves out a file, so there are at most as many as files.
    """
    for _ in {ref.file for ref in refs}:
        with failures.caught():
            return refs, measure(refs)
        failed = failures[-1].input
        refs = [ref for ref in refs if ref.file != failed] if keep_going else []
    return [], measure([])


def _without_unread(
    checkpoint: Checkpoint, read: Sequence[TensorRef], failures: Sequence[InputFailure]
) -> Checkpoint:
    if not failures:
        return checkpoint
    kept = set(read)
    reason = f"not read: {failures[0].input} failed ({failures[0].kind})"
    lost = tuple(Skipped(ref.name, reason) for ref in checkpoint.tensors if ref not in kept)
    return replace(checkpoint, tensors=tuple(read), skipped=(*checkpoint.skipped, *lost))


def _judged(examination: _Examination, request: Request) -> _Examination:
    """Ask the rules, and give each tensor the health that its findings leave."""
    examined = examination.examined
    judged = request.judged(examined, examined.checkpoint.path)
    by_subject: dict[str, list[Finding]] = defaultdict(list)
    for finding in judged.findings:
        by_subject[finding.subject].append(finding)
    of_experts = [f for f in judged.findings if f.name == "dead-expert"]
    measured = Need.STATISTICS in examined.measured
    tensors = tuple(
        _with_health(t, by_subject[t.name] + [f for f in of_experts if concerns(f, t.name)])
        if measured and t.numel
        else t
        for t in examined.tensors
    )
    return replace(examination, examined=replace(examined, tensors=tensors), judged=judged)


def _with_health(tensor: TensorResult, findings: Sequence[Finding]) -> TensorResult:
    if tensor.statistics is None and not findings:
        return tensor
    return tensor.model_copy(update={"health": health(findings)})


def _report(
    request: Request,
    examinations: Sequence[_Examination],
    failures: Sequence[InputFailure],
    casts: Wanted,
) -> WeightsReport:
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


def _result(examinations: Sequence[_Examination], casts: Wanted, complete: bool) -> WeightsResult:
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


def _beside(examinations: Iterable[_Examination]) -> Iterator[tuple[str, str]]:
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


def _overall(examinations: Sequence[_Examination], tensors: Sequence[TensorResult]) -> Overall:
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


def _pooled(examinations: Sequence[_Examination]) -> dict[Role, Pool]:
    pools: dict[Role, Pool] = {}
    for name, pool in (item for e in examinations for item in e.pools.items()):
        role = Role(name)
        pools[role] = pools[role].merge(pool) if role in pools else pool
    return pools
