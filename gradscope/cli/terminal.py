"""What commands share of the outside world: printing, colours, progress, errors to exit codes."""

from __future__ import annotations

import atexit
import functools
import importlib
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, Literal, NoReturn, TextIO

from gradscope.errors import GradscopeError

ISSUES = "https://github.com/gradscope/gradscope/issues"
#: Seconds before anything is drawn.
_PATIENCE = 0.8


def guarded(command: Callable[..., int]) -> Callable[..., None]:
    """Turn what a command returns or raises into an exit code; a bug is 70, never 1."""

    @functools.wraps(command)
    def run(*args: Any, **options: Any) -> None:
        try:
            code = command(*args, **options)
        except KeyboardInterrupt:
            say("interrupted")
            code = 130
        except GradscopeError as error:
            say(f"error: {error}")
            code = error.exit_code
        except MemoryError:
            say("error: out of memory; use fewer --jobs")
            code = 70
        except Exception as error:
            code = _bug(error, debug=bool(options.get("debug")))
        leave(code)

    return run


def _bug(error: Exception, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    first = str(error).split("\n", 1)[0]
    say(
        f"internal error: {type(error).__name__}: {first}. This is a bug in gradscope; please "
        f"report it at {ISSUES}" + ("" if debug else " with the output of --debug")
    )
    return 70


def leave(code: int) -> NoReturn:
    """End a command; a closed pipe is no error and gives no traceback."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        _close_stdout()
    sys.exit(code)


def end_process(code: int) -> NoReturn:
    """Exit without unloading the compiler behind the kernels, which takes a third of a second."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(BrokenPipeError, ValueError):
            stream.flush()
    atexit._run_exitfuncs()
    os._exit(code)


def load_compiler() -> None:
    """Import numba's array functions without their search for SciPy's BLAS.

    No kernel here calls it, and where SciPy is installed finding it takes a fifth of a second. Only
    for this process: a library has no business with another one's imports.
    """
    hidden = "scipy" not in sys.modules
    if hidden:
        sys.modules["scipy"] = None  # type: ignore[assignment]
    try:
        importlib.import_module("numba.np.arraymath")
    finally:
        if hidden:
            del sys.modules["scipy"]


def _close_stdout() -> None:
    """Let whatever is still written to a closed pipe vanish."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def say(message: str) -> None:
    """One line on stderr, control characters escaped."""
    line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in message)
    with suppress(BrokenPipeError, ValueError):
        sys.stderr.write(f"gradscope: {line}\n")
        sys.stderr.flush()


def emit(text: str) -> None:
    """The report, on stdout and nowhere else; whatever the stream's encoding can show of it."""
    encoding = sys.stdout.encoding or "utf-8"
    try:
        sys.stdout.write(text.encode(encoding, "backslashreplace").decode(encoding))
        sys.stdout.flush()
    except BrokenPipeError:
        _close_stdout()


def coloured(stream: TextIO, wish: str) -> bool:
    """Whether to colour: --color, then NO_COLOR, then FORCE_COLOR, then a terminal."""
    if wish != "auto":
        return wish == "always"
    if os.environ.get("NO_COLOR"):
        return False
    return bool(os.environ.get("FORCE_COLOR")) or (is_terminal(stream) and not _dumb())


def _dumb() -> bool:
    return os.environ.get("TERM") == "dumb"


def is_terminal(stream: TextIO) -> bool:
    """Whether a stream is a terminal, whatever Rich or the environment think."""
    try:
        return stream.isatty()
    except ValueError:
        return False


def columns(stream: TextIO) -> int | None:
    """Width of a terminal; None for a file or pipe, where nothing is cut."""
    if not is_terminal(stream):
        return None
    try:
        width = os.get_terminal_size(stream.fileno()).columns
    except OSError:
        width = 0
    return int(os.environ.get("COLUMNS", "0") or 0) or width or 80


Tick = Callable[[int, int], None]


@contextmanager
def progress_bar(
    label: str, wanted: bool, of: Literal["bytes", "share"] = "bytes"
) -> Iterator[Tick]:
    """A bar on stderr, drawn only on a terminal and only when work lasts a second."""
    if not wanted or not is_terminal(sys.stderr):
        yield lambda _done, _total: None
        return
    bar = _Bar(label, of)
    try:
        yield bar
    finally:
        bar.close()


@contextmanager
def working(label: str, wanted: bool) -> Iterator[None]:
    """A spinner on stderr for work without a known end, as ``progress_bar`` otherwise."""
    if not wanted or not is_terminal(sys.stderr):
        yield
        return
    from rich.console import Console

    status = Console(stderr=True).status(label)
    timer = threading.Timer(_PATIENCE, status.start)
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()
        status.stop()


class _Bar:
    def __init__(self, label: str, of: Literal["bytes", "share"]) -> None:
        self._label, self._of = label, of
        self._began = time.monotonic()
        self._progress: Any = None
        self._task: Any = None

    def __call__(self, done: int, total: int) -> None:
        if self._progress is None:
            if time.monotonic() - self._began < _PATIENCE:
                return
            self._open(total)
        self._progress.update(self._task, completed=done)

    def _open(self, total: int) -> None:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            Progress,
            TaskProgressColumn,
            TextColumn,
            TimeRemainingColumn,
            TransferSpeedColumn,
        )

        in_bytes = (DownloadColumn(), TransferSpeedColumn())
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            *(in_bytes if self._of == "bytes" else (TaskProgressColumn(),)),
            TimeRemainingColumn(),
            console=Console(file=sys.stderr),
            transient=True,
        )
        self._progress.start()
        self._task = self._progress.add_task(self._label, total=total)

    def close(self) -> None:
        if self._progress is not None:
            self._progress.stop()
