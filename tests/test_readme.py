"""The README says what is so."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from gradscope.cli import app
from gradscope.weights.calibration import CALIBRATION

README = (Path(__file__).resolve().parents[1] / "README.md").read_text()


def test_the_readme_prints_the_measured_calibration() -> None:
    assert CALIBRATION.sentence in " ".join(README.split())


@pytest.mark.parametrize("command", [c.name for c in app.registered_commands])
def test_every_command_has_an_example(command: str) -> None:
    assert f"gradscope {command} " in README


@pytest.mark.parametrize("line", re.findall(r"^\$ make (\w+)", README, re.MULTILINE))
def test_the_makefile_has_the_targets_of_the_readme(line: str) -> None:
    makefile = (Path(__file__).resolve().parents[1] / "Makefile").read_text()

    assert re.search(rf"^{line}:", makefile, re.MULTILINE)
