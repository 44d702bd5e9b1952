"""Measure ``gradscope weights`` against other programs on the same files, as ratios.

Prints one Markdown table. The files come from make_data.py; weightlens 0.3.0 is installed into
benchmarks/data on first use. What cannot be measured here is reported as such.

Every time is that of a whole process, from start to exit, with the file in the page cache.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import make_data

SMALL_FILE = make_data.DATA.parent.parent / "fixtures" / "digits.safetensors"

WEIGHTLENS = "weightlens==0.3.0"
WEIGHTLENS_HOME = make_data.DATA / ".weightlens"

SAMPLING_SECONDS = 0.02


class NotMeasuredError(Exception):
    """A measurement that this machine cannot make; the message says why."""


class Run(NamedTuple):
    seconds: float
    peak_bytes: int | None  # anonymous memory; None where /proc does not tell


class Command(NamedTuple):
    argv: tuple[str, ...]
    env: Mapping[str, str] | None = None


class Row(NamedTuple):
    what: str
    peer: str
    measured: str
    target: str
    met: str


# --- running ----------------------------------------------------------------------------------


def run(command: Command, sample_memory: bool = False) -> Run:
    """Run a program to its end, without its output; sample its memory only if asked."""
    with tempfile.TemporaryFile() as errors:
        begin = time.perf_counter()
        try:
            process = subprocess.Popen(
                command.argv,
                env=command.env and {**os.environ, **command.env},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=errors,
            )
        except OSError as error:
            raise NotMeasuredError(f"{command.argv[0]} does not start: {error.strerror}") from None
        peak = peak_anonymous(process) if sample_memory else None
        code = process.wait()
        seconds = time.perf_counter() - begin
        if code != 0:
            errors.seek(0)
            said = errors.read().decode(errors="replace").strip().splitlines() or [""]
            name = Path(command.argv[0]).name
            raise NotMeasuredError(f"{name} ended with exit code {code}: {said[-1][:120]}")
    return Run(seconds, peak)


def peak_anonymous(process: subprocess.Popen[bytes]) -> int | None:
    """Watch a process until it ends; return the most anonymous memory it and its children had.

    Pages of a mapped file are left out: the kernel can drop them at any time.
    """
    peak = None
    while process.poll() is None:
        now = sum(anonymous_bytes(pid) for pid in tree(process.pid))
        if now:
            peak = max(peak or 0, now)
        time.sleep(SAMPLING_SECONDS)
    return peak


def anonymous_bytes(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:  # it ended, or there is no /proc
        return 0
    return sum(1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon:"))


def tree(pid: int) -> list[int]:
    """Return the process and all its descendants."""
    try:
        tasks = list(Path(f"/proc/{pid}/task").iterdir())
        children = [
            int(child) for task in tasks for child in (task / "children").read_text().split()
        ]
    except OSError:
        children = []
    return [pid, *(descendant for child in children for descendant in tree(child))]


def medians(commands: Sequence[Command], repeats: int) -> list[float | NotMeasuredError]:
    """Return the median time of each command, run in turns so that drift of the machine cancels.

    A command that fails is not run again, and its error takes the place of its time.
    """
    times: list[list[float]] = [[] for _ in commands]
    failures: dict[int, NotMeasuredError] = {}
    for _ in range(repeats):
        for index, command in enumerate(commands):
            if index in failures:
                continue
            try:
                times[index].append(run(command).seconds)
            except NotMeasuredError as error:
                failures[index] = error
    return [failures.get(index) or statistics.median(times[index]) for index in range(len(times))]


# --- the programs -----------------------------------------------------------------------------


def default_gradscope() -> str:
    """Return the gradscope of this environment, else the one on the path."""
    beside = Path(sys.executable).with_name("gradscope")
    return shlex.quote(str(beside) if beside.exists() else shutil.which("gradscope") or "gradscope")


def gradscope_weights(gradscope: Sequence[str], path: Path) -> Command:
    options = ("--format", "json", "--fail-on", "never")
    return Command((*gradscope, "weights", str(path), *options))


def sha256sum(path: Path) -> Command:
    return Command(("sha256sum", str(path)))


def cat(path: Path) -> Command:
    return Command(("cat", str(path)))


def weightlens(path: Path) -> Command:
    """Return weightlens on a file; installs it first.

    Only weightlens itself goes into a folder of its own. All it needs (torch, numpy, pydantic,
    rich) gradscope needs too, and a second copy of torch would be gigabytes.
    """
    script = WEIGHTLENS_HOME / "bin" / "lens"
    if not script.exists():
        pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps"]
        command = [*pip, "--target", str(WEIGHTLENS_HOME), WEIGHTLENS]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if not script.exists():
            said = done.stderr.strip().splitlines() or [""]
            raise NotMeasuredError(f"{WEIGHTLENS} cannot be installed: {said[-1][:120]}")
    argv = (sys.executable, str(script), "analyze", str(path))
    return Command(argv, env={"PYTHONPATH": str(WEIGHTLENS_HOME)})


# --- the rows ---------------------------------------------------------------------------------


def seconds(value: float) -> str:
    return f"{value:.2f} s"


def row(
    what: str,
    peer: str,
    target: str,
    measure: Callable[[], tuple[str, bool]],
) -> Row:
    try:
        measured, met = measure()
    except NotMeasuredError as error:
        return Row(what, peer, f"not measured: {error}", target, "–")
    return Row(what, peer, measured, target, "yes" if met else "no")


def valid(value: float | NotMeasuredError) -> float:
    if isinstance(value, NotMeasuredError):
        raise value
    return value


def at_most(
    limit: float, own: float | NotMeasuredError, peer: float | NotMeasuredError
) -> Callable[[], tuple[str, bool]]:
    """Measure own time over the peer's; met when no more than ``limit``."""

    def measure() -> tuple[str, bool]:
        mine, theirs = valid(own), valid(peer)
        return f"{mine / theirs:.2f}× ({seconds(mine)} / {seconds(theirs)})", mine <= limit * theirs

    return measure


