"""A limit of the time that evaluation may take, and what it left out."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial

from gradscope.report.model import Skip
from gradscope.text import plural


@dataclass(eq=False, slots=True)
class Budget:
    """So many seconds for a run; each picture may take its share and what earlier ones left."""

    #: None for no limit.
    seconds: float | None = None
    pictures: int = 1
    began: float = field(default_factory=lambda: time.monotonic())
    #: How many pictures each measurement is missing for, for one of their maps or more.
    missing: Counter[str] = field(default_factory=Counter)
    done: int = 0

    def next_picture(self) -> Callable[[], bool]:
        """Whether the time of the next picture is up, to be asked again and again."""
        self.done += 1
        if self.seconds is None:
            return lambda: False
        share = self.seconds * self.done / max(self.pictures, self.done)
        return partial(self._later_than, self.began + share)

    @staticmethod
    def _later_than(end: float) -> bool:
        return time.monotonic() > end

    def skipped(self) -> Iterator[Skip]:
        """What was left out, for the report."""
        for name, count in self.missing.items():
            subject = f"{name} of {plural(count, 'picture')}"
            yield Skip(subject=subject, reason=f"the budget of {self.seconds:g} s was spent")
