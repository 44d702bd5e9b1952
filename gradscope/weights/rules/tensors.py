"""Which tensors a rule looks at."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator

from gradscope.checkpoints.numbering import NUMBERED
from gradscope.statistics.dtypes import is_float
from gradscope.statistics.records import Numerics, Statistics, Units
from gradscope.weights.result import Examined, OutlierResult, TensorResult
from gradscope.weights.roles import Role

#: Below this nothing is left of a tensor: its products vanish beside any rounding error.
VANISHED = 1e-30

#: Roles whose distribution has a shape worth judging.
SHAPED = frozenset({Role.LINEAR, Role.CONV, Role.DEPTHWISE, Role.RECURRENT, Role.EXPERTS})

#: A matrix that lost a greater share of its units is not healthy, published or not.
LOST = 0.30


def mostly_dead(tensor: TensorResult) -> bool:
    """Whether so many units are dead that the distribution is theirs, not that of the living."""
    return tensor.units is not None and tensor.units.dead_rows > LOST * tensor.units.rows


def measured(
    examined: Examined, roles: Iterable[Role] | None = None
) -> Iterator[tuple[TensorResult, Statistics]]:
    """The float, complex and dequantised tensors that were measured, with their statistics."""
    wanted = None if roles is None else frozenset(roles)
    for tensor in examined.tensors:
        if tensor.statistics is None or tensor.numel == 0 or (wanted and tensor.role not in wanted):
            continue
        if tensor.dequantized or is_float(tensor.dtype) or tensor.dtype.startswith("C"):
            yield tensor, tensor.statistics


def with_outliers(
    examined: Examined, roles: Iterable[Role] | None = None
) -> Iterator[tuple[TensorResult, Statistics, OutlierResult]]:
    """The measured tensors that have a distribution to stand out from."""
    for tensor, statistics in measured(examined, roles):
        if tensor.outliers is not None:
            yield tensor, statistics, tensor.outliers


def with_units(examined: Examined, roles: Iterable[Role]) -> Iterator[tuple[TensorResult, Units]]:
    """The measured tensors that have rows, aside from those that are zero altogether or whose rows
    look dead because they hold nothing finite.
    """
    for tensor, s in measured(examined, roles):
        units = tensor.units
        if units is None or s.zero_count == s.count:
            continue
        if s.finite_count == s.count or s.count - s.finite_count < units.dead_rows * (
            tensor.numel // max(units.rows, 1)
        ):
            yield tensor, units


def with_numerics(
    examined: Examined, roles: Iterable[Role] | None = None
) -> Iterator[tuple[TensorResult, Statistics, Numerics]]:
    """The measured tensors with how their values sit in their type."""
    for tensor, s in measured(examined, roles):
        if tensor.numerics is not None:
            yield tensor, s, tensor.numerics


def is_constant(tensor: TensorResult | None, value: float) -> bool:
    """Whether every element of a tensor was measured to be one value."""
    s = tensor.statistics if tensor is not None else None
    return s is not None and s.min == s.max == value and s.finite_count == s.count > 0


def is_whole(examined: Examined) -> bool:
    """Whether what was not found is not there: not left out, unread, or in another shard."""
    checkpoint = examined.checkpoint
    files = {t.file for t in examined.tensors}
    shards = {f for f in map(os.path.basename, files) if _is_one_shard(f)}
    lone = len(shards) == 1 and _is_one_shard(os.path.basename(checkpoint.path))
    partial = any(p.kind in ("missing-shard", "truncated-file") for p in checkpoint.problems)
    return not (lone or partial or checkpoint.skipped or checkpoint.failures)


def _is_one_shard(file: str) -> bool:
    """Whether a file's name says that there are others."""
    return (found := NUMBERED.fullmatch(file)) is not None and int(found["total"]) > 1
