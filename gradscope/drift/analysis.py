"""``analyze_drift``: two checkpoints -> pairs -> measures -> explanations -> rules -> report."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gradscope.checkpoints.integrity import check_unchanged, verified
from gradscope.checkpoints.left_out import unread
from gradscope.checkpoints.open import open_checkpoint
from gradscope.checkpoints.tensors import Checkpoint, TensorRef
from gradscope.drift.expectations import Expectations, check_patterns, expectations
from gradscope.drift.matching import Matched, Matching, matched, renamed
from gradscope.drift.result import Drifted, DriftReport, DriftResult, Explanation, Need, TensorDrift
from gradscope.errors import UsageError
from gradscope.report.config import ConfigLike
from gradscope.report.model import Coverage, Input, Skip
from gradscope.report.request import Failures, part_failures, requested
from gradscope.report.severity import Severity
from gradscope.weights.names import block_of
from gradscope.weights.patterns import filtered, narrowed
from gradscope.weights.roles import AUXILIARY, TRAINING, Role, roles

if TYPE_CHECKING:  # compiled kernels, which --headers-only has no use for
    from gradscope.drift.describing import Seen
    from gradscope.drift.logical import Logical
    from gradscope.statistics import Engine

Progress = Callable[[int, int], None]


def analyze_drift(
    base: str | Path,
    new: str | Path,
    *later: str | Path,
    key: str | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    headers_only: bool = False,
    expect: str | None = None,
    adapter: str | Path | None = None,
    expect_frozen: Sequence[str] = (),
    expect_changed: Sequence[str] = (),
    max_drift: Mapping[str, float] | None = None,
    select: Sequence[str] = (),
    ignore: Sequence[str] = (),
    fail_on: str | None = None,
    allow_empty: bool = False,
    config: ConfigLike = None,
    baseline: str | Path | None = None,
    jobs: int | None = None,
    progress: Progress = lambda _done, _total: None,
) -> DriftReport:
    """What changed from one checkpoint to another, how much, and why.

    Of more than two checkpoints, in the order of the steps in their names, the first and the last
    are compared, and ``result.series`` has the way of each layer through all of them.
    ``include`` and ``exclude`` are shell patterns of tensor names, ``key`` the dotted path of the
    nested dict that is the state dict of either, ``select`` and ``ignore`` rule codes, prefixes or
    names, ``config`` a configuration or its file, ``baseline`` the file of accepted findings.
    ``expect`` is ``identical``, ``merge`` (of the ``adapter`` at a path), ``quantised`` or
    ``converted``; ``expect_frozen`` and ``expect_changed`` are patterns of tensors whose bits must
    be the same, or must not; ``max_drift`` is the greatest relative drift by role (``*`` for all).
    ``progress`` is called with bytes done and bytes in all. An input that cannot be read is an
    entry of ``errors``, never an exception.

    Raises UsageError for an unknown rule, key, severity or role, for a pattern of what to expect
    that matches no tensor, and for expectations of values where only headers are read.
    """
    asked = expectations(expect, expect_frozen, expect_changed, max_drift or {}, adapter)
    if asked and headers_only:
        raise UsageError("--headers-only reads no values: what is expected cannot be checked")
    request = requested(
        Drifted,
        select=select,
        ignore=ignore,
        fail_on=fail_on,
        allow_empty=allow_empty,
        config=config,
        baseline=baseline,
        narrowed=narrowed(include, exclude),
    )
    if later and headers_only:
        raise UsageError("--headers-only reads no values: a series has no trajectory")
    failures = Failures()
    opened: list[Checkpoint] = []
    paths = _ordered(base, new, *later)
    for path in paths:
        with failures.caught():
            opened.append(filtered(open_checkpoint(path, key), include, exclude))
    found = _Found(tuple(opened))
    if len(opened) >= 2:
        with failures.caught():
            first, *between, second = opened
            found = (
                _headers(first, second)
                if headers_only
                else _compared(first, second, jobs, progress)
            )
            if between:
                found = _with_series(found, opened, jobs)
    drifted = _drifted(paths[0], paths[-1], found, asked, failures, adapter)
    errors = [
        *failures,
        *(e for c in found.checkpoints for e in part_failures(c.path, unread(c, bool(failures)))),
    ]
    return request.report(
        DriftReport,
        drifted.result if drifted is not None else None,
        inputs=(Input(path=c.path, format=c.format, bytes=c.nbytes) for c in opened),
        coverage=_coverage(found),
        judged=[request.judged(drifted, paths[-1])] if drifted is not None else [],
        errors=errors,
    )


def _ordered(*paths: str | Path) -> list[str]:
    """Two as they were given, more by the steps in their names."""
    given = [str(path) for path in paths]
    if len(given) == 2:
        return given
    from gradscope.drift.series import in_order

    return in_order(given)


def _with_series(found: _Found, opened: Sequence[Checkpoint], jobs: int | None) -> _Found:
    from gradscope.drift.series import trajectories
    from gradscope.statistics import threads

    assert found.result is not None
    paths = trajectories(opened, threads(jobs))
    for checkpoint in opened:
        for path in {ref.file for ref in checkpoint.tensors}:
            check_unchanged(path, checkpoint.stamps[path])
    return replace(found, result=found.result.model_copy(update={"series": paths}))


def _drifted(
    base: str,
    new: str,
    found: _Found,
    asked: Expectations,
    failures: Failures,
    adapter: str | Path | None,
) -> Drifted | None:
    """What the rules see: with what was expected, and how the adapter was merged."""
    if found.result is None:
        return None
    check_patterns(asked, found.result.tensors)
    result = found.result
    if adapter is not None:
        from gradscope.drift.merging import merges

        with failures.caught():
            done = tuple(merges(found.seen, str(adapter)))
            asked, result = replace(asked, merges=done), result.model_copy(update={"merges": done})
    return Drifted(base, new, result, found.measured, asked)


@dataclass(frozen=True)
class _Found:
    """What was found of two checkpoints, or of the one that could be opened."""

    checkpoints: tuple[Checkpoint, ...]
    result: DriftResult | None = None
    seen: Sequence[Seen] = ()
    measured: frozenset[Need] = field(default_factory=frozenset)


def _coverage(found: _Found) -> Coverage:
    skipped = [s for c in found.checkpoints for s in c.skipped]
    total = len(found.result.tensors) if found.result is not None else 0
    return Coverage(
        analyzed=len(found.seen),
        total=total + len(skipped),
        unit="tensors",
        bytes=sum(ref.nbytes for c in found.checkpoints for ref in c.tensors),
        skipped=tuple(Skip(subject=s.subject, reason=s.reason) for s in skipped),
    )


# -- headers ---------------------------------------------------------------------------------------


def _headers(base: Checkpoint, new: Checkpoint) -> _Found:
    from gradscope.drift.describing import Seen

    names = _roles(base.tensors, new.tensors)
    matching = matched(base.tensors, new.tensors)
    seen = [Seen(m.base, m.new, names[m.new.name]) for m in matching.pairs]
    result = _result(base, new, matching, seen, names, {})
    return _Found((base, new), result, seen, frozenset({Need.HEADERS}))


def _roles(base: Sequence[TensorRef], new: Sequence[TensorRef]) -> Mapping[str, Role]:
    return roles(base) | roles(new)


# -- values ----------------------------------------------------------------------------------------


def _compared(base: Checkpoint, new: Checkpoint, jobs: int | None, progress: Progress) -> _Found:
    """Raises InputError when a file changes or ends while it is read."""
    from gradscope.drift.logical import logical
    from gradscope.statistics import threads

    engine = threads(jobs)
    base, new = verified(base, engine), verified(new, engine)
    here, there = logical(base), logical(new)
    matching = matched(here.tensors, there.tensors)
    matching = renamed(matching, here.tensors, there.tensors, _Content(engine))
    names = _roles(here.tensors, there.tensors)
    seen = _seen(matching.pairs, (here, there), names, engine, progress)
    why = _tied(matching, here.tensors, there.tensors, _Content(engine))
    for checkpoint in (base, new):
        for path in {ref.file for ref in checkpoint.tensors}:
            check_unchanged(path, checkpoint.stamps[path])
    result = _result(base, new, matching, seen, names, why)
    return _Found((base, new), result, seen, frozenset({Need.HEADERS, Need.VALUES}))


@dataclass(frozen=True)
class _Content:
    """A tensor's content hash, None where it has none."""

    engine: Engine[Any, Any]

    def __call__(self, ref: TensorRef) -> str | None:
        from gradscope.statistics import profile

        return profile([ref], engine=self.engine).tensors[0].content_hash


