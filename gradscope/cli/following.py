"""``--follow``: the report of a run that is still being recorded, again whenever it has grown."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING

from gradscope.cli.options import Output
from gradscope.cli.terminal import emit, is_terminal, say, screen
from gradscope.report.formats import renderer

if TYPE_CHECKING:
    from gradscope.flow.result import FlowReport

#: Seconds between two looks at the files; an analysis that takes longer waits as long as it took.
INTERVAL = 1.0

#: Shows a report; False when nobody reads it any more.
Show = Callable[["FlowReport"], bool]


def followed(
    path: str,
    analysed: Callable[[], FlowReport],
    shown: AbstractContextManager[Show],
    interval: float = INTERVAL,
) -> FlowReport:
    """Analyse and show a history whenever its files change, until Ctrl-C or a signal to end.

    The last report that was shown. Raises KeyboardInterrupt when there was none.
    """
    last: FlowReport | None = None
    try:
        with _ended_by_signals(), shown as show:
            for report in _reports(path, analysed, interval):
                if report.result is None:
                    say(f"waiting for {path}: {report.errors[0].message}")
                    continue
                last = report
                if not show(report):
                    break
    except KeyboardInterrupt:
        if last is None:
            raise
    assert last is not None
    return last


def _reports(
    path: str, analysed: Callable[[], FlowReport], interval: float
) -> Iterator[FlowReport]:
    seen: object = None
    while True:
        began, now = time.monotonic(), stamp(path)
        if now != seen:
            seen = now
            yield analysed()
        time.sleep(max(interval, time.monotonic() - began))


def stamp(path: str) -> tuple[object, ...]:
    """What changes when a history grows: names, sizes and times of its files."""
    folder = os.path.isdir(path)
    names = sorted(os.listdir(path)) if folder else [path]
    return tuple(_stat(os.path.join(path, name) if folder else name) for name in names)


def _stat(path: str) -> tuple[str, int, int] | None:
    try:
        found = os.stat(path)
    except OSError:  # not there yet, or renamed meanwhile
        return None
    return path, found.st_size, found.st_mtime_ns


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """Let SIGINT, which shells turn off in the background, and SIGTERM end the loop."""
    signals = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(each, signal.default_int_handler) for each in signals]
    try:
        yield
    finally:
        for each, handler in zip(signals, before, strict=True):
            signal.signal(each, handler)


def shown_on_stdout(output: Output) -> AbstractContextManager[Show]:
    """On a terminal one picture that is drawn anew; elsewhere a report whenever findings change."""
    live = is_terminal(sys.stdout) and output.format_ == "table"
    return _drawn(output) if live else _printed(output)


@contextmanager
def _drawn(output: Output) -> Iterator[Show]:
    from rich.live import Live
    from rich.text import Text

    render = renderer(output.format_)
    with Live(auto_refresh=False, transient=True, vertical_overflow="crop") as live:

        def show(report: FlowReport) -> bool:
            text = render(report, screen(output.color, output.detail))
            live.update(Text.from_ansi(text), refresh=True)
            return True

        yield show


@contextmanager
def _printed(output: Output) -> Iterator[Show]:
    render, told = renderer(output.format_), None

    def show(report: FlowReport) -> bool:
        nonlocal told
        findings = {(f.fingerprint, f.severity) for f in report.findings}
        if findings == told:
            return True
        told = findings
        return emit(render(report, screen(output.color, output.detail)))

    yield show
