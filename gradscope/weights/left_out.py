"""What of a checkpoint could not be read, as the report shows it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from itertools import islice

from gradscope.checkpoints.tensors import Checkpoint, Failure
from gradscope.report.model import InputFailure
from gradscope.text import listed, plural, quoted

#: Reasons for what was left out that are told in an error.
_MOST_REASONS = 4


def part_failures(checkpoint: Checkpoint, failed: bool = False) -> tuple[InputFailure, ...]:
    """What of a checkpoint could not be read: what is left out unasked is a failure by itself.

    Where something ``failed``, what was lost with it is told already.
    """
    told = failed or checkpoint.failures
    return tuple(
        InputFailure(input=checkpoint.path, kind=f.kind, message=f.message)
        for f in (checkpoint.failures if told else _left_out(checkpoint))
    )


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
