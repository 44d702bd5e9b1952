"""``analyze_flow``: history -> analyzers -> rules -> report."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from gradscope.errors import InputError, UsageError
from gradscope.flow import judgement
from gradscope.flow.against import Run, common_steps
from gradscope.flow.against import against as compared
from gradscope.flow.curves import curves
from gradscope.flow.dead_zones import covered, dead, dead_candidates, dead_stretches
from gradscope.flow.depth import depth_of
from gradscope.flow.directions import Cosines, cosines
from gradscope.flow.excerpt import between
from gradscope.flow.exploding import exploding, exploding_candidates
from gradscope.flow.graph import Graph, graph_of
from gradscope.flow.joining import By, series
from gradscope.flow.layers import layer_flows
from gradscope.flow.levels import levels
from gradscope.flow.limits import MIN_TREND, SHORTEST
from gradscope.flow.loss import loss_level
from gradscope.flow.motion import convergence, leap, missing, stagnation, update_ratios
from gradscope.flow.network import flows, network
from gradscope.flow.nonfinite import nonfinite
from gradscope.flow.norms import above, explosion
from gradscope.flow.optimizer import accumulation, captures, clipping, damping, unoptimized
from gradscope.flow.oscillation import current_rate, oscillations
from gradscope.flow.paths import critical_paths
from gradscope.flow.recent import recent
from gradscope.flow.result import Against, FlowReport, FlowResult, Need
from gradscope.flow.rules.magnitudes import exploding_gradient, vanishing_gradient
from gradscope.flow.rules.motion import oscillation as oscillation_rule
from gradscope.flow.rules.paths import dead_zone
from gradscope.flow.series import Series
from gradscope.flow.spikes import spikes
from gradscope.flow.temporal import WINDOW, directions, recent_records, temporal
from gradscope.flow.vanishing import vanishing, vanishing_candidates
from gradscope.histories.history import History
from gradscope.histories.open import open_history
from gradscope.report.config import ConfigLike
from gradscope.report.model import Coverage, Input, Skip
from gradscope.report.request import Failures, Request, failure, part_failures, requested
from gradscope.text import plural

#: Rows of (layer, record) that the report holds unless all are asked for.
SERIES_ROWS = 100_000
#: Direction vectors, of 128 numbers each, that it holds of gradients which the file has whole.
VECTORS = 4096


def analyze_flow(
    history: str | Path | History,
    *,
    as_: Literal["norms", "vectors"] | None = None,
    by: By = "layer",
    window: int = WINDOW,
    from_step: int | None = None,
    to_step: int | None = None,
    all_series: bool = False,
    threshold: float | None = None,
    against: str | Path | History | None = None,
    select: Sequence[str] = (),
    ignore: Sequence[str] = (),
    fail_on: str | None = None,
    allow_empty: bool = False,
    config: ConfigLike = None,
    baseline: str | Path | None = None,
) -> FlowReport:
    """Diagnose a recorded training run.

    ``as_`` says what ambiguous arrays are, ``by`` whether the parameters of a module are one row,
    ``window`` how many records a windowed statistic rests on (at least 8), ``from_step`` and
    ``to_step`` (both included) which part of the run is looked at. ``threshold`` is an absolute
    limit on norms, for those who want one beside the scale-free tests. ``against`` is another run:
    what differs from it, over the steps that both have, is told and never judged. A history
    that cannot be read is an entry of ``errors``, never an exception.

    Raises UsageError for an unknown rule or severity, a window that is too short, and a file that
    does not say what it holds.
    """
    request = requested(
        FlowResult,
        select=select,
        ignore=ignore,
        fail_on=fail_on,
        allow_empty=allow_empty,
        config=config,
        baseline=baseline,
        narrowed=[
            f"{option} {step}"
            for option, step in (("--from", from_step), ("--to", to_step))
            if step is not None
        ],
    )
    if window < 8:
        raise UsageError(f"a window of {window} records says nothing; it takes at least 8")
    if by not in ("layer", "param"):
        raise UsageError(f"by is {by!r}; it is layer or param")
    try:
        read = _read(history, as_)
    except InputError as error:
        return request.report(
            FlowReport, None, inputs=(), coverage=_NOTHING, errors=[failure(error)]
        )
    part = between(read, from_step, to_step)
    result = analyze(part, by=by, window=window, all_series=all_series, threshold=threshold)
    judged, inputs, failures = request.judged(result, read.path), [read], Failures()
    coverage = _coverage(part, result)
    if against is not None:
        with failures.caught():
            other = _read(against, as_)
            inputs.append(other)
            found = _against(request, part, between(other, from_step, to_step), by, window)
            result = result.model_copy(update={"against": found})
            if found is None:
                missing_ = Skip(
                    subject=other.path, reason=f"has no step in common with {part.path}"
                )
                coverage = coverage.model_copy(update={"skipped": (*coverage.skipped, missing_)})
    return request.report(
        FlowReport,
        result,
        inputs=[Input(path=h.path, format=h.format, bytes=h.nbytes) for h in inputs],
        coverage=coverage,
        judged=[judged],
        errors=[*(e for h in inputs for e in part_failures(h.path, h.failures)), *failures],
    )


def _read(history: str | Path | History, as_: Literal["norms", "vectors"] | None) -> History:
    read = history if isinstance(history, History) else open_history(str(history), as_=as_)
    _refuse_negative(read)
    return read


def _against(
    request: Request, here: History, there: History, by: By, window: int
) -> Against | None:
    """What differs between two runs over the steps that both have; None when they share none."""
    steps = common_steps(here.steps, there.steps)
    if steps is None:
        return None

    def run(history: History) -> Run:
        result = analyze(history, by=by, window=window)
        findings = request.judged(result, history.path).findings
        return Run(history.path, series(history, by), result, findings)

    with np.errstate(all="ignore"):
        return compared(run(between(here, *steps)), run(between(there, *steps)), window)


def _refuse_negative(history: History) -> None:
    """Raise InputError for norms below zero: something else is in the file."""
    for name in ("l2", "max_abs", "param_l2", "update_l2"):
        values = getattr(history, name)
        if values is not None and values.size and bool((values < 0).any()):
            record, row = np.argwhere(values < 0)[0]
            where = f"{history.layers[row].name} at step {history.steps[record]}"
            message = f"{name} of {where} is {values[record, row]:g}: a norm is never negative"
            raise InputError(history.path, "malformed", message)


def analyze(
    history: History,
    *,
    by: By = "layer",
    window: int = WINDOW,
    all_series: bool = False,
    threshold: float | None = None,
) -> FlowResult:
    """Every measurement of one history, judged by the rules' own limits: arrays in, result out."""
    # NaN and infinity are data here, and what is divided by zero is undefined, not an accident.
    with np.errstate(all="ignore"):
        return _analyzed(history, by, window, all_series, threshold)


