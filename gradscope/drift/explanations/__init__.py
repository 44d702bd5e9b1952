"""Why a tensor changed: what is tried in turn, the cheapest and surest first."""

from __future__ import annotations

from collections.abc import Callable

from gradscope.drift.explanations import (
    combining,
    damage,
    operations,
    quantising,
    rearranging,
    rounding,
)
from gradscope.drift.explanations.rearranging import reshaped as reshaped
from gradscope.drift.explanations.subject import Parent as Parent
from gradscope.drift.explanations.subject import Subject as Subject
from gradscope.drift.result import Explanation

_FINDERS: tuple[Callable[[Subject], Explanation | None], ...] = (
    damage.one_bit,
    damage.byte_swapped,
    rounding.of_common_values,
    rounding.cast,
    damage.zeroed,
    damage.from_zero,
    combining.combined,
    rearranging.transposed,
    rearranging.permuted,
    rearranging.permuted_and_more,
    quantising.quantised,
    damage.non_finite,
    operations.pruned,
    operations.scaled,
    operations.shifted,
    rounding.rounded_in_place,
    quantising.requantised,
    operations.some_rows,
    operations.replaced,
    operations.of_low_rank,
)


def explained(subject: Subject) -> Explanation | None:
    """The first explanation that holds, None where none does, or nothing changed.

    Raises InputError.
    """
    if subject.measures.identical:
        return None
    for find in _FINDERS:
        if (found := find(subject)) is not None:
            return found
    return None
