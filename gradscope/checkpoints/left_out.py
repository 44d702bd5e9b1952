"""What of a checkpoint could not be read: silence would claim that all was seen."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from itertools import islice

from gradscope.checkpoints.tensors import Checkpoint, Failure
from gradscope.text import listed, plural, quoted

#: Reasons for what was left out that are told in an error.
_MOST_REASONS = 4


def unread(checkpoint: Checkpoint, failed: bool = False) -> tuple[Failure, ...]:
    """Why a checkpoint was not read in full: what is skipped unasked is a failure by itself.

    Where something ``failed``, what was lost with it is told already.
    """
    return checkpoint.failures or (() if failed else tuple(_left_out(checkpoint)))


def _left_out(checkpoint: Checkpoint) -> Iterator[Failure]:
    by_reason: dict[str, list[str]] = defaultdict(list)
    for skip in checkpoint.skipped:
        if not skip.deliberate:
            by_reason[skip.reason].append(skip.subject)
    lost = sum(map(len, by_reason.values()))
    if lost:
        total = len(checkpoint.tensors) + lost
        told = (f"{listed(map(quoted, names), len(names))}: {r}" for r, names in by_reason.items())
        shown = "; ".join(islice(told, _MOST_REASONS))
        more = len(by_reason) - _MOST_REASONS
        rest = f"; {plural(more, 'more reason')} under skipped" if more > 0 else ""
        what = plural(total, "tensor")
        yield Failure("unsupported", f"{lost:,} of {what} could not be analysed: {shown}{rest}")