def _analyzed(
    history: History, by: By, window: int, all_series: bool, threshold: float | None
) -> FlowResult:
    s = series(history, by)
    graph = graph_of(s)
    depth = depth_of(s, graph)
    against = levels(s, graph)
    compared = cosines(s)
    now = recent(s, graph, against, window)
    edges = flows(s, graph, window)
    alone = unoptimized(s)
    net = network(s, graph, now, edges, depth, window)
    bottlenecks = frozenset(
        row
        for row, node in zip(graph.order, net.nodes, strict=True)
        if node.condition == "bottleneck"
    )
    flat = dead(s)
    zones = dead_stretches(flat)
    starved = vanishing_candidates(
        s, graph, against, vanishing(s, against), covered(zones, flat.shape), depth
    )
    blown = exploding(s, against)
    exploded = judgement.exploding(
        exploding_candidates(s, graph, blown, depth), **judgement.limits(exploding_gradient)
    )
    waves = oscillations(s, against, compared, window)
    fell = convergence(s)
    total = len(s.steps)
    shown = range(total) if all_series else range(*_span(recent_records(s, SERIES_ROWS), total))
    drawn = shown if all_series else shown[-_drawn(s, window) :]
    turns = directions(s, against, compared, np.array(shown, dtype=np.int64), window)
    return FlowResult(
        layers=tuple(layer_flows(s, now, compared, turns, window, shown, drawn)) if total else (),
        temporal=tuple(temporal(s, turns, window)),
        network=net,
        critical_paths=tuple(critical_paths(s.names, graph, edges.capacity, now.rms, bottlenecks)),
        vanishing_regions=judgement.vanishing(starved, **judgement.limits(vanishing_gradient)),
        exploding_regions=exploded,
        dead_zones=judgement.dead_zones(
            dead_candidates(s, graph, flat, zones), **judgement.limits(dead_zone)
        ),
        explosion=explosion(
            s, exploded, judgement.exploding_layers(exploded, above(s, threshold), threshold)
        ),
        topology=graph.topology,
        steps=total,
        first_step=int(s.steps[0]) if total else None,
        last_step=int(s.steps[-1]) if total else None,
        spikes=tuple(spikes(s, blown.jumps, judgement.lasting(exploded))),
        skipped_steps=int(s.skipped.sum()),
        nonfinite=tuple(nonfinite(s, graph)),
        depth=depth,
        oscillation=tuple(waves),
        stagnation=stagnation(s, against, fell),
        learning_rate=judgement.learning_rate(
            waves,
            s.plain_descent and s.gap == 1,
            current_rate(s),
            opposed=judgement.limits(oscillation_rule)["opposed"],
        ),
        update_ratios=tuple(update_ratios(s)),
        leap=leap(s),
        missing=tuple(missing(s)),
        convergence=fell,
        curves=curves(s, shown),
        loss=loss_level(s),
        unoptimized=alone,
        damping=damping(s, against, window),
        clipping=clipping(s),
        accumulation=accumulation(s, compared, alone),
        captures=captures(s),
        measured=tuple(_measured(s, graph, compared)),
        rows_omitted=(total - len(shown)) * len(s.layers),
        notes=tuple(_notes(s)),
    )


def _drawn(s: Series, window: int) -> int:
    """How many of the last records come with direction vectors: a window, more of raw gradients."""
    return window if s.exact is None else max(window, VECTORS // max(1, len(s.layers)))


def _span(recent: Sequence[int], total: int) -> tuple[int, int]:
    return (recent[0], total) if total and recent else (0, total)


def _measured(s: Series, graph: Graph, compared: Cosines | None) -> Iterator[Need]:
    """The kinds of facts that the history has."""
    if s.layers:
        yield Need.NORMS
    if s.layers and len(s.steps) >= MIN_TREND:
        yield Need.RECORDS
    if len([r for r in graph.rows if s.group(r) == "weight"]) >= 2:
        yield Need.COMPARABLE
    if compared is not None:
        yield Need.DIRECTIONS
    if s.update_ratio is not None:
        yield Need.UPDATES
    if graph.topology != "assumed-chain":
        yield Need.TOPOLOGY
    if s.zero_fraction is not None:
        yield Need.ZEROS
    loss = s.history.loss
    if loss is not None and np.isfinite(loss).sum() >= MIN_TREND:
        yield Need.LOSS
    if any(layer.group is not None for layer in s.layers):
        yield Need.GROUPS


def _notes(s: Series) -> list[str]:
    notes = [*s.history.notes]
    notes += [f"{name} are approximate: {why}" for name, why in s.history.approximate.items()]
    if not s.per_element and s.layers:
        notes.append("the layers' sizes are unknown: norms are compared instead of RMS gradients")
    if s.history.meta.get("stage") == "pre_step":
        notes.append("recorded in the optimizer's pre-step hook: norms are those after clipping")
    return notes


_NOTHING = Coverage(analyzed=0, total=0, unit="layers", bytes=0)


def _coverage(history: History, result: FlowResult) -> Coverage:
    skipped = [Skip(subject=s, reason=why) for s, why in history.skipped_parts]
    skipped += [
        Skip(subject=m.layer_name, reason=_MISSING[m.state])
        for m in result.missing
        if m.state != "partly"
    ]
    if result.rows_omitted:
        reason = f"only the last {SERIES_ROWS:,} rows are in the report; --series all has every one"
        skipped.append(Skip(subject=f"{result.rows_omitted:,} rows of the series", reason=reason))
    if not result.layers and result.loss is not None:
        # Of such a run the loss is all there is, and it was judged.
        assert history.loss is not None
        known = int((~np.isnan(history.loss)).sum())
        return Coverage(analyzed=known, total=result.steps, unit="losses", bytes=history.nbytes)
    if few := _too_few(result):
        skipped.append(few)
    recorded = few is None and any(layer.records for layer in result.layers)
    absent = sum(m.state != "partly" for m in result.missing)
    return Coverage(
        analyzed=len(result.layers) - absent if recorded else 0,
        total=len(result.layers),
        unit="layers",
        bytes=history.nbytes,
        skipped=tuple(skipped),
    )


def _too_few(result: FlowResult) -> Skip | None:
    """Why a history is too short to pass: no test but that for NaN and Inf can have fired."""
    counted = result.steps - result.skipped_steps
    if counted >= SHORTEST or result.nonfinite:
        return None
    skipped = f", mixed precision skipped {result.skipped_steps}" if result.skipped_steps else ""
    reason = f"a run is judged from {SHORTEST} records on{skipped}"
    return Skip(subject=plural(result.steps, "record"), reason=reason)


_MISSING = {
    "unused": "its gradient was None at every record",
    "frozen": "requires no gradient",
    "not-recorded": "no record of it in this part of the history",
}
