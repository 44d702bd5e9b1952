"""What commands share of the outside world: streams, colours, progress, the end of the process."""

from __future__ import annotations

import atexit
import codecs
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from typing import Any, Literal, NoReturn, TextIO

from gradscope.errors import OutputError
from gradscope.report.formats import Display
from gradscope.text import escaped

#: What stands for a report's own signs where an encoding lacks them, one for one: columns stay.
_SIGNS = str.maketrans("→←·×–−…━±‖", "><-x--~=~|")
#: How what an encoding lacks is written: those, and everything else escaped.
_PLAIN = "gradscope.plain"
#: Seconds before anything is drawn.
_PATIENCE = 0.8


def hold_streams() -> None:
    """Put the null device in the place of each standard stream that was closed.

    A file opened later would take its number, and be written to by whatever prints.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115  for the process's life
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115


def leave(code: int) -> NoReturn:
    """End a command."""
    sys.exit(code)


def end_process(code: int) -> NoReturn:
    """Exit without unloading the compiler behind the kernels, which takes a third of a second."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    atexit._run_exitfuncs()
    os._exit(code)


@contextmanager
def without_prints() -> Iterator[None]:
    """Send what a model's own code prints to stderr: stdout is the report's."""
    with redirect_stdout(sys.stderr):
        yield


def use_threads(jobs: int | None) -> None:
    """Let torch use so many threads; by default one per core."""
    if jobs is not None:
        import torch

        torch.set_num_threads(jobs)


def _discard_stdout() -> None:
    """Let whatever is still written, and what is still buffered, vanish."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def say(message: str) -> None:
    """One line on stderr, control characters escaped."""
    with suppress(OSError, ValueError):
        sys.stderr.write(f"gradscope: {escaped(message)}\n")
        sys.stderr.flush()


def _plain(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeEncodeError)
    lacking = error.object[error.start : error.end].translate(_SIGNS)
    return lacking.encode("ascii", "backslashreplace").decode(), error.end


codecs.register_error(_PLAIN, _plain)


def emit(text: str) -> bool:
    """The report, on stdout and nowhere else; whatever the stream's encoding can show of it.

    A reader that has gone away is not an error; the result says whether there is one. Raises
    OutputError for a full disk.
    """
    encoding = sys.stdout.encoding or "utf-8"
    try:
        sys.stdout.write(text.encode(encoding, _PLAIN).decode(encoding))
        sys.stdout.flush()
    except BrokenPipeError:
        _discard_stdout()
        return False
    except OSError as error:
        _discard_stdout()
        raise OutputError("stdout", error.strerror or str(error)) from error
    return True


def screen(color: str, detail: int) -> Display:
    """How a report is shown on stdout."""
    unicode = (sys.stdout.encoding or "").lower().replace("-", "").startswith("utf")
    root = os.getcwd()
    return Display(columns(sys.stdout), coloured(sys.stdout, color), unicode, detail, root)


def saved(path: str) -> Any:
    """A saved report, of a file or of stdin (``-``). Raises InputError."""
    from gradscope.saved import read_report

    return read_report(sys.stdin.buffer if path == "-" else path)


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
    wish = os.environ.get("COLUMNS", "")
    return int(wish) if wish.isdecimal() and int(wish) > 0 else width or 80


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
