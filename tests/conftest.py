"""What every test stands on: workers that do not fight, and training runs recorded on demand."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from filelock import FileLock

ROOT = Path(__file__).resolve().parents[1]
RUNS = ("cnn", "transformer", "diverging", "dying", "plain", "residual")

if worker := os.environ.get("PYTEST_XDIST_WORKER"):
    # Before torch and numba are imported, and for the processes that tests start.
    workers = int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    threads = max(1, (os.cpu_count() or 1) // workers)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    # Two processes that add to numba's index of compiled functions may overwrite each other's code.
    os.environ.setdefault("NUMBA_CACHE_DIR", str(ROOT / ".pytest_cache" / "numba" / worker))


@pytest.fixture(scope="session")
def histories() -> None:
    """Record the training runs that are not there, in ten seconds; one worker does it."""
    folder = ROOT / "fixtures" / "recorded"
    folder.mkdir(exist_ok=True)
    with FileLock(folder / ".lock"):
        if not all((folder / name).is_dir() for name in RUNS):
            make = [sys.executable, str(ROOT / "fixtures" / "make.py"), "histories"]
            subprocess.run(make, check=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
