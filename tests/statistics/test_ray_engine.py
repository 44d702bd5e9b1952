"""The engine of a cluster: the same bytes as threads, and what it cannot do is said first."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gradscope
from gradscope.errors import InputError, UsageError
from gradscope.report.formats.json_ import render
from gradscope.statistics import engine_for

from ..weights.checkpoints import gaussian, lora, transformer, write

# -- without Ray ----------------------------------------------------------------------------------


def test_without_ray_the_remedy_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UsageError, match=r"pip install 'gradscope-diagnostics\[ray\]'"):
        gradscope.analyze_weights("a.safetensors", engine="ray")


def test_an_engine_that_there_is_not_is_refused() -> None:
    with pytest.raises(UsageError, match="--engine is local or ray, not 'dask'"):
        gradscope.analyze_weights("a.safetensors", engine="dask")


@pytest.mark.parametrize(
    ("options", "said"), [({"device": "cuda"}, "--device"), ({"budget": "5m"}, "--budget")]
)
def test_what_only_one_machine_has_is_refused(options: dict[str, Any], said: str) -> None:
    options = {"spectral": True, "engine": "ray"} | options
    with pytest.raises(UsageError, match=said):
        gradscope.analyze_weights("a.safetensors", **options)


# -- with Ray -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ray() -> Iterator[Any]:
    """Ray on two cores of this machine."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ray = pytest.importorskip("ray", reason="of the extra ray")
        # Workers import this test's modules, and gradscope, from where they are here.
        found = os.pathsep.join(filter(None, (*sys.path, os.environ.get("PYTHONPATH"))))
        ray.init(
            num_cpus=2,
            include_dashboard=False,
            log_to_driver=False,
            runtime_env={"env_vars": {"PYTHONPATH": found}},
        )
        yield ray
        ray.shutdown()


pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::ResourceWarning")


def test_results_come_in_the_order_of_their_tasks(ray: Any) -> None:
    double = engine_for("ray", 3)(lambda n: 2 * n, iter(range(50)))
    assert list(double) == [2 * n for n in range(50)]


def test_an_error_that_is_meant_for_the_user_comes_back_as_it_was(ray: Any) -> None:
    def fails(path: str) -> None:
        raise InputError(path, "changed", "changed while it was being read")

    with pytest.raises(InputError) as caught:
        list(engine_for("ray")(fails, ["a.safetensors"]))
    error = caught.value
    assert (error.path, error.kind, error.exit_code) == ("a.safetensors", "changed", 3)


@pytest.mark.parametrize("options", [{}, {"spectral": True}, {"cast": ["int8"], "snr": "30dB"}])
def test_reports_are_those_of_threads(options, ray, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # paths are relative to it, in every process
    write(tmp_path / "a.safetensors", transformer(layers=2))
    write(tmp_path / "adapter_model.safetensors", lora(layers=2))
    paths = ("a.safetensors", "adapter_model.safetensors")
    spread = gradscope.analyze_weights(*paths, **options, engine="ray")
    assert render(spread) == render(gradscope.analyze_weights(*paths, **options))


def test_drift_is_that_of_threads(ray: Any, tmp_path: Path) -> None:
    base = transformer(layers=2) | {"a.empty": np.zeros((0, 4), np.float32)}
    new = {name: value * np.float32(1.01) for name, value in base.items()}
    rank_one = gaussian(32, 1, seed=5) @ gaussian(1, 32, seed=6)
    new["model.layers.1.self_attn.q_proj.weight"] += 30 * rank_one
    paths = [write(tmp_path / "1.safetensors", base), write(tmp_path / "2.safetensors", new)]
    spread = gradscope.analyze_drift(*paths, engine="ray")
    assert render(spread) == render(gradscope.analyze_drift(*paths))


def test_a_share_of_a_cluster_is_a_share(ray: Any, tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", transformer(layers=2))
    spread = gradscope.analyze_weights(path, shard="1/2", engine="ray")
    assert render(spread) == render(gradscope.analyze_weights(path, shard="1/2"))


def test_stdout_is_the_report_alone(ray: Any, tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", transformer(layers=1))
    line = ["weights", str(path), "-f", "json", "--isolated", "--engine"]
    one, other = (
        subprocess.run(
            [sys.executable, "-m", "gradscope", *line, engine], capture_output=True, text=True
        )
        for engine in ("ray", "local")
    )
    assert (one.returncode, one.stdout) == (0, other.stdout), one.stderr
