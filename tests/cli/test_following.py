"""``flow --follow``: shards that arrive, what is shown of them, and how it ends."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest

from gradscope.cli.following import followed, stamp
from gradscope.flow.analysis import analyze_flow
from gradscope.flow.result import FlowReport
from gradscope.histories.format import write

RECORDS = 50
PATIENCE = 60


def shard(folder: Path, number: int, growth: float = 0.0) -> None:
    """The next records of a run of three layers, put in place by a rename as the recorder does."""
    steps = np.arange(number * RECORDS, (number + 1) * RECORDS)
    norms = np.exp(np.random.default_rng(number).normal(0, 0.1, (RECORDS, 3)))
    norms *= np.exp(growth * np.arange(RECORDS))[:, None]
    arrays = {
        "steps": steps,
        "layer/name": np.array(["a", "b", "c"]),
        "layer/kind": np.full(3, "matrix"),
        "layer/numel": np.full(3, 100),
        "grad/l2": norms.astype(np.float32),
    }
    write(folder / f"{number:05d}.npz", arrays, {})


# --- the loop -------------------------------------------------------------------------------------


def looked(folder: Path, events: Iterator[Callable[[], None]]) -> list[int]:
    """How many records each report had that was shown; an event happens after each of them."""
    shown: list[int] = []

    def show(report: FlowReport) -> bool:
        shown.append(report.result.steps)
        next(events)()
        return True

    followed(str(folder), lambda: analyze_flow(str(folder)), nullcontext(show), interval=0.01)
    return shown


def interrupt() -> None:
    raise KeyboardInterrupt


def test_each_new_shard_is_looked_at_once_until_ctrl_c(tmp_path: Path) -> None:
    shard(tmp_path, 0)
    events = iter([lambda: shard(tmp_path, 1), lambda: shard(tmp_path, 2), interrupt])

    assert looked(tmp_path, events) == [50, 100, 150]


def test_nothing_is_read_again_while_nothing_changes(tmp_path: Path) -> None:
    shard(tmp_path, 0)
    reads: list[float] = []

    def analysed() -> FlowReport:
        reads.append(time.monotonic())
        signal.setitimer(signal.ITIMER_REAL, 0.5)
        return analyze_flow(str(tmp_path))

    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    try:
        followed(str(tmp_path), analysed, nullcontext(lambda _: True), interval=0.01)
    finally:
        signal.signal(signal.SIGALRM, before)
    assert len(reads) == 1


def test_the_last_report_is_the_result_and_none_is_an_interrupt(tmp_path: Path) -> None:
    shard(tmp_path, 0)

    def show(_: FlowReport) -> bool:
        raise KeyboardInterrupt

    last = followed(str(tmp_path), lambda: analyze_flow(str(tmp_path)), nullcontext(show))
    assert last.result.steps == 50

    def interrupted() -> FlowReport:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        followed(str(tmp_path), interrupted, nullcontext(show))


def test_a_reader_that_has_gone_ends_it(tmp_path: Path) -> None:
    shard(tmp_path, 0)

    followed(str(tmp_path), lambda: analyze_flow(str(tmp_path)), nullcontext(lambda _: False))


def test_signals_are_handled_as_before_afterwards(tmp_path: Path) -> None:
    shard(tmp_path, 0)
    before = signal.getsignal(signal.SIGTERM)

    followed(str(tmp_path), lambda: analyze_flow(str(tmp_path)), nullcontext(lambda _: False))

    assert signal.getsignal(signal.SIGTERM) == before


def test_a_stamp_changes_with_every_new_or_longer_file(tmp_path: Path) -> None:
    stamps = [stamp(str(tmp_path / "missing"))]
    for act in (
        lambda: (tmp_path / "a.npz").write_bytes(b"1"),
        lambda: (tmp_path / "b.npz").write_bytes(b"1"),
        lambda: (tmp_path / "b.npz").write_bytes(b"12"),
    ):
        act()
        stamps.append(stamp(str(tmp_path)))

    assert len(set(stamps)) == 4
    assert stamp(str(tmp_path)) == stamps[-1]


# --- the command ----------------------------------------------------------------------------------


def command(folder: Path, *options: str) -> list[str]:
    return [sys.executable, "-m", "gradscope", "flow", str(folder), "--follow", *options]


def started(folder: Path, *options: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command(folder, *options),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def read_until(stream: object, wanted: str) -> str:
    """What a pipe brings up to a line with some words; pytest's own limit ends a wait in vain."""
    text = ""
    for line in stream:  # type: ignore[attr-defined]
        text += line
        if wanted in line:
            return text
    raise AssertionError(f"{wanted!r} did not come:\n{text}")


