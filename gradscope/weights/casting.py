"""``--cast``: which tensors are cast to which types, what that costs, and what would be best."""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from gradscope.casts.formats import Target, target
from gradscope.checkpoints.tensors import DTYPE_BITS, TensorRef
from gradscope.errors import UsageError
from gradscope.statistics.dtypes import is_float
from gradscope.text import quoted
from gradscope.weights.names import pattern
from gradscope.weights.result import (
    Casting,
    CastPlan,
    CastResult,
    CastSummary,
    Examined,
    TensorResult,
)
from gradscope.weights.roles import MATRICES, TRAINING

if TYPE_CHECKING:
    from gradscope.casts.measure import Loss, Subject
    from gradscope.statistics import Engine
    from gradscope.statistics.layout import UnitLayout


@dataclass(frozen=True, slots=True)
class Wanted:
    """The types that tensors are cast to, and the least signal to noise of a plan."""

    targets: tuple[Target, ...] = ()
    snr_db: float | None = None


def wanted_casts(spelled: Sequence[str], snr: str | float | None) -> Wanted:
    """What ``--cast`` and ``--snr`` say. Raises UsageError for what they cannot."""
    if snr is not None and not spelled:
        raise UsageError("--snr says how much --cast may lose: give --cast as well")
    targets = tuple(target(name) for name in dict.fromkeys(spelled))
    return Wanted(targets, None if snr is None else _decibels(snr))


def _decibels(snr: str | float) -> float:
    match = re.fullmatch(r"\s*(\d+(\.\d*)?)\s*(dB)?\s*", str(snr), re.IGNORECASE)
    if match is None:
        raise UsageError(f"--snr {quoted(str(snr), 40)} is no number of decibels, such as 30dB")
    return float(match[1])


def with_casts(
    examined: Examined, engine: Engine[Any, Any], progress: Callable[[int], None], *, wanted: Wanted
) -> Examined:
    """The tensors with what casting them costs. Reads again what is cast.

    Raises InputError when a file changes or ends while it is read.
    """
    from gradscope.casts.measure import losses
    from gradscope.weights.kept_columns import with_kept_columns
    from gradscope.weights.kept_experts import with_kept_experts

    refs = {ref.name: ref for ref in examined.checkpoint.tensors}
    layout = _layouts(examined)
    found = {}
    for targets, tensors in _by_targets(examined.tensors, refs, wanted.targets).items():
        subjects = [_subject(refs[t.name], t, layout) for t in tensors]
        for tensor, seen, lost in zip(
            tensors, subjects, losses(subjects, targets, engine), strict=True
        ):
            found[tensor.name] = _with_losses(tensor, seen, targets, lost, wanted.snr_db)
            progress(seen.ref.nbytes)
        if wanted.snr_db is not None:
            cast = [(found[t.name], s) for t, s in zip(tensors, subjects, strict=True)]
            for kept in (with_kept_columns, with_kept_experts):
                better = kept(cast, targets, wanted.snr_db, engine)
                found |= {tensor.name: tensor for tensor in better}
                cast = [(found[tensor.name], subject) for tensor, subject in cast]
    return replace(examined, tensors=tuple(found.get(t.name, t) for t in examined.tensors))


def _layouts(examined: Examined) -> Callable[[TensorRef], UnitLayout | None]:
    from gradscope.weights.layouts import layouts

    roles = {t.name: t.role for t in examined.tensors}
    return layouts(examined.checkpoint.tensors, roles, examined.document("config"))


def _by_targets(
    tensors: Sequence[TensorResult], refs: Mapping[str, TensorRef], targets: Sequence[Target]
) -> Mapping[tuple[Target, ...], Sequence[TensorResult]]:
    """The tensors in file order by what they are cast to; those cast to nothing are left out."""
    groups: dict[tuple[Target, ...], list[TensorResult]] = {}
    for tensor in tensors:
        own = tuple(t for t in targets if is_cast(tensor, refs[tensor.name], t))
        if own:
            groups.setdefault(own, []).append(tensor)
    return groups


def is_cast(tensor: TensorResult, ref: TensorRef, t: Target) -> bool:
    """Whether a tensor is cast to a type: floats that are not smaller already.

    Types of 8 bits and fewer are for what multiplies activations; gains, biases and buffers are
    left as they are, as deployments do. What training keeps beside the model is not deployed.
    """
    if tensor.statistics is None or tensor.dequantized is not None or not tensor.numel:
        return False
    if not is_float(ref.dtype) or DTYPE_BITS[ref.dtype] < 16 or tensor.role in TRAINING:
        return False
    if ref.part != "model" or DTYPE_BITS[ref.dtype] < t.bits:
        return False
    return t.bits > 8 or (tensor.role in MATRICES and len(tensor.shape) >= 2)


def _subject(
    ref: TensorRef, tensor: TensorResult, layout: Callable[[TensorRef], UnitLayout | None]
) -> Subject:
    """A tensor as the matrix whose rows are its output units."""
    from gradscope.casts.measure import Subject
    from gradscope.weights.layouts import as_rows

    return Subject(*as_rows(ref, layout(ref)), *_reach(tensor))


def _reach(tensor: TensorResult) -> tuple[float, float]:
    """Its greatest magnitude, and that of all but the 0.1 % of elements at either end."""
    s = tensor.statistics
    if s is None or s.quantiles is None:
        return 0.0, math.inf
    ends = (s.quantiles["0.001"], s.quantiles["0.999"])
    return float(s.abs_max or 0.0), max(map(abs, ends)) or math.inf