def _seen(
    pairs: Sequence[Matched],
    sides: tuple[Logical, Logical],
    names: Mapping[str, Role],
    engine: Engine[Any, Any],
    progress: Progress,
) -> list[Seen]:
    from gradscope.drift.comparing import Pair, compare
    from gradscope.drift.describing import Seen

    alike = [m for m in pairs if m.base.shape == m.new.shape]
    total = sum(m.base.nbytes + m.new.nbytes for m in alike)
    done = 0

    def tick(amount: int) -> None:
        nonlocal done
        done += amount
        progress(done, total)

    found = compare([Pair(m.base, m.new) for m in alike], engine, tick)
    measured = {m.new.name: measures for m, measures in zip(alike, found, strict=True)}
    seen = [Seen(m.base, m.new, names[m.new.name], measured.get(m.new.name)) for m in pairs]
    here, there = sides
    weights = {**here.quantized, **there.quantized}
    tasks = ((s, weights.get(s.new.name) or weights.get(s.base.name)) for s in seen)
    return list(engine(_explained, tasks))


def _explained(task: tuple[Seen, Any]) -> Seen:
    from gradscope.drift.explanations import Subject, explained, reshaped

    seen, quantized = task
    if seen.measures is None:
        return replace(seen, explanation=reshaped(seen.base, seen.new))
    trained = seen.role not in AUXILIARY
    subject = Subject(seen.base, seen.new, seen.measures, quantized, trained)
    return replace(seen, explanation=explained(subject))


