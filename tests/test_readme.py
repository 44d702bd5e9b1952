"""The README says what is so: its examples run and print what it shows."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from gradscope.cli import app
from gradscope.formats import CHECKPOINT, families
from gradscope.report.formats.json_ import render
from gradscope.weights.analysis import analyze_weights
from gradscope.weights.calibration import CALIBRATION

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
#: (command line, what it prints) of each example.
EXAMPLES = [
    (command, shown)
    for block in re.findall(r"```console\n(.*?)```", README, re.DOTALL)
    for command, shown in re.findall(r"^\$ (gradscope .*?)\n(.*?)(?=^\$ |\Z)", block, re.M | re.S)
]


def test_the_guide_prints_the_measured_calibration() -> None:
    assert CALIBRATION.sentence in " ".join((ROOT / "docs" / "weights.md").read_text().split())


@pytest.mark.parametrize("command", [c.name for c in app.registered_commands])
def test_every_command_has_an_example(command: str) -> None:
    assert any(line.startswith(f"gradscope {command} ") for line, _ in EXAMPLES)


def _needs_fetching(command: str) -> bool:
    return any(not (ROOT / path).exists() for path in re.findall(r"fixtures/fetched/\S+", command))


def _part(job: int, jobs: int, folder: Path) -> str:
    """The report of one of several jobs about a fixture."""
    path = folder / f"part-{job}.json"
    report = analyze_weights(ROOT / "fixtures" / "digits.safetensors", shard=f"{job}/{jobs}")
    path.write_text(render(report))
    return str(path)


@pytest.mark.parametrize(("command", "shown"), EXAMPLES, ids=[c[:40] for c, _ in EXAMPLES])
def test_every_example_prints_what_is_shown(command: str, shown: str, tmp_path: Path) -> None:
    if _needs_fetching(command):
        pytest.skip("run `make fixtures`")
    program = [sys.executable, "-m", *shlex.split(command, comments=True)]
    if "--method" in command or "--target" in command:
        program += ["--output", str(tmp_path)]
    if "accepted.json" in program:
        program[program.index("accepted.json")] = str(tmp_path / "accepted.json")
    for place, word in enumerate(program):
        if (number := re.fullmatch(r"part-(\d)\.json", word)) is not None:
            program[place] = _part(int(number[1]), 2, tmp_path)
    plain = {k: v for k, v in os.environ.items() if k not in ("FORCE_COLOR", "COLUMNS")}

    done = subprocess.run(program, cwd=ROOT, capture_output=True, text=True, env=plain)

    assert "Traceback" not in done.stderr
    at = 0
    printed = " ".join(done.stdout.split())
    for part in shown.split("[…]"):
        words = " ".join(part.split())
        found = printed.find(words, at)
        assert found >= 0, f"not printed: {words}\n\n{done.stdout}{done.stderr}"
        at = found + len(words)


@pytest.mark.parametrize("line", re.findall(r"^\$ make (\w+)", README, re.MULTILINE))
def test_the_makefile_has_the_targets_of_the_readme(line: str) -> None:
    makefile = (ROOT / "Makefile").read_text()

    assert re.search(rf"^{line}:", makefile, re.MULTILINE)


def test_the_table_of_formats_is_the_table_that_readers_are_found_by() -> None:
    rows = re.findall(r"^\| ([\w. ]+?) \| (`.*?`) \|", README, re.MULTILINE)
    shown = {family: tuple(re.findall(r"`(.*?)`", files)) for family, files in rows}

    known = families(*CHECKPOINT) | families("history")
    del known["arrays of norms or gradients"]  # the column of `flow` says which rows hold those
    assert shown == known


def test_links_lead_to_files_that_are_there() -> None:
    links = re.findall(r"\]\(([^)#]+)\)", README)

    assert [link for link in links if not (ROOT / link).exists()] == []


def test_it_is_short() -> None:
    assert len(README.splitlines()) < 180
