"""Which tensors a rule looks at."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from gradscope.statistics.dtypes import is_float
from gradscope.statistics.records import Numerics, Statistics, Units
from gradscope.weights.result import Examined, OutlierResult, TensorResult
from gradscope.weights.roles import Role

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
    """The measured tensors that have rows, those that are zero altogether aside."""
    for tensor, statistics in measured(examined, roles):
        if tensor.units is not None and statistics.zero_count < statistics.count:
            yield tensor, tensor.units


def with_numerics(
    examined: Examined, roles: Iterable[Role] | None = None
) -> Iterator[tuple[TensorResult, Statistics, Numerics]]:
    """The measured tensors with how their values sit in their type."""
    for tensor, s in measured(examined, roles):
        if tensor.numerics is not None:
            yield tensor, s, tensor.numerics
