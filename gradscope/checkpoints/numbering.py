"""Numbering of shards: ``-00003-of-00007`` promises how many there are."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from itertools import islice

from gradscope.checkpoints.tensors import Problem
from gradscope.text import listed

NUMBERED = re.compile(r"(?P<prefix>.+)-(?P<number>\d{1,9})-of-(?P<total>\d{1,9})(?P<suffix>\..+)")


def numbering_problems(names: Iterable[str]) -> Iterator[Problem]:
    """Gaps and contradictions in the numbers of the files that are there."""
    groups: dict[tuple[str, str], list[tuple[int, int, int]]] = {}
    for name in names:
        if match := NUMBERED.fullmatch(name):
            number, total = match["number"], match["total"]
            group = groups.setdefault((match["prefix"], match["suffix"]), [])
            group.append((int(number), int(total), len(number)))
    for (prefix, suffix), found in groups.items():
        yield from _group_problems(prefix, suffix, found)


def _group_problems(
    prefix: str, suffix: str, found: list[tuple[int, int, int]]
) -> Iterator[Problem]:
    totals = sorted({total for _, total, _ in found})
    numbers = {number for number, _, _ in found}
    subject = f"{prefix}-*-of-{totals[-1]:0{found[0][2]}d}{suffix}"
    first = 0 if 0 in numbers else 1
    last = first + totals[-1] - 1
    if len(totals) > 1 or max(numbers) > last:
        yield _wrong_total(subject, totals, max(numbers))
    elif len(numbers) < totals[0]:
        gaps = (number for number in range(first, last + 1) if number not in numbers)
        names = [f"{number:0{found[0][2]}d}" for number in islice(gaps, 5)]
        yield _numbering_gap(subject, len(numbers), totals[0], names)


def _wrong_total(subject: str, totals: list[int], highest: int) -> Problem:
    of = " and ".join(f"{total:,}" for total in totals[:3])
    message = f"the shards' names contradict each other: they count up to {highest:,} of {of}"
    remedy = "Shards of different revisions are mixed: fetch all of them again from one."
    evidence: dict[str, int | float | str] = {"highest": highest, "totals": of}
    return Problem("missing-shard", subject, message, remedy, evidence)


def _numbering_gap(subject: str, found: int, total: int, gaps: list[str]) -> Problem:
    missing = total - found
    names = listed(gaps, missing, len(gaps))
    message = f"{missing:,} of {total:,} shards are missing by their numbering: {names}"
    remedy = "Fetch the missing shards; what they hold was not analysed."
    evidence: dict[str, int | float | str] = {"missing": missing, "total": total, "first": gaps[0]}
    return Problem("missing-shard", subject, message, remedy, evidence)
