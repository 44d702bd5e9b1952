"""Whose step a capture belongs to, which number it has, and whether it is to be recorded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

#: Captures without a step after which that is no accident any more, and their least share.
_UNSTEPPED = 6
_UNSTEPPED_SHARE = 4


class Turn(NamedTuple):
    """What is known of a capture when it is made."""

    #: None until it is known who steps.
    step: int | None
    #: The optimizers that are to be recorded if it is their step.
    wanted: tuple[int, ...]
    #: Whether all statistics are taken, or norms and directions alone.
    whole: bool
    #: Whether someone must see who steps, even where nothing is recorded.
    unseen: bool


class Place(NamedTuple):
    """Where a capture's record belongs, once its step was seen."""

    step: int
    owners: tuple[int, ...]
    skipped: bool


class Turns:
    """The counting of steps.

    With one optimizer, records are those whose step is a multiple of ``every`` (and, with
    ``directions``, those after them). Several count their own steps. Those of one round, in which
    none steps twice, have one number: that of the caller, or of the round. ``watched`` is whether
    steps will be told of.
    """

    def __init__(self, optimizers: int, every: int, directions: bool, watched: bool) -> None:
        self._count, self._every, self._directions = optimizers, every, directions
        self._watched = watched
        self._next = 0
        self._own = [0] * optimizers
        self._round: set[int] = set()
        #: How often capture was called, and how often a step of any optimizer followed.
        self.captures = self.steps = 0
        #: Whether a capture's step is still to come, and whether it may be skipped.
        self._open = self._skippable = False
        self._unstepped = 0
        #: Whether calls outnumber steps, by more than skipped steps explain.
        self.outnumbered = False

    def passes(self, step: int | None, may_skip: bool) -> bool:
        """Count a call at a step that is not to be recorded; False where there is more to do.

        What most calls of a loop are: one optimizer, whose last step was seen.
        """
        number = self._next if step is None else step
        if self._open or self._count != 1 or type(number) is not int:
            return False
        if number % self._every <= self._directions:
            return False
        self._next = number + 1
        self.captures += 1
        self._open, self._skippable = self._watched, may_skip
        return True

    def turn(self, step: int | None, owner: int | None, may_skip: bool) -> Turn:
        """Count a call, and what to do with it: of one optimizer's step or of any's."""
        self.captures += 1
        if self._open and not self._skippable:
            self._unstepped += 1
            share = self._unstepped * _UNSTEPPED_SHARE
            self.outnumbered = self._unstepped >= _UNSTEPPED and share >= self.captures
        self._open, self._skippable = self._watched, may_skip
        if self._count == 1:
            number = self._next if step is None else int(step)
            self._next = number + 1
            place = number % self._every
            return Turn(number, (0,) if place <= self._directions else (), place == 0, False)
        those = range(self._count) if owner is None else (owner,)
        places = {i: self._own[i] % self._every for i in those}
        wanted = tuple(i for i, place in places.items() if place <= self._directions)
        whole = any(places[i] == 0 for i in wanted)
        return Turn(None if step is None else int(step), wanted, whole, True)

    def undo(self) -> None:
        """Forget the last capture, whose step was not seen."""
        self.captures -= 1
        self._open = False
        if self._count == 1:
            self._next -= 1

    def stepped(self) -> None:
        """Count a step, if it is the first that follows a capture."""
        self.steps += self._open
        self._open = False

    def settle(
        self, step: int | None, owner: int | None, stepped: Sequence[int], may_skip: bool
    ) -> Place:
        """Where a capture belongs, given who stepped after it."""
        skipped = may_skip and not stepped
        if self._count == 1:
            return Place(step or 0, (0,), skipped)
        everyone = tuple(range(self._count))
        owners = (owner,) if owner is not None else tuple(dict.fromkeys(stepped)) or everyone
        for i in owners:
            self._own[i] += 1
        if step is not None:
            self._next = max(self._next, step)
        elif self._round & set(owners):
            self._round = set()
            self._next += 1
        self._round |= set(owners)
        return Place(self._next if step is None else step, owners, skipped)
