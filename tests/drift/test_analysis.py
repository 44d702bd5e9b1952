"""`drift` as scripts and CI see it: what is compared, exit codes, bad inputs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import torch
from pairs import drawn, drift, found, model, only, written

import gradscope
from gradscope.cli.schema import report_schema
from gradscope.report.formats import Display, renderer
from gradscope.report.model import as_json


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "gradscope", "drift", *arguments],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip


@pytest.fixture
def base(tmp_path: Path) -> str:
    return written(tmp_path / "base.safetensors", model())


def test_identical_files_pass(tmp_path: Path, base: str) -> None:
    new = written(tmp_path / "new.safetensors", model())

    report = gradscope.analyze_drift(base, new)

    assert report.gate.exit_code == 0
    assert report.result is not None
    assert report.result.counts == {"identical": len(model())}
    assert (report.result.mean_drift, report.result.max_drift) == (0.0, 0.0)
    assert report.coverage.analyzed == report.coverage.total == len(model())


def test_a_file_against_itself_is_identical(base: str) -> None:
    assert gradscope.analyze_drift(base, base).gate.exit_code == 0


def test_swapped_order_swaps_what_was_added(tmp_path: Path, base: str) -> None:
    more = written(tmp_path / "more.safetensors", model() | {"more.weight": drawn(3, 3)})

    there, back = gradscope.analyze_drift(base, more), gradscope.analyze_drift(more, base)

    assert (only(there, "more.weight").status, only(back, "more.weight").status) == (
        "added", "removed"
    )  # fmt: skip


def test_disjoint_files_are_inconclusive(tmp_path: Path, base: str) -> None:
    other = written(tmp_path / "other.safetensors", {"a": drawn(3, 3), "b": drawn(5)})

    report = gradscope.analyze_drift(base, other)

    assert report.gate.exit_code == 4
    assert report.coverage.analyzed == 0
    assert found(report) == {"tensor-set-changed": ["medium", "medium"]}


@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("damage", ["missing", "empty", "junk", "truncated"])
def test_a_bad_file_on_either_side_is_exit_3(
    tmp_path: Path, base: str, side: int, damage: str
) -> None:
    bad = tmp_path / "bad.safetensors"
    content = Path(base).read_bytes()
    if damage != "missing":
        bad.write_bytes({"empty": b"", "junk": b"junk" * 99, "truncated": content[:-99]}[damage])
    paths = [base, str(bad)] if side else [str(bad), base]

    report = gradscope.analyze_drift(*paths)

    assert report.gate.exit_code == 3
    assert [e.input for e in report.errors] == [str(bad)]
    assert base in [i.path for i in report.inputs]
    jsonschema.validate(as_json(report), report_schema())


@pytest.mark.parametrize("headers_only", [False, True])
@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("lost", ["end", "shard"])
def test_what_one_side_has_but_could_not_be_read_is_no_change_of_the_set(
    lost: str, swapped: bool, headers_only: bool, tmp_path: Path, base: str
) -> None:
    if lost == "shard":
        broken = sharded(tmp_path)
        (broken / "model-00001-of-00002.safetensors").unlink()
    else:
        broken = tmp_path / "broken.safetensors"
        broken.write_bytes(Path(base).read_bytes()[:-20_000])
    pair = (broken, base) if swapped else (base, broken)

    asked = [] if headers_only else [next(reversed(model())), next(iter(model()))]
    report = gradscope.analyze_drift(*pair, headers_only=headers_only, expect_frozen=asked)

    assert report.gate.exit_code == 3
    assert not report.findings
    assert report.result is not None
    assert {t.status for t in report.result.tensors} == {None if headers_only else "identical"}
    assert 0 < report.coverage.analyzed < report.coverage.total == len(model())
    assert len(report.coverage.skipped) == report.coverage.total - report.coverage.analyzed


def test_what_is_left_out_of_one_by_its_name_is_not_new_in_the_other(tmp_path: Path) -> None:
    wrapped = {f"model.{name}": t for name, t in model().items()}
    report = drift(tmp_path, wrapped, model(), exclude=["model.layers.0.*"])
    assert not report.findings
    assert report.result is not None
    assert {t.status for t in report.result.tensors} == {"identical"}


def test_a_file_that_changes_while_it_is_read_is_exit_3(tmp_path: Path, base: str) -> None:
    new = Path(written(tmp_path / "new.safetensors", model()))

    def disturb(_done: int, _total: int) -> None:
        new.touch()

    report = gradscope.analyze_drift(base, new, progress=disturb)

    assert report.gate.exit_code == 3
    assert [e.kind for e in report.errors] == ["changed"]


def test_a_file_against_itself_while_it_is_written_is_exit_3(base: str) -> None:
    def disturb(_done: int, _total: int) -> None:
        Path(base).touch()

    for keep_going in (False, True):
        report = gradscope.analyze_drift(base, base, progress=disturb, keep_going=keep_going)
        assert report.gate.exit_code == 3
        assert {e.kind for e in report.errors} == {"changed"}


def test_keep_going_compares_the_shards_that_did_not_change(tmp_path: Path, base: str) -> None:
    folder = sharded(tmp_path)
    second = folder / "model-00002-of-00002.safetensors"

    def disturb(_done: int, _total: int) -> None:
        if not second.with_suffix(".seen").exists():
            second.with_suffix(".seen").touch()
            second.write_bytes(second.read_bytes() + b"x")

    report = gradscope.analyze_drift(base, folder, progress=disturb, keep_going=True)

    assert report.gate.exit_code == 3
    assert [e.input for e in report.errors] == [str(second)]
    assert report.result is not None
    assert report.result.counts == {"identical": 7}
    assert report.findings == ()
    lost = len(model()) - 7
    assert len(report.coverage.skipped) == 2 * lost  # those of the shard, and their partners
    assert (report.coverage.analyzed, report.coverage.total) == (7, 7 + 2 * lost)


def test_headers_alone_show_shapes_types_and_names(tmp_path: Path) -> None:
    new = model() | {"embed_tokens.weight": drawn(60, 32)}
    new["layers.0.mlp.weight"] = new["layers.0.mlp.weight"].half()
    del new["layers.2.norm.weight"]

    report = drift(tmp_path, model(), new, headers_only=True)

    assert report.result is not None
    assert report.result.counts == {
        "not compared": 13, "reshaped": 1, "retyped": 1, "removed": 1
    }  # fmt: skip
    assert found(report) == {"tensor-set-changed": ["medium", "medium"]}
    assert "weight-drift" in {n.rule for n in report.coverage.not_evaluated}


def test_patterns_choose_what_is_compared(tmp_path: Path) -> None:
    report = drift(tmp_path, model(), model(seed=3), include=["layers.0.*"])

    assert report.result is not None
    assert len(report.result.tensors) == 5


def test_formats_may_differ(tmp_path: Path, base: str) -> None:
    torch.save({"state_dict": model()}, tmp_path / "new.pt")
    np.savez(tmp_path / "new.npz", **{n: t.numpy() for n, t in model().items()})

    for new in ("new.pt", "new.npz"):
        report = gradscope.analyze_drift(base, tmp_path / new)
        assert report.result is not None
        assert report.result.counts == {"identical": len(model())}


def sharded(tmp_path: Path) -> Path:
    """The model in two shards, the first of seven tensors."""
    folder = tmp_path / "sharded"
    folder.mkdir()
    items = list(model().items())
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    where: dict[str, str] = {}
    for name, part in zip(names, (items[:7], items[7:]), strict=True):
        written(folder / name, dict(part))
        where |= {tensor: name for tensor, _ in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    return folder


def test_shards_compare_with_one_file(tmp_path: Path, base: str) -> None:
    report = gradscope.analyze_drift(base, sharded(tmp_path))

    assert report.result is not None
    assert report.result.counts == {"identical": len(model())}


def test_quantised_weights_are_compared_by_their_values(tmp_path: Path) -> None:
    w = model()["layers.0.mlp.weight"]
    scale = w.abs().amax(1, keepdim=True) / 448
    coded = {"weight": (w / scale).to(torch.float8_e4m3fn), "weight_scale": scale}
    rest = {n: t for n, t in model().items() if n != "layers.0.mlp.weight"}
    new = rest | {f"layers.0.mlp.{n}": t for n, t in coded.items()}

    report = drift(tmp_path, model(), new)

    told = only(report, "layers.0.mlp.weight")
    assert told.explanation is not None
    values = coded["weight"].float() * scale
    ratio = 20 * torch.log10(w.norm() / (values - w).norm()).item()
    assert told.explanation.facts["snr_db"] == pytest.approx(ratio, rel=1e-5)
    assert found(report) == {}
    assert len(report.result.tensors) == len(model())


def test_the_report_does_not_depend_on_jobs(tmp_path: Path) -> None:
    base, new = (written(tmp_path / f"{s}.safetensors", model(seed=s)) for s in (0, 1))

    one, two = (gradscope.analyze_drift(base, new, jobs=n) for n in (1, 3))

    assert as_json(one) == as_json(two)


def test_every_format_shows_a_pair_and_the_schema_takes_it(tmp_path: Path) -> None:
    new = model() | {"layers.1.mlp.weight": torch.full((32, 32), float("nan")),
                     "new\x1b[31m.weight": drawn(4, 4)}  # fmt: skip
    report = drift(tmp_path, model(), new)

    jsonschema.validate(as_json(report), report_schema())
    assert found(report)["weight-drift"] == ["critical"]
    for name in ("table", "json", "jsonl", "csv"):
        assert "\x1b" not in renderer(name)(report, Display()) or name == "json"


def test_drift_of_the_seeds_bands(tmp_path: Path) -> None:
    bands = {}
    for drifted in (1e-5, 1e-3, 3e-2, 0.3):
        new = {n: t + drifted * t.norm() * drawn(*t.shape, seed=2) / drawn(*t.shape, seed=2).norm()
               for n, t in model().items()}  # fmt: skip
        report = drift(tmp_path, model(), new)
        assert report.result is not None
        assert report.result.max_drift == pytest.approx(drifted, rel=0.02)
        assert report.result.mean_drift == pytest.approx(drifted, rel=0.02)
        bands[drifted] = str(report.result.severity)
    assert list(bands.values()) == ["info", "low", "medium", "high"]


@pytest.mark.parametrize(
    ("code", "arguments"),
    [(0, ["{base}", "{base}"]), (2, ["{base}"]), (2, ["{base}", "{base}", "{base}", "--expect=x"]),
     (3, ["{base}", "absent.safetensors"]), (2, ["{base}", "{base}", "--select", "W101"])],
)  # fmt: skip
def test_exit_codes_of_the_command(base: str, code: int, arguments: list[Any]) -> None:
    done = run(*(a.format(base=base) for a in arguments))

    assert (done.returncode, "Traceback" in done.stderr) == (code, False)


def test_torch_is_not_imported(base: str) -> None:
    program = f"import sys, gradscope; gradscope.analyze_drift({base!r}, {base!r})"

    code = f"{program}; sys.exit('torch' in sys.modules)"

    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