def _tied(
    matching: Matching,
    here: Sequence[TensorRef],
    there: Sequence[TensorRef],
    content: Callable[[TensorRef], str | None],
) -> dict[str, Explanation]:
    """Tensors that only one has and that equal another one there: stored once, or twice."""
    why: dict[str, Explanation] = {}
    for alone, refs, how in (
        (matching.removed, here, "is stored only there now"),
        (matching.added, there, "was tied to it"),
    ):
        for ref in alone:
            alike = [
                r for r in refs if (r.dtype, r.shape) == (ref.dtype, ref.shape) and r is not ref
            ]
            own = content(ref) if alike and len(ref.shape) > 1 else None
            other = next((r for r in alike if own is not None and content(r) == own), None)
            if other is not None:
                text = f"equals {other.name}: {how}"
                why[ref.name] = Explanation(kind="tied", text=text, residual=0.0)
    return why


# -- the result ------------------------------------------------------------------------------------


def _result(
    base: Checkpoint,
    new: Checkpoint,
    matching: Matching,
    seen: Sequence[Seen],
    names: Mapping[str, Role],
    why: Mapping[str, Explanation],
) -> DriftResult:
    from gradscope.drift.describing import module_of, pools

    tensors = tuple(_rows(base, new, matching, seen, names, why))
    model = [s for s in seen if s.role not in AUXILIARY and s.measures is not None]
    drifts = [
        (s.measures.numel, s.measures.relative_drift)
        for s in model
        if s.measures is not None and s.measures.relative_drift is not None
    ]
    numel = sum(n for n, _ in drifts)
    greatest = max((d for _, d in drifts), default=None)
    return DriftResult(
        tensors=tensors,
        mean_drift=math.fsum(n * d for n, d in drifts) / numel if numel else None,
        max_drift=greatest,
        severity=max((t.severity for t in tensors), key=lambda s: s.rank, default=Severity.INFO),
        affected_layers=tuple(dict.fromkeys(module_of(t.name) for t in tensors if t.affected)),
        counts=dict(Counter(t.status or "not compared" for t in tensors if t.role not in TRAINING)),
        by_role=pools((s.role, s) for s in seen if s.measures is not None),
        by_block=pools((b, s) for s in model if (b := block_of(s.new.name)) is not None),
        notes=(*base.notes, *(n for n in new.notes if n not in base.notes), *matching.notes),
    )


def _rows(
    base: Checkpoint,
    new: Checkpoint,
    matching: Matching,
    seen: Sequence[Seen],
    names: Mapping[str, Role],
    why: Mapping[str, Explanation],
) -> Iterator[TensorDrift]:
    """Tensors in the base's order, then what was added."""
    from gradscope.drift.describing import alone, drift_of

    both = {s.base.name: s for s in seen}
    removed = {ref.name: ref for ref in matching.removed}
    order = {ref.name: place for place, ref in enumerate(base.tensors)}
    for name in sorted((*both, *removed), key=lambda n: order.get(n, len(order))):
        if name in both:
            yield drift_of(both[name], new.path)
        else:
            ref = removed[name]
            yield alone(ref, names[name], base.path, "removed", why.get(name))
    for ref in matching.added:
        yield alone(ref, names[ref.name], new.path, "added", why.get(ref.name))
