"""Where in a run a line of a log is, where it counts within epochs and not from the start."""

from __future__ import annotations

import re
from dataclasses import dataclass

#: The place within an epoch: ``Epoch: [0][ 10/5005]``, ``Train: 0 [ 50/1251 (4%)]``, ``Epoch [1/5],
#: Step [100/600]``, ``Epoch 0: 10%|# | 10/100 [``, ``Epoch 0/9 ━━━ 10/100``, ``| epoch 1 | 200/
#: 2983 batches``.
_WITHIN_EPOCH = re.compile(
    r"(?:epoch|train)\b\D{0,12}?(?P<epoch>\d+)(?!\d)(?:\s*/\s*\d+)?\]?[\s,:|━╸╺-]*"
    r"(?:\d{1,3}%\|[^|]{0,400}\|\s*|(?P<word>(?:step|batch|iter(?:ation)?)\W{0,3})?\[?\s*)"
    r"(?<!\d)(?P<at>\d+)\s*/\s*(?P<all>\d+)",
    re.IGNORECASE,
)
#: The same of an epoch whose length nobody says: ``[1,  2000] loss``.
_PAIR = re.compile(r"^\W*\[\s*(?P<epoch>\d+)\s*,\s*(?P<at>\d+)\s*\]")
#: The place of a progress bar of the whole run.
_BAR = re.compile(r"%\|[^|]{0,400}\|\s*(?P<at>\d+)/\d+ \[")
#: A line that begins an epoch, and the place in a line below it: ``469/469 - 1s - loss: 0.25``.
_HEADING = re.compile(r"^\W*epoch\W{0,3}(\d+)(?:\s*/\s*\d+)?\W*$", re.IGNORECASE)
_BELOW = re.compile(r"(?:^\W*|\[\s*)(?P<at>\d+)\s*/\s*(?P<all>\d+)(?![\d/])")
#: The epoch of a line that has nothing finer.
_EPOCH = re.compile(r"\bepochs?\b\W{0,3}(\d+)(?![\d.]*\d)", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Place:
    """The ``at``-th of ``length`` steps of an epoch; None where a log does not say how many."""

    epoch: int
    at: int
    length: int | None


def place_of(line: str, alone: bool) -> Place | int | None:
    """The place of a line that counts within epochs, or the step of a bar of the whole run.

    Where the line has a step besides (not ``alone``), only if it is that of the epoch.
    """
    if (found := _WITHIN_EPOCH.search(line)) and (alone or found["word"]):
        return Place(int(found["epoch"]), int(found["at"]), int(found["all"]))
    if not alone:
        return None
    if found := _PAIR.match(line):
        return Place(int(found["epoch"]), int(found["at"]), None)
    bar = _BAR.search(line)
    return int(bar["at"]) if bar else None


def heading(line: str) -> int | None:
    """The epoch that begins with a line; None for any other line."""
    found = _HEADING.match(line)
    return int(found[1]) if found else None


def place_below(line: str, epoch: int) -> Place | None:
    """The place of a line below the heading of an epoch."""
    found = _BELOW.search(line)
    if found is None or int(found["at"]) > int(found["all"]):
        return None
    return Place(epoch, int(found["at"]), int(found["all"]))


def epoch_of(line: str) -> int | None:
    """The epoch that a line is about."""
    found = _EPOCH.search(line)
    return int(found[1]) if found else None


@dataclass(slots=True)
class Clock:
    """Steps from the start of a run, from places within its epochs that come in order."""

    #: Epochs count from 1 where the first is 1.
    first: int | None = None
    #: Steps before the current epoch, where no line tells how long epochs are, and its last one.
    before: int = 0
    last: Place | None = None

    def step(self, place: Place) -> int:
        """The step of a place."""
        if self.first is None:
            self.first = 1 if place.epoch == 1 else 0
        if place.length is not None:
            return (place.epoch - self.first) * place.length + place.at
        if self.last is not None and self.last.epoch != place.epoch:
            self.before += self.last.at
        self.last = place
        return self.before + place.at