def memory_of(command: Command) -> float | NotMeasuredError:
    """Return the peak of anonymous memory in MB. Also the run that warms what is cached."""
    try:
        peak = run(command, sample_memory=True).peak_bytes
    except NotMeasuredError as error:
        return error
    return NotMeasuredError("/proc does not tell here") if peak is None else peak / 1e6


def memory_row(what: str, megabytes: float | NotMeasuredError) -> Row:
    def measure() -> tuple[str, bool]:
        value = valid(megabytes)
        return f"{value:.0f} MB", value <= 300

    return row(f"{what}, anonymous memory", "–", "≤ 300 MB", measure)


def large_file(
    what: str,
    gradscope: Sequence[str],
    path: Path,
    repeats: int,
    limit: float,
    cat_goal: float | None = None,
) -> tuple[list[Row], float | NotMeasuredError]:
    """Return the rows of one large file, and gradscope's time on it."""
    own = gradscope_weights(gradscope, path)
    run(cat(path))  # into the page cache
    memory = memory_of(own)
    mine, hashing, reading = medians([own, sha256sum(path), cat(path)], repeats)
    rows = [row(what, "sha256sum", f"≤ {limit}×", at_most(limit, mine, hashing))]
    if cat_goal:
        rows.append(row(what, "cat", f"goal: {cat_goal}×", at_most(cat_goal, mine, reading)))
    return [*rows, memory_row(what, memory)], mine


def weightlens_rows(what: str, path: Path, own: float | NotMeasuredError) -> list[Row]:
    """Run weightlens once: it is slow, and a few per cent do not matter at this distance."""

    def measure() -> tuple[str, bool]:
        mine = valid(own)
        theirs = run(weightlens(path), sample_memory=True)
        memory = "" if theirs.peak_bytes is None else f", {theirs.peak_bytes / 1e6:.0f} MB"
        times = f"{seconds(theirs.seconds)}{memory} / {seconds(mine)}"
        return f"{theirs.seconds / mine:.1f}× faster ({times})", theirs.seconds >= 20 * mine

    return [row(what, WEIGHTLENS.replace("==", " "), "≥ 20× faster", measure)]


def start_rows(gradscope: Sequence[str], repeats: int) -> list[Row]:
    """Return the rows about starting: a small file, and the help page."""
    typer = Command((sys.executable, "-c", "import typer"))
    commands = [gradscope_weights(gradscope, SMALL_FILE), Command((*gradscope, "--help")), typer]
    small, page, importing = medians(commands, repeats)

    def measure() -> tuple[str, bool]:
        return seconds(valid(small)), valid(small) < 1

    return [
        row(f"`weights`, {SMALL_FILE.name}", "–", "< 1 s", measure),
        row("`--help`", "`python -c 'import typer'`", "≤ 3×", at_most(3, page, importing)),
    ]


def table(rows: Sequence[Row]) -> str:
    head = Row("what", "peer", "measured", "target", "met?")
    rule = Row(*["---"] * len(head))
    cells = ([cell.replace("|", "\\|") for cell in line] for line in (head, rule, *rows))
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gradscope", default=default_gradscope(), help="the command to measure")
    parser.add_argument("--repeats", type=int, default=3, help="runs on large files (median)")
    parser.add_argument("--no-weightlens", action="store_true", help="leave out the slow peer")
    arguments = parser.parse_args()
    gradscope = shlex.split(arguments.gradscope)

    bf16, f32 = make_data.make(make_data.BF16), make_data.make(make_data.F32)
    rows, own = large_file("`weights`, 2 GB bf16", gradscope, bf16, arguments.repeats, 0.25, 3)
    if not arguments.no_weightlens:
        rows += weightlens_rows("`weights`, 2 GB bf16", bf16, own)
    rows += large_file("`weights`, 1 GB f32", gradscope, f32, arguments.repeats, 0.45)[0]
    rows += start_rows(gradscope, repeats=7)
    print(table(rows))
    print(f"\n{os.cpu_count()} cores, Python {sys.version.split()[0]}")


if __name__ == "__main__":
    main()
