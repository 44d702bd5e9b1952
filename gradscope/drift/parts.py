"""The report of one of several jobs, and what makes one run of their parts.

All jobs match the same tensors alike and compare their share of the pairs. What rests on all of
them (rules, sums over roles and blocks, the way of a layer) waits for ``merge``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from gradscope.checkpoints.open import open_checkpoint
from gradscope.checkpoints.tensors import Checkpoint, TensorRef
from gradscope.drift.assembling import Known, entries, summed
from gradscope.drift.describing import Seen, drift_of
from gradscope.drift.examining import Found, Shared, unchanged
from gradscope.drift.expectations import Expectations, check_patterns, expectations
from gradscope.drift.matching import Matched
from gradscope.drift.measures import Measures
from gradscope.drift.merging import merges
from gradscope.drift.ordering import in_order
from gradscope.drift.result import Drifted, DriftReport, DriftResult, Merge, Need, TensorDrift
from gradscope.drift.series import Way, trajectories, ways
from gradscope.errors import InputError
from gradscope.report.config import ConfigLike
from gradscope.report.model import Coverage, Input, NotEvaluated, Skip
from gradscope.report.partial import Part, PartialReport, damaged, unpacked
from gradscope.report.request import Failures, Judged, Request, requested
from gradscope.statistics.engine import Engine
from gradscope.weights.patterns import narrowed
from gradscope.weights.roles import TRAINING
from gradscope.weights.sealing import WAITING, asked_of, sealed
from gradscope.weights.shares import Share


class _Facts(BaseModel):
    """Base of what is packed."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Row(_Facts):
    """Of a row in the report of a job: its place in the whole, and what sums are made of.

    ``pair`` is the place among all pairs, None of what has no partner of its shape.
    """

    place: int
    pair: int | None = None
    numel: int = 0
    changed: int = 0
    sums: tuple[float, ...] = ()


class State(_Facts):
    """What a partial report carries beside its rows, which are in the same order."""

    #: Of all tensors of both checkpoints; and the paths of those that could be opened, in order.
    bytes: int
    series: tuple[str, ...]
    rows: tuple[Row, ...] = ()
    #: By their places, rows as they are where a matrix of the whole is unrelated to the base's.
    elsewhere: Mapping[int, TensorDrift] = {}
    #: By the place among all that adapters change; None where none were given, or could be read.
    merges: Mapping[int, Merge] | None = None
    #: None where there is no series, or where it could not be read.
    ways: tuple[Way, ...] | None = None


# -- a part written -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """One of several: its share, what all were asked for, and what they opened."""

    share: Share
    options: Mapping[str, Any]
    series: Sequence[Checkpoint]
    parents: Sequence[Checkpoint]
    adapters: Sequence[str]

    @property
    def opened(self) -> list[Checkpoint]:
        """Every checkpoint that there is, adapters too."""
        found = [*self.series, *self.parents]
        for path in self.adapters:
            with suppress(InputError):  # of which the errors tell
                found.append(open_checkpoint(path))
        return found


def partial_report(
    request: Request,
    job: Job,
    found: Found,
    asked: Expectations,
    failures: Failures,
    engine: Engine[Any, Any],
) -> DriftReport:
    """The report of one job, with what the others' parts are joined by.

    Raises UsageError for a pattern that matches none of all tensors.
    """
    state = State(bytes=_bytes(found.checkpoints), series=tuple(c.path for c in job.series))
    result, shared, total = found.result, found.share, 0
    if result is not None and shared is not None:
        whole = entries(found.checkpoints[0], shared.matching)
        names = (name for entry in whole for name in _names(entry))
        check_patterns(asked, chain(names, found.lost))
        total = len(whole)
        state = _state(state, found, shared, job, failures, engine)
        result = result.model_copy(update={"merges": tuple((state.merges or {}).values())})
    said = asked_of(request, job.share, total > 0).report(
        DriftReport,
        result,
        inputs=(
            Input(path=c.path, format=c.format, bytes=c.nbytes) for c in (*job.series, *job.parents)
        ),
        coverage=_coverage(found, total),
        judged=[_waiting(request)] if result is not None else [],
        errors=found.errors(failures),
    )
    kind = PartialReport[DriftResult]
    return sealed(kind, said, job.share, job.options, job.opened, state)


