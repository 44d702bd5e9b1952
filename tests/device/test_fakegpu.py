"""Runs on_*.py in processes of their own: a torch device once registered stays."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
NONE_COLLECTED = 5  # pytest's exit code when the module skipped itself


@pytest.mark.parametrize("name", [path.name for path in sorted(HERE.glob("on_*.py"))])
def test_on_fakegpu(name: str) -> None:
    paths = os.pathsep.join([str(HERE), str(HERE.parent / "statistics")])
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:xdist"]
    command += [str(HERE / name)]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=900,
        cwd=HERE.parent.parent,
        env={**os.environ, "PYTHONPATH": paths + os.pathsep + os.environ.get("PYTHONPATH", "")},
    )
    if done.returncode == NONE_COLLECTED:
        pytest.skip(done.stdout[-300:])
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout
