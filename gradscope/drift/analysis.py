"""``analyze_drift``: two checkpoints -> pairs -> measures -> explanations -> rules -> report."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gradscope.checkpoints.open import open_checkpoint
from gradscope.checkpoints.tensors import Checkpoint
from gradscope.drift.examining import Found, Progress, compared, headers_of, unchanged
from gradscope.drift.expectations import (
    Expectations,
    check_patterns,
    expectations,
    names_of,
)
from gradscope.drift.result import Drifted, DriftReport
from gradscope.errors import UsageError
from gradscope.report.config import ConfigLike
from gradscope.report.model import Coverage, Input, Skip
from gradscope.report.request import Failures, requested
from gradscope.statistics import engine_for
from gradscope.weights.patterns import filtered, narrowed
from gradscope.weights.shares import Share, share

if TYPE_CHECKING:
    from gradscope.statistics import Engine


def analyze_drift(
    base: str | Path,
    new: str | Path,
    *later: str | Path,
    key: str | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    headers_only: bool = False,
    parents: Sequence[str | Path] = (),
    expect: str | None = None,
    adapter: str | Path | Sequence[str | Path] = (),
    expect_frozen: Sequence[str] = (),
    expect_changed: Sequence[str] = (),
    max_drift: Mapping[str, float] | None = None,
    select: Sequence[str] = (),
    ignore: Sequence[str] = (),
    fail_on: str | None = None,
    allow_empty: bool = False,
    config: ConfigLike = None,
    baseline: str | Path | None = None,
    shard: str | None = None,
    keep_going: bool = False,
    engine: str = "local",
    jobs: int | None = None,
    progress: Progress = lambda _done, _total: None,
) -> DriftReport:
    """What changed from one checkpoint to another, how much, and why.

    Of more than two checkpoints, in the order of the steps in their names, the first and the last
    are compared, and ``result.series`` has the way of each layer through all of them.
    ``include`` and ``exclude`` are shell patterns of tensor names, ``key`` the dotted path of the
    nested dict that is the state dict of either, ``select`` and ``ignore`` rule codes, prefixes or
    names, ``config`` a configuration or its file, ``baseline`` the file of accepted findings.
    ``parents`` are checkpoints that the new one may be mixed from, beside the base: the weight of
    each is fitted. ``expect`` is ``identical``, ``merge`` (of the ``adapter`` at a path, of several
    in turn, or of the parents), ``quantised`` or ``converted``; ``expect_frozen`` and
    ``expect_changed`` are patterns of tensors whose bits must be the same, or must not;
    ``max_drift`` is the greatest relative drift by role (``*`` for all).
    ``engine`` is ``local``, the threads of this process, or ``ray``, the cluster that Ray is
    connected to. ``progress`` is called with bytes done and bytes in all. An input that cannot be
    read is an entry of ``errors``, never an exception; with ``keep_going`` a file that fails while
    it is read costs its tensors alone. ``shard`` (``0/4`` to ``3/4``) compares only a share of the
    tensors, for a partial report that ``merge`` joins with the others.

    Raises UsageError for an unknown rule, key, severity or role, for a pattern of what to expect
    that matches no tensor, for expectations of values where only headers are read, and for a shard
    that there is not.
    """
    adapters = [adapter] if isinstance(adapter, str | Path) else list(adapter)
    asked = expectations(
        expect, expect_frozen, expect_changed, max_drift or {}, bool(adapters), bool(parents)
    )
    if headers_only and (asked or parents or later):
        what = "series" if later else "mix" if parents else "expectation"
        raise UsageError(f"--headers-only reads no values, without which no {what} can be judged")
    part = None if shard is None else _part(shard, headers_only, keep_going)
    run = engine_for(engine, jobs)
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
    failures = Failures()

    def opened(path: str | Path) -> Checkpoint | None:
        with failures.caught():
            return filtered(open_checkpoint(str(path), key), include, exclude)
        return None

    paths = _ordered(base, new, *later)
    series = [c for c in map(opened, paths) if c is not None]
    labels = _labels(parents)
    mixed = {label: c for label, p in labels if (c := opened(p)) is not None}
    if len(series) < 2 or len(mixed) < len(labels):
        found = Found(tuple(series))
    elif headers_only:
        found = headers_of(*series)
    else:
        found = compared(
            series[0], series[-1], failures, engine=run, parents=mixed, part=part,
            keep_going=keep_going, progress=progress,
        )  # fmt: skip
    if part is not None:
        from gradscope.drift.parts import Job, partial_report

        options: dict[str, Any] = {
            "base": str(base),
            "new": [str(new), *map(str, later)],
            "key": key,
            "include": list(include),
            "exclude": list(exclude),
            "parents": list(map(str, parents)),
            "expect": expect,
            "adapter": list(map(str, adapters)),
            "expect_frozen": list(expect_frozen),
            "expect_changed": list(expect_changed),
            "max_drift": dict(max_drift or {}),
        }
        job = Job(part, options, series, list(mixed.values()), list(map(str, adapters)))
        return partial_report(request, job, found, asked, failures, run)
    if len(series) > 2:
        found = _with_series(found, series, failures, run)
    drifted = _drifted(paths[0], paths[-1], found, asked, failures, adapters)
    return request.report(
        DriftReport,
        drifted.result if drifted is not None else None,
        inputs=(
            Input(path=c.path, format=c.format, bytes=c.nbytes) for c in (*series, *mixed.values())
        ),
        coverage=_coverage(found),
        judged=[request.judged(drifted, paths[-1])] if drifted is not None else [],
        errors=found.errors(failures),
    )


def _part(shard: str, headers_only: bool, keep_going: bool) -> Share:
    """Raises UsageError for a share that there is not, and for what jobs cannot do alike."""
    part = share(shard)
    if headers_only:
        raise UsageError(
            "--shard shares out the data, which --headers-only does not read: give one of them"
        )
    if keep_going:
        raise UsageError(
            "--keep-going leaves out what one job cannot read, which the others do not know: give "
            "it or --shard"
        )
    return part


def _ordered(*paths: str | Path) -> list[str]:
    """Two as they were given, more by the steps in their names."""
    given = [str(path) for path in paths]
    if len(given) == 2:
        return given
    from gradscope.drift.ordering import in_order

    return in_order(given)


def _labels(parents: Sequence[str | Path]) -> list[tuple[str, str]]:
    """What each parent is called, and its path: by its name alone where no other has it."""
    paths = list(dict.fromkeys(map(str, parents)))
    names = [os.path.basename(os.path.abspath(path)) for path in paths]
    many = Counter(names)
    return [(n if many[n] == 1 else path, path) for n, path in zip(names, paths, strict=True)]


def _with_series(
    found: Found, series: Sequence[Checkpoint], failures: Failures, run: Engine[Any, Any]
) -> Found:
    from gradscope.drift.series import trajectories, ways

    if found.result is None:
        return found
    with failures.caught():
        paths = trajectories(ways(series, run), [c.path for c in series])
        for checkpoint in series:
            unchanged(checkpoint)
        return replace(found, result=found.result.model_copy(update={"series": paths}))
    return found


def _drifted(
    base: str,
    new: str,
    found: Found,
    asked: Expectations,
    failures: Failures,
    adapters: Sequence[str | Path],
) -> Drifted | None:
    """What the rules see: with what was expected, and how adapters were merged."""
    if found.result is None:
        return None
    names = (name for t in found.result.tensors for name in names_of(t))
    check_patterns(asked, chain(names, found.lost))
    result = found.result
    if adapters:
        from gradscope.drift.merging import merges

        with failures.caught():
            done = tuple(m for m in merges(found.seen, list(map(str, adapters))) if m is not None)
            asked, result = replace(asked, merges=done), result.model_copy(update={"merges": done})
    return Drifted(base, new, result, found.measured, asked)


def _coverage(found: Found) -> Coverage:
    skipped = [s for c in found.checkpoints for s in c.skipped]
    total = len(found.result.tensors) if found.result is not None else 0
    return Coverage(
        analyzed=len(found.seen),
        total=total + len(skipped),
        unit="tensors",
        bytes=sum(ref.nbytes for c in found.checkpoints for ref in c.tensors),
        skipped=tuple(Skip(subject=s.subject, reason=s.reason) for s in skipped),
    )
