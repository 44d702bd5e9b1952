"""What the caller of a recorder should know, said once."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from gradscope.histories.history import Status
from gradscope.recording.records import Part
from gradscope.recording.turns import Turns
from gradscope.text import plural


class Advice:
    """Warnings, each given once."""

    def __init__(self) -> None:
        self._outnumbered = self._without_gradient = False
        self._unknown: set[str] = set()

    def outnumbered(self, turns: Turns) -> None:
        """Captures outnumber steps."""
        if not self._outnumbered:
            self._outnumbered = True
            self._say(
                f"capture() was called {turns.captures} times for "
                f"{plural(turns.steps, 'step')} of the optimizer: call it once a step, after the "
                "last micro-batch; norms of unfinished gradients are not those of the step"
            )

    def without_gradient(self, parts: Sequence[Part]) -> None:
        """No parameter has a gradient, though some should."""
        states = {state for part in parts for state in part.status.tolist()}
        if not self._without_gradient and Status.NONE in states and Status.RECORDED not in states:
            self._without_gradient = True
            self._say(
                "no parameter has a gradient: call capture() after backward() and before "
                "zero_grad()"
            )

    def no_number(self, name: str, value: object) -> None:
        """What was given under a name cannot be recorded."""
        if name not in self._unknown:
            self._unknown.add(name)
            self._say(
                f"{name} is not recorded: capture() takes a number or a tensor of real numbers, "
                f"not {type(value).__name__}"
            )

    def _say(self, text: str) -> None:
        warnings.warn(text, stacklevel=6)
