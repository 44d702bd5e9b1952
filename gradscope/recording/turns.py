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
    none steps twice, have one number: that of the caller, or of the round.
    """

    def __init__(self, optimizers: int, every: int, directions: bool) -> None:
        self._count, self._every, self._directions = optimizers, every, directions
        self._next = 0
        self._own = [0] * optimizers
        self._round: set[int] = set()
        #: How often capture was called, and how often a step of any optimizer followed.
        self.captures = self.steps = 0
        #: Whether a capture's step is still to come.
        self.open = False
        self._skippable = False
        self._unstepped = 0

    def capture(self, may_skip: bool) -> bool:
        """Count a call; whether calls outnumber steps by more than skipped steps explain."""
        if self.open and not self._skippable:
            self._unstepped += 1
        self.captures += 1
        self.open, self._skippable = True, may_skip
        return self._unstepped >= _UNSTEPPED and self._unstepped * _UNSTEPPED_SHARE >= self.captures

    def passes(self, step: object) -> bool:
        """Count a call at a step that is not to be recorded; False where there is more to do.

        What most calls of a loop are: one optimizer, whose last step was seen.
        """
        number = self._next if step is None else step
        if self.open or self._count != 1 or type(number) is not int:
            return False
        if number % self._every <= self._directions:
            return False
        self.captures += 1
        self.open, self._skippable, self._next = True, False, number + 1
        return True

    def undo(self) -> None:
        """Forget the last capture, whose step was not seen."""
        self.captures -= 1
        self.open = False
        if self._count == 1:
            self._next -= 1

    def stepped(self) -> None:
        """Count a step, the first that follows a capture: one that was ``open``."""
        self.steps += 1
        self.open = False

    def turn(self, step: int | None, owner: int | None) -> Turn:
        """What to do with a capture, of one optimizer's step or of any's."""
        if self._count == 1:
            number = self._next if step is None else int(step)
            self._next = number + 1
            place = number % self._every
            wanted = place == 0 or (self._directions and place == 1)
            return Turn(number, (0,) if wanted else (), place == 0, False)
        those = range(self._count) if owner is None else (owner,)
        places = {i: self._own[i] % self._every for i in those}
        wanted_by = tuple(i for i, p in places.items() if p == 0 or (self._directions and p == 1))
        whole = any(places[i] == 0 for i in wanted_by)
        return Turn(None if step is None else int(step), wanted_by, whole, True)

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