def _bytes(checkpoints: Iterable[Checkpoint]) -> int:
    return sum(ref.nbytes for c in checkpoints for ref in c.tensors)


def _coverage(found: Found, total: int) -> Coverage:
    skipped = [s for c in found.checkpoints for s in c.skipped]
    return Coverage(
        analyzed=len(found.seen),
        total=total + len(skipped),
        unit="tensors",
        bytes=sum(s.base.nbytes + s.new.nbytes for s in found.seen),
        skipped=tuple(Skip(subject=s.subject, reason=s.reason) for s in skipped),
    )


def _waiting(request: Request) -> Judged:
    """No rule can say anything of a part: each looks at what became of the whole."""
    return Judged(
        not_evaluated=tuple(NotEvaluated(rule=r.name, reason=WAITING) for r in request.rules)
    )


def _names(entry: Matched | TensorRef) -> tuple[str, ...]:
    return (entry.new.name, entry.base.name) if isinstance(entry, Matched) else (entry.name,)


def _state(
    state: State, found: Found, shared: Shared, job: Job, failures: Failures,
    engine: Engine[Any, Any],
) -> State:  # fmt: skip
    base, new = found.checkpoints
    mine = {s.new.name: s for s in found.seen}
    rows = list(_rows(base, shared, mine, first=job.share.index == 0))
    places = {name: row.place for name, row in rows if name in shared.elsewhere}
    update: dict[str, Any] = {
        "rows": tuple(row for _, row in rows),
        "elsewhere": {
            place: drift_of(shared.elsewhere[name], new.path) for name, place in places.items()
        },
    }
    if job.adapters:
        with failures.caught():
            update["merges"] = dict(_merges(shared, mine, job))
    if len(job.series) > 2:
        with failures.caught():
            update["ways"] = tuple(ways(job.series, engine, job.share))
            for checkpoint in job.series:
                unchanged(checkpoint)
    return state.model_copy(update=update)


def _rows(
    base: Checkpoint, shared: Shared, mine: Mapping[str, Seen], first: bool
) -> Iterator[tuple[str, Row]]:
    """Of each row of a job's report, in its order."""
    pairs = {m.new.name: place for place, m in enumerate(shared.matching.pairs)}
    for place, entry in enumerate(entries(base, shared.matching)):
        name = _names(entry)[0]
        if not isinstance(entry, Matched):
            if first:
                yield name, Row(place=place)
        elif (seen := mine.get(name)) is not None:
            yield name, _row(place, pairs[name], seen.measures)


def _row(place: int, pair: int, m: Measures | None) -> Row:
    if m is None:
        return Row(place=place, pair=pair)
    return Row(place=place, pair=pair, numel=m.numel, changed=m.changed, sums=m.sums)


def _merges(shared: Shared, mine: Mapping[str, Seen], job: Job) -> Iterator[tuple[int, Merge]]:
    """What adapters made of a job's weights; what is no weight's is the first one's."""
    known = shared.matching.pairs
    seen = [mine.get(m.new.name) or Seen(m.base, m.new, shared.names[m.new.name]) for m in known]

    def wanted(target: Seen | None) -> bool:
        return job.share.index == 0 if target is None else target.new.name in mine

    for place, merge in enumerate(merges(seen, job.adapters, wanted)):
        if merge is not None:
            yield place, merge


# -- the parts joined -----------------------------------------------------------------------------


def merged(
    parts: Sequence[Part],
    *,
    select: Sequence[str] = (),
    ignore: Sequence[str] = (),
    fail_on: str | None = None,
    allow_empty: bool = False,
    config: ConfigLike = None,
    baseline: str | Path | None = None,
) -> DriftReport:
    """The report of one run, of all its parts in order.

    Raises InputError for a part that is damaged, UsageError as ``analyze_drift`` does.
    """
    options, first = parts[0].partial.options, parts[0].report
    request = requested(
        Drifted,
        select=select,
        ignore=ignore,
        fail_on=fail_on,
        allow_empty=allow_empty,
        config=config,
        baseline=baseline,
        narrowed=narrowed(options["include"], options["exclude"]),
    )
    states = [_read(part) for part in parts]
    result = _joined(parts, states)
    coverage = first.coverage.model_copy(
        update={"analyzed": 0, "total": len(first.coverage.skipped), "bytes": states[0].bytes}
    )
    if result is not None:
        seen = sum(part.report.coverage.analyzed for part in parts)
        coverage = coverage.model_copy(
            update={"analyzed": seen, "total": coverage.total + len(result.tensors)}
        )
    drifted = _drifted(result, states, options)
    return request.report(
        DriftReport,
        drifted.result if drifted is not None else None,
        inputs=first.inputs,
        coverage=coverage,
        judged=[request.judged(drifted, drifted.new)] if drifted is not None else [],
        errors=list(dict.fromkeys(error for part in parts for error in part.report.errors)),
    )


def _read(part: Part) -> State:
    try:
        state = State.model_validate(unpacked(part))
    except ValidationError as error:
        raise damaged(part, "it is not what this version writes") from error
    result = part.report.result
    if result is not None and len(result.tensors) != len(state.rows):
        raise damaged(part, "it is not of these tensors")
    return state


def _joined(parts: Sequence[Part], states: Sequence[State]) -> DriftResult | None:
    """The rows of all jobs, and what they come to; None where one of them has none."""
    results: list[DriftResult] = [p.report.result for p in parts if p.report.result is not None]
    if len(results) < len(parts):
        return None
    found = {
        row.place: (row, tensor)
        for result, state in zip(results, states, strict=True)
        for tensor, row in zip(result.tensors, state.rows, strict=True)
    }
    if sorted(found) != [*range(len(found))] or len(found) < sum(len(s.rows) for s in states):
        raise damaged(parts[0], "together with the others it has not every tensor once")
    tensors = {place: tensor for place, (_, tensor) in found.items()}
    if any(map(_unrelated, tensors.values())):
        tensors |= {place: row for state in states for place, row in state.elsewhere.items()}
    known = sorted(
        (
            (row.pair, place)
            for place, (row, _) in found.items()
            if row.pair is not None and row.sums
        )
    )
    return summed(
        [tensors[place] for place in sorted(tensors)],
        [_known(tensors[place], found[place][0]) for _, place in known],
        results[0].notes,
    )


def _unrelated(tensor: TensorDrift) -> bool:
    kind = tensor.explanation.kind if tensor.explanation is not None else None
    return kind == "misplaced" or (kind == "re-initialised" and tensor.role not in TRAINING)


def _known(tensor: TensorDrift, row: Row) -> Known:
    measures = Measures(row.numel, row.changed, row.sums, (), ())
    return Known(tensor.name, tensor.role, measures)


def _drifted(
    result: DriftResult | None, states: Sequence[State], options: Mapping[str, Any]
) -> Drifted | None:
    """What the rules see of the whole."""
    if result is None:
        return None
    asked = expectations(
        options["expect"],
        options["expect_frozen"],
        options["expect_changed"],
        options["max_drift"],
        bool(options["adapter"]),
        bool(options["parents"]),
    )
    done = [s.merges for s in states]
    if None not in done:
        by_place = {place: m for found in done if found for place, m in found.items()}
        merges_ = tuple(by_place[place] for place in sorted(by_place))
        asked, result = (
            replace(asked, merges=merges_),
            result.model_copy(update={"merges": merges_}),
        )
    paths = in_order([options["base"], *options["new"]])
    followed = [s.ways for s in states]
    if None not in followed:
        all_ways = (way for found in followed for way in found or ())
        series = trajectories(all_ways, states[0].series)
        result = result.model_copy(update={"series": series})
    measured = frozenset({Need.HEADERS, Need.VALUES})
    return Drifted(paths[0], paths[-1], result, measured, asked)