def test_off_a_terminal_a_report_is_printed_whenever_the_findings_change(tmp_path: Path) -> None:
    run = started(tmp_path)
    assert "waiting for" in read_until(run.stderr, "waiting")
    shard(tmp_path, 0)
    assert "50 records" in read_until(run.stdout, "PASSED")
    shard(tmp_path, 1)
    shard(tmp_path, 2, growth=0.2)
    assert "exploding-gradient" in read_until(run.stdout, "FAILED")
    run.send_signal(signal.SIGINT)
    rest, said = run.communicate(timeout=PATIENCE)

    assert rest.count("FAILED") == 1  # the report at the end
    assert run.returncode == 1
    assert "Traceback" not in said


def test_a_signal_to_end_does_so_with_the_exit_code_of_the_last_state(tmp_path: Path) -> None:
    shard(tmp_path, 0)
    run = started(tmp_path, "--format", "json")
    first = json.loads(_document(run))
    run.terminate()
    rest, _ = run.communicate(timeout=PATIENCE)

    assert first["result"]["steps"] == json.loads(rest)["result"]["steps"] == 50
    assert run.returncode == 0


def _document(run: subprocess.Popen[str]) -> str:
    """The next whole JSON document of a process."""
    text = ""
    assert run.stdout is not None
    for line in run.stdout:
        text += line
        try:
            json.loads(text)
        except ValueError:
            continue
        return text
    raise AssertionError(text)


def test_interrupted_before_anything_was_shown_it_is_130(tmp_path: Path) -> None:
    run = started(tmp_path / "not-yet")
    read_until(run.stderr, "waiting")
    run.send_signal(signal.SIGINT)
    out, _ = run.communicate(timeout=PATIENCE)

    assert out == ""
    assert run.returncode == 130


def test_an_ambiguous_file_is_a_wrong_request_at_once(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", a=np.ones(20), b=np.ones(20))

    done = subprocess.run(
        command(tmp_path / "x.npz"), capture_output=True, text=True, check=False, timeout=PATIENCE
    )

    assert done.returncode == 2
    assert "--as norms" in done.stderr


def test_on_a_terminal_one_picture_is_redrawn_and_the_last_one_stays(tmp_path: Path) -> None:
    shard(tmp_path, 0)
    shard(tmp_path, 1, growth=0.2)
    master, slave = pty.openpty()
    run = subprocess.Popen(
        command(tmp_path), stdout=slave, stderr=slave, env={**os.environ, "TERM": "xterm"}
    )
    os.close(slave)
    seen = b""
    while b"exploding-gradient" not in seen:
        seen += os.read(master, 65536)
    run.send_signal(signal.SIGINT)
    try:
        while piece := os.read(master, 65536):
            seen += piece
    except OSError:  # how a terminal whose other end was closed ends
        pass

    assert run.wait(timeout=PATIENCE) == 1
    assert seen.rstrip().endswith(b"exit 1: 1 finding at or above high")


def test_against_another_run_is_shown_while_following(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        shard(tmp_path / name, 0)
    run = started(tmp_path / "a", "--against", str(tmp_path / "b"))
    text = read_until(run.stdout, "PASSED")
    run.terminate()
    run.communicate(timeout=PATIENCE)

    assert "Against" in text
    assert "no layer's gradient level differs" in text
