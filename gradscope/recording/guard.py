"""What keeps a recorder's failures to itself."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Concatenate, ParamSpec, Protocol, TypeVar

from gradscope.recording import endings

P = ParamSpec("P")


class Guarded(Protocol):
    """What has methods that must not fail."""

    #: Whether its own code is running, and whether it no longer does.
    busy: bool
    stopped: bool

    def fail(self, error: Exception) -> None:
        """Stop for good."""


S = TypeVar("S", bound=Guarded)


def guarded(method: Callable[Concatenate[S, P], None]) -> Callable[..., None]:
    """A failure inside stops the recording, not the training; a SIGTERM inside waits for the end.

    Once recording has stopped, nothing happens.
    """

    @wraps(method)
    def call(self: S, *args: P.args, **options: P.kwargs) -> None:
        if self.stopped:
            return
        outer, self.busy = self.busy, True
        try:
            method(self, *args, **options)
        except Exception as error:
            self.fail(error)
        finally:
            self.busy = outer
            if endings.waiting and not outer:
                endings.settle()

    return call
