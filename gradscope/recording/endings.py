"""How a process ends: recorders write what they hold at exit and on SIGTERM, then it goes on.

One handler serves all recorders of a process. It hands the signal to whoever handled it before, so
that a process still ends by SIGTERM, or does not, as it would have. Forked children (workers of a
data loader) inherit handler and recorders, but no record: what their parent has, it writes.
"""

from __future__ import annotations

import atexit
import os
import signal
import threading
import weakref
from types import FrameType
from typing import Any, Protocol


class Draining(Protocol):
    """What is told of the end."""

    #: Whether its own code is running, which a signal handler must not enter again.
    busy: bool

    def flush(self) -> None:
        """Write what there is."""

    def close(self) -> None:
        """Write what there is, for the last time."""

    def forget(self) -> None:
        """Have nothing to write."""


_open: weakref.WeakSet[Draining] = weakref.WeakSet()
#: The handler that was there before ours.
_before: Any = None
_installed = False
#: A SIGTERM that came while a recorder was busy.
waiting = False


def watch(recorder: Draining) -> None:
    """Write what ``recorder`` holds when the process ends."""
    if not _open:
        atexit.register(_exit)
    _open.add(recorder)
    _install()


def unwatch(recorder: Draining) -> None:
    """Forget a recorder; with the last one the handler before ours is back."""
    _open.discard(recorder)
    if not _open:
        atexit.unregister(_exit)
        _restore()


def settle() -> None:
    """What a busy recorder calls when it is done and a SIGTERM waits for it: handle that now."""
    global waiting
    waiting = False
    _terminated(signal.SIGTERM, None)


def _install() -> None:
    """Put our handler before the one there is. Python's handlers belong to the main thread.

    One that was not installed from Python (None) cannot be called, so it is left alone.
    """
    global _before, _installed
    if _installed or threading.current_thread() is not threading.main_thread():
        return
    current = signal.getsignal(signal.SIGTERM)
    if current is not None:
        _before = current
        signal.signal(signal.SIGTERM, _terminated)
        _installed = True


def _restore() -> None:
    """Take ours out, unless someone has since put theirs over it and may call it."""
    global _before, _installed
    if not _installed or threading.current_thread() is not threading.main_thread():
        return
    if signal.getsignal(signal.SIGTERM) is _terminated:
        signal.signal(signal.SIGTERM, _before)
        _before, _installed = None, False


def _exit() -> None:
    for recorder in list(_open):
        recorder.close()


def _forked() -> None:
    global waiting
    waiting = False
    for recorder in list(_open):
        recorder.forget()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)


def _terminated(number: int, frame: FrameType | None) -> None:
    global waiting
    if any(recorder.busy for recorder in _open):
        waiting = True
        return
    for recorder in list(_open):
        recorder.flush()
    if callable(_before):
        _before(number, frame)
    elif _before == signal.SIG_DFL:
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
