"""One run in every format that can carry it: the same findings with the same severity."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gradscope import analyze_flow
from gradscope.histories.format import write
from gradscope.histories.history import History, Status
from gradscope.histories.open import open_history
from tests.conftest import ROOT
from tests.histories.files import event, tfrecords

RUNS = ("cnn", "diverging", "dying", "plain", "residual")
Found = set[tuple[str, str, str]]


def sides(run: History) -> dict[str, np.ndarray[Any, Any]]:
    found = {"loss": run.loss, "lr": None if run.lr is None else run.lr[:, 0]}
    return {name: values for name, values in found.items() if values is not None}


def cells(run: History) -> Iterator[tuple[int, dict[str, float], dict[str, float]]]:
    """Step, what is of the whole run, and the norms that were recorded."""
    for t, step in enumerate(run.steps.tolist()):
        whole = {name: float(values[t]) for name, values in sides(run).items()}
        norms = {
            layer.name: float(run.l2[t, row])
            for row, layer in enumerate(run.layers)
            if run.status[t, row] == Status.RECORDED
        }
        yield step, whole, norms


def native(run: History, folder: Path) -> Path:
    names = np.array([layer.name for layer in run.layers])
    arrays: dict[str, Any] = {
        "steps": run.steps, "layer/name": names, "grad/l2": run.l2, "grad/status": run.status,
    }  # fmt: skip
    for name, values in sides(run).items():
        arrays[name] = values[:, None] if name == "lr" else values
    write(folder / "00000.npz", arrays, {})
    return folder / "00000.npz"


def arrays_of(run: History) -> dict[str, np.ndarray[Any, Any]]:
    norms = {layer.name: np.ascontiguousarray(run.l2[:, i]) for i, layer in enumerate(run.layers)}
    return {"steps": run.steps, **sides(run), **norms}


def npz(run: History, folder: Path) -> Path:
    np.savez(folder / "norms.npz", **arrays_of(run))
    return folder / "norms.npz"


def safetensors(run: History, folder: Path) -> Path:
    from safetensors.numpy import save_file

    save_file(arrays_of(run), folder / "norms.safetensors")
    return folder / "norms.safetensors"


def table(prefix: str) -> Callable[[History, Path], Path]:
    """A wide table whose columns are the layers' names behind a prefix."""

    def written(run: History, folder: Path) -> Path:
        columns = ["step", *sides(run), *(prefix + layer.name for layer in run.layers)]
        with open(folder / "wide.csv", "w", newline="") as file:
            rows = csv.DictWriter(file, columns)
            rows.writeheader()
            for step, whole, norms in cells(run):
                rows.writerow(
                    {"step": step, **whole, **{prefix + name: v for name, v in norms.items()}}
                )
        return folder / "wide.csv"

    return written


def long(run: History, folder: Path) -> Path:
    with open(folder / "long.csv", "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["step", "layer", "value", *sides(run)])
        for step, whole, norms in cells(run):
            rows.writerows([step, name, value, *whole.values()] for name, value in norms.items())
    return folder / "long.csv"


def lines(shape: Callable[[dict[str, float]], dict[str, Any]]) -> Callable[[History, Path], Path]:
    def written(run: History, folder: Path) -> Path:
        rows = ({"step": step, **whole, **shape(norms)} for step, whole, norms in cells(run))
        (folder / "run.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return folder / "run.jsonl"

    return written


def nested(norms: dict[str, float]) -> dict[str, Any]:
    """``{"layers": {"conv1": {"weight": {"grad_norm": …}}}}``."""
    found: dict[str, Any] = {}
    for name, value in norms.items():
        module, _, parameter = name.rpartition(".")
        found.setdefault(module, {})[parameter] = {"grad_norm": value, "weight_norm": 7.0}
    return {"layers": found}


def parquet(run: History, folder: Path) -> Path:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet as files

    rows = [
        {"_step": step, **whole, **{f"gradients/{name}": v for name, v in norms.items()}}
        for step, whole, norms in cells(run)
    ]
    files.write_table(pyarrow.Table.from_pylist(rows), folder / "run.parquet")
    return folder / "run.parquet"


def events(run: History, folder: Path) -> Path:
    """The loss at every step, norms at those that were recorded."""
    logged = [
        event(step, tag, value)
        for step, whole, norms in cells(run)
        for tag, value in [*whole.items(), *((f"grad_norm/{n}", v) for n, v in norms.items())]
    ]
    (folder / "events.out.tfevents.1.x").write_bytes(tfrecords(logged))
    return folder / "events.out.tfevents.1.x"


def between(run: History, folder: Path) -> Path:
    """Losses also between the records of gradients, as loops log them."""
    rows: list[dict[str, Any]] = []
    for step, whole, norms in cells(run):
        gap = int(run.steps[1] - run.steps[0])
        rows += [{"step": step * 2 - gap, **whole}] if step else []
        rows.append({"step": step * 2, **whole, **{f"grad_norm/{n}": v for n, v in norms.items()}})
    (folder / "run.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "run.jsonl"


FORMATS = {
    "npz": npz,
    "safetensors": safetensors,
    "wide": table("grad_norm/"),
    "W&B's chart": table("run-1 - gradients/"),
    "nested prefix": table("norms/grad_norm/"),
    "plain names": table(""),
    "long": long,
    "json lines": lines(lambda norms: {f"{name}/grad_norm": v for name, v in norms.items()}),
    "plain json": lines(lambda norms: norms),
    "json by layer": lines(nested),
    "list of layers": lines(
        lambda norms: {"layers": [{"name": n, "grad_norm": v} for n, v in norms.items()]}
    ),
    "losses between": between,
    "parquet": parquet,
    "events": events,
}


def found(path: Path) -> Found:
    """Rule, severity and subject, whatever joins a module and its parameter."""
    report = analyze_flow(path)
    assert report.errors == ()
    return {(f.rule, f.severity.value, f.subject.replace("/", ".")) for f in report.findings}


@pytest.fixture(scope="session", params=RUNS)
def run(request: pytest.FixtureRequest, histories: None) -> History:
    return open_history(str(ROOT / "fixtures" / "recorded" / request.param))


@pytest.fixture(scope="session")
def wanted(run: History, tmp_path_factory: pytest.TempPathFactory) -> Found:
    """The findings in a native file that holds what every format can: norms, losses, rates."""
    return found(native(run, tmp_path_factory.mktemp("native")))


@pytest.mark.parametrize("form", FORMATS)
def test_a_run_has_the_same_findings_in_every_format(
    form: str, run: History, wanted: Found, tmp_path: Path
) -> None:
    assert found(FORMATS[form](run, tmp_path)) == wanted


def test_what_a_native_file_says_more_changes_no_high_finding(run: History, wanted: Found) -> None:
    whole = analyze_flow(run)
    grave = {f.rule for f in whole.findings if f.severity in ("high", "critical")}

    assert {rule for rule, severity, _ in wanted if severity in ("high", "critical")} == grave