def _with_losses(
    tensor: TensorResult,
    seen: Subject,
    targets: Sequence[Target],
    lost: Sequence[Loss],
    snr_db: float | None,
) -> TensorResult:
    casts = tuple(
        CastResult(
            format=t.name,
            scale=t.grain,
            bytes=t.nbytes(seen.rows, seen.columns),
            overflow_count=loss.overflow,
            underflow_count=loss.underflow,
            relative_error=loss.relative,
            snr_db=loss.snr_db,
            bulk_snr_db=loss.bulk_snr_db,
            max_abs_error=loss.worst,
        )
        for t, loss in zip(targets, lost, strict=True)
    )
    plan = None if snr_db is None else _best(targets, casts, snr_db, seen.ref.nbytes)
    return tensor.model_copy(update={"casts": casts, "cast_plan": plan})


def serves(cast: CastResult, snr_db: float) -> bool:
    """Whether a cast loses no more than is wanted, of few great elements and of the others."""
    return lowest(cast) >= snr_db and not cast.overflow_count


def _best(
    targets: Sequence[Target], casts: Sequence[CastResult], snr_db: float, stored: int
) -> str | None:
    """The format of the fewest bits that serves and saves anything; of several the most exact."""
    both = zip(targets, casts, strict=True)
    fitting = [(t, c) for t, c in both if serves(c, snr_db) and c.bytes < stored]
    best = min(fitting, key=lambda tc: (tc[0].bits, -lowest(tc[1])), default=None)
    return best[1].format if best else None


# -- the whole model ------------------------------------------------------------------------------


def casting(
    examined: Sequence[Examined], tensors: Sequence[TensorResult], wanted: Wanted
) -> Casting | None:
    """What casting all tensors of some checkpoints costs; None where nothing was asked."""
    if not wanted.targets:
        return None
    stored = {
        (e.checkpoint.path, ref.name): ref.nbytes
        for e in examined
        for ref in e.checkpoint.tensors
        if ref.part == "model"
    }
    total = sum(stored.values())
    bytes_of = {id(t): stored.get((t.input, t.name), 0) for t in tensors}
    summaries = tuple(
        _summary(t, list(_of(t, tensors)), total, bytes_of, wanted.snr_db) for t in wanted.targets
    )
    plan = None if wanted.snr_db is None else _plan(tensors, wanted.snr_db, total, bytes_of)
    return Casting(stored_bytes=total, formats=summaries, plan=plan)


_Cast = tuple[TensorResult, CastResult]


def _of(t: Target, tensors: Sequence[TensorResult]) -> Iterator[_Cast]:
    """The tensors that were cast to a type, with what that cost."""
    for tensor in tensors:
        yield from ((tensor, cast) for cast in tensor.casts if cast.format == t.name)


def _summary(
    t: Target,
    cast: Sequence[_Cast],
    total: int,
    stored: Mapping[int, int],
    snr_db: float | None,
) -> CastSummary:
    after = total - sum(stored[id(tensor)] - c.bytes for tensor, c in cast)
    worst = min(cast, key=lambda item: (not item[1].overflow_count, lowest(item[1])), default=None)
    return CastSummary(
        format=t.name,
        tensors=len(cast),
        bytes=after,
        saved_fraction=1 - after / total if total else 0.0,
        overflow_count=sum(c.overflow_count for _, c in cast),
        underflow_count=sum(c.underflow_count for _, c in cast),
        snr_db=_together(cast),
        worst_tensor=worst[0].name if worst else None,
        worst_snr_db=lowest(worst[1]) if worst and not worst[1].overflow_count else None,
        below=None if snr_db is None else sum(not serves(c, snr_db) for _, c in cast),
    )


def lowest(cast: CastResult) -> float:
    """Its lower ratio; zeros lose nothing."""
    return min((r for r in (cast.snr_db, cast.bulk_snr_db) if r is not None), default=math.inf)


def _together(cast: Sequence[_Cast]) -> float | None:
    """Signal to noise of the elements of all of them as one."""
    from gradscope.casts.measure import decibels

    signals = [(s.l2_norm or 0.0) ** 2 for t, _ in cast if (s := t.statistics) is not None]
    errors = [n * (c.relative_error or 0.0) ** 2 for n, (_, c) in zip(signals, cast, strict=True)]
    return decibels(math.fsum(signals), math.fsum(errors))


def _plan(
    tensors: Sequence[TensorResult], snr_db: float, total: int, stored: Mapping[int, int]
) -> CastPlan:
    cast = [t for t in tensors if t.casts]
    saved = sum(stored[id(t)] - c.bytes for t in cast for c in t.casts if c.format == t.cast_plan)
    return CastPlan(
        snr_db=snr_db,
        bytes=total - saved,
        saved_fraction=saved / total if total else 0.0,
        tensors=dict(Counter(t.cast_plan for t in cast if t.cast_plan is not None)),
        kept=tuple(t.name for t in cast if t.cast_plan is None),
        exceptions={t.name: t.cast_plan for t in _exceptions(cast)},
    )


def _exceptions(cast: Sequence[TensorResult]) -> Iterator[TensorResult]:
    """Tensors that need more bytes than most of those of their place in other layers or experts."""
    groups: dict[object, list[TensorResult]] = defaultdict(list)
    for tensor in cast:
        groups[pattern(tensor.name), tensor.shape, tensor.dtype].append(tensor)
    for group in groups.values():
        usual, count = Counter(t.cast_plan for t in group).most_common(1)[0]
        if 2 * count > len(group):
            yield from (t for t in group if _planned_bytes(t) > _planned_bytes(t, usual))


def _planned_bytes(tensor: TensorResult, *plan: str | None) -> float:
    """Under its plan, or another one; more than any where it is kept."""
    wanted = plan[0] if plan else tensor.cast_plan
    return next((c.bytes for c in tensor.casts if c.format == wanted), math.inf)
