"""Which tensors a rule looks at, and how it names several."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence

from gradscope.statistics.dtypes import is_float
from gradscope.statistics.records import Numerics, Statistics, Units
from gradscope.weights.result import Examined, OutlierResult, TensorResult
from gradscope.weights.roles import Role

#: Roles whose distribution has a shape worth judging.
SHAPED = frozenset({Role.LINEAR, Role.CONV, Role.DEPTHWISE, Role.RECURRENT, Role.EXPERTS})


def measured(
    examined: Examined, roles: Iterable[Role] | None = None
) -> Iterator[tuple[TensorResult, Statistics]]:
    """The float and complex tensors that were measured, with their statistics."""
    wanted = None if roles is None else frozenset(roles)
    for tensor in examined.tensors:
        if tensor.statistics is None or tensor.numel == 0 or (wanted and tensor.role not in wanted):
            continue
        if is_float(tensor.dtype) or tensor.dtype.startswith("C"):
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


def listed(items: Sequence[object], total: int) -> str:
    """The first of ``total`` things, and how many more there are."""
    more = f" and {total - len(items):,} more" if total > len(items) else ""
    return ", ".join(map(str, items)) + more


def pattern(name: str) -> str:
    """A name with its layer numbers taken out: what the layers of a stack share."""
    return re.sub(r"(?<![^.])\d+(?![^.])", "*", name)


def common_pattern(tensors: Sequence[TensorResult]) -> str:
    """One name for several tensors."""
    patterns = dict.fromkeys(pattern(t.name) for t in tensors)
    return next(iter(patterns)) + (f" (+{len(patterns) - 1} more)" if len(patterns) > 1 else "")


def with_numerics(
    examined: Examined, roles: Iterable[Role] | None = None
) -> Iterator[tuple[TensorResult, Statistics, Numerics]]:
    """The measured tensors with how their values sit in their type."""
    for tensor, s in measured(examined, roles):
        if tensor.numerics is not None:
            yield tensor, s, tensor.numerics
