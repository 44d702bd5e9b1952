"""The exit codes of the contract for every command with a report, and what stdout carries."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import re
import tomllib
import warnings
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import jsonschema
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import save_file
from typer.testing import CliRunner, Result

from gradscope.cli import app
from gradscope.cli.schema import config_schema, report_schema
from gradscope.errors import UsageError
from gradscope.report.formats import BUILT_IN

FIXTURES = Path(__file__).resolve().parents[2] / "fixtures"


def run(*arguments: str, **environment: str) -> Result:
    return CliRunner(env=environment).invoke(app, list(arguments))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One of everything: healthy, faulty, empty and broken inputs of each command."""
    made = tmp_path_factory.mktemp("inputs")
    weight = np.random.default_rng(0).normal(size=(16, 16)).astype(np.float32)
    save_file({"fc.weight": weight}, made / "good.safetensors")
    weight[0, 0] = np.nan
    save_file({"fc.weight": weight}, made / "bad.safetensors")
    save_file({}, made / "empty.safetensors")
    (made / "broken.safetensors").write_bytes((made / "bad.safetensors").read_bytes()[:-9])
    _history(made / "good.csv", lambda step: 1 + 0.1 * np.sin(step))
    _history(made / "bad.csv", lambda step: float("nan") if step > 150 else 1.0)
    (made / "empty.csv").write_text("step,layer,norm\n")
    (made / "broken.csv").write_text("step;layer\n\x00")
    torch.manual_seed(0)
    net = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(1),
        torch.nn.Flatten(), torch.nn.Linear(4, 3),
    )  # fmt: skip
    _model(net, made / "good.jit")
    torch.nn.init.constant_(net[4].weight, float("nan"))
    _model(net, made / "bad.jit")
    (made / "broken.jit").write_bytes(b"no model")
    manifest = run("manifest", str(made / "good.safetensors"), "--no-progress")
    (made / "good.manifest.json").write_text(manifest.stdout)
    for name in ("good", "bad", "empty"):
        for job in range(2):
            line = ["weights", f"{name}.safetensors", "--shard", f"{job}/2", "-f", "json"]
            with contextlib.chdir(made):
                part = run(*line, "--isolated", "--fail-on", "never")
            (made / f"{name}-{job}.json").write_text(part.stdout)
    report = run("weights", str(made / "bad.safetensors"), "-f", "json", "--isolated")
    (made / "report.json").write_text(report.stdout)
    (made / "broken.json").write_text(report.stdout[:-9])
    pixels = np.random.default_rng(0).integers(0, 255, (16, 16, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(made / "i.png")
    (made / "none").mkdir()
    return made


def _history(path: Path, norm: Callable[[int], float]) -> None:
    rows = [f"{t},{layer},{norm(t)}" for t in range(200) for layer in ("a", "b", "c")]
    path.write_text("\n".join(["step,layer,norm", *rows]))


def _model(net: torch.nn.Module, path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.trace(net.eval(), torch.zeros(1, 3, 16, 16)).save(path)


#: Of each command: a line, with INPUT for the input.
LINES = {
    "weights": "weights INPUT.safetensors",
    "part": "weights INPUT.safetensors --shard 0/1",
    "drift": "drift good.safetensors INPUT.safetensors",
    "flow": "flow INPUT.csv --as norms",
    "explain": "explain -m saliency INPUT.jit i.png --preprocess size=16x16,image_mean=0.5/0.5/0.5,"
    "image_std=0.5/0.5/0.5 -o out",
}
ANALYSES = {
    "weights": "gradscope.weights.analysis.analyze_weights",
    "part": "gradscope.weights.analysis.analyze_weights",
    "drift": "gradscope.drift.analysis.analyze_drift",
    "flow": "gradscope.flow.analysis.analyze_flow",
    "explain": "gradscope.attribution.explain.explain",
}
EMPTY = LINES | {"explain": LINES["explain"].replace("i.png", "none")}

MATRIX = [
    (0, "good", ""),
    (0, "good", "--fail-on critical"),
    (1, "bad", ""),
    (1, "bad", "--fail-on critical"),
    (0, "bad", "--fail-on never"),
    (0, "bad", "--config fail-on=never"),
    (1, "bad", "--config fail-on=never --fail-on high"),
    (2, "bad", "--no-such-option"),
    (2, "bad", "--fail-on sometimes"),
    (2, "bad", "--format yaml"),
    (2, "bad", "--select no-such-rule"),
    (2, "bad", "--ignore ALL"),
    (2, "bad", "--config nowhere.toml"),
    (2, "bad", "--config fail_on=low"),
    (2, "bad", "--baseline nowhere.json"),
    (2, "bad", "--report json=no/such/folder/r.json"),
    (3, "missing", ""),
    (3, "missing", "--allow-empty"),
    (3, "broken", ""),
    (3, "broken", "--fail-on never"),
]


@pytest.mark.parametrize(("code", "input_", "options"), MATRIX)
@pytest.mark.parametrize("command", LINES)
def test_every_command_ends_with_the_code_of_the_contract(
    command, code, input_, options, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)

    done = run(*LINES[command].replace("INPUT", input_).split(), "-f", "json", *options.split())

    assert done.exit_code == code, done.output
    if code == 2:
        assert done.stdout == ""
        assert done.stderr
    else:
        gate = json.loads(done.stdout)["gate"]
        assert (gate["exit_code"], gate["failed"]) == (code, code != 0)
        assert bool(gate["reasons"]) is (code != 0)


#: Of the commands that analyse nothing themselves, or need more: a line of each code.
OTHERS = [
    (0, "weights good.safetensors --shard 1/2"),
    (2, "weights good.safetensors --shard 2/2"),
    (2, "weights good.safetensors --shard half"),
    (2, "weights good.safetensors --shard 0/2 --headers-only"),
    (2, "weights good.safetensors --engine dask"),
    (0, "merge good-0.json good-1.json"),
    (0, "merge good-1.json good-0.json --format sarif"),
    (1, "merge bad-0.json bad-1.json"),
    (1, "merge bad-0.json bad-1.json --fail-on critical"),
    (0, "merge bad-0.json bad-1.json --fail-on never"),
    (0, "merge bad-0.json bad-1.json --ignore non-finite"),
    (2, "merge"),
    (2, "merge bad-0.json bad-1.json --format yaml"),
    (2, "merge bad-0.json bad-1.json --select no-such-rule"),
    (2, "merge bad-0.json bad-1.json --report json=bad-0.json"),
    (2, "merge bad-0.json bad-1.json --jobs 2"),
    (3, "merge bad-0.json"),
    (3, "merge bad-0.json bad-0.json"),
    (3, "merge bad-0.json bad-1.json bad-1.json"),
    (3, "merge bad-0.json good-1.json"),
    (3, "merge report.json"),
    (3, "merge bad-0.json missing.json"),
    (3, "merge bad-0.json broken.json"),
    (3, "merge bad-0.json good.manifest.json"),
    (4, "merge empty-0.json empty-1.json"),
    (0, "merge empty-0.json empty-1.json --allow-empty"),
    (0, "render good-0.json"),
    (2, "baseline create good-0.json --baseline part-baseline.json"),
    (0, "verify good.safetensors --manifest good.manifest.json"),
    (1, "verify bad.safetensors --manifest good.manifest.json"),
    (1, "verify good.safetensors bad.safetensors --manifest good.manifest.json"),
    (0, "verify bad.safetensors --manifest good.manifest.json --fail-on critical"),
    (0, "verify bad.safetensors --manifest good.manifest.json --fail-on never"),
    (2, "verify bad.safetensors"),
    (2, "verify bad.safetensors --manifest good.manifest.json --format yaml"),
    (2, "verify bad.safetensors --manifest good.manifest.json --select non-finite"),
    (3, "verify missing.safetensors --manifest good.manifest.json"),
    (3, "verify good.safetensors broken.safetensors --manifest good.manifest.json"),
    (3, "verify good.safetensors --manifest missing.json"),
    (3, "verify good.safetensors --manifest report.json"),
    (0, "manifest good.safetensors"),
    (2, "manifest good.safetensors --format json"),
    (3, "manifest missing.safetensors"),
    (3, "manifest broken.safetensors"),
    (0, "render report.json --format junit"),
    (2, "render report.json --format yaml"),
    (2, "render report.json --report csv=report.json"),
    (2, "render report.json --fail-on never"),
    (3, "render missing.json"),
    (3, "render broken.json"),
    (3, "render good.manifest.json"),
    (0, "baseline create report.json --baseline new.json"),
    (2, "baseline create report.json --baseline report.json"),
    (3, "baseline create report.json --baseline no/such/folder.json"),
    (2, "baseline update report.json --baseline missing.json"),
    (2, "baseline prune report.json --baseline broken.json"),
    (2, "baseline forget report.json --baseline new.json"),
    (3, "baseline create missing.json --baseline newer.json"),
    (3, "baseline create broken.json --baseline newer.json"),
    (0, "config --isolated"),
    (0, "config --format json --config fail-on=low"),
    (2, "config --config fail_on=low"),
    (2, "config --config missing.toml"),
    (0, "doctor"),
    (2, "doctor --format yaml"),
    (0, "schema report"),
    (0, "schema history"),
    (2, "schema baseline"),
    (0, "rules non-finite --format json"),
    (2, "rules non-finit"),
    (0, "methods gradcam --format json"),
    (2, "methods gradcan"),
    (0, "layers good.jit --preprocess size=16x16 --format json"),
    (2, "layers good.jit --device nowhere"),
    (3, "layers missing.jit"),
    (3, "layers broken.jit"),
    (0, "visualize good.jit --target 0 --steps 1 --preprocess size=16x16 -o out"),
    (2, "visualize good.jit --target 99 --steps 1 --preprocess size=16x16 -o out"),
    (2, "visualize good.jit --target 0 --steps 0"),
    (3, "visualize missing.jit --target 0"),
    (3, "visualize broken.jit --target 0"),
]  # fmt: skip


def test_every_command_has_its_lines() -> None:
    lines = [*LINES.values(), *(line for _, line in OTHERS)]

    assert {line.split()[0] for line in lines} == {c.name for c in app.registered_commands}


@pytest.mark.parametrize(("code", "line"), OTHERS)
def test_so_do_commands_that_judge_nothing_or_need_more(
    code: int, line: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    (folder / "new.json").unlink(missing_ok=True)

    done = run(*line.split())

    assert done.exit_code == code, done.output
    assert "Traceback" not in done.output
    has_report = code == 3 and line.startswith(("verify", "visualize"))
    if code in (2, 3):
        assert done.stderr
        assert done.stdout == "" or has_report


def test_a_chart_that_there_is_none_of_is_told_and_costs_no_other_report(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("vl_convert", reason="of the extra html")
    monkeypatch.chdir(folder)
    chart, after = tmp_path / "chart.svg", tmp_path / "r.json"
    line = "weights good.safetensors --headers-only -q"

    done = run(*line.split(), "--report", f"svg={chart}", "--report", f"json={after}")

    assert (done.exit_code, chart.exists()) == (2, False)
    assert "this report of gradscope weights has no chart" in done.stderr
    assert json.loads(after.read_text())["gate"]["exit_code"] == 0


#: What each of them does its work by.
WORK = {
    "verify good.safetensors --manifest x.json": "gradscope.fingerprints.analysis.verify",
    "merge good-0.json good-1.json": "gradscope.merging.merge",
    "manifest good.safetensors": "gradscope.fingerprints.analysis.manifest",
    "render report.json": "gradscope.saved.read_report",
    "baseline create report.json --baseline new.json": "gradscope.saved.read_report",
    "config": "gradscope.cli.configuration.in_force",
    "doctor": "gradscope.environment.facts",
    "schema config": "gradscope.report.rules.load_rules",
    "rules": "gradscope.report.rules.load_rules",
    "methods": "gradscope.attribution.methods.methods",
    "layers good.jit": "gradscope.models.vision.open_vision",
    "visualize good.jit --target 0": "gradscope.attribution.synthesis.visualize.visualize",
}


@pytest.mark.parametrize(
    ("raised", "code"), [(RuntimeError("planted"), 70), (KeyboardInterrupt(), 130)], ids=str
)
@pytest.mark.parametrize("line", WORK)
def test_their_bugs_and_interrupts_have_codes_of_their_own(
    line: str, raised, code: int, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise raised

    monkeypatch.chdir(folder)
    monkeypatch.setattr(WORK[line], broken)

    done = run(*line.split())

    assert (done.exit_code, done.stdout) == (code, "")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("raised", "code", "said"),
    [
        (RuntimeError("planted\nmore"), 70, "internal error: RuntimeError: planted. This is a bug"),
        (MemoryError(), 70, "out of memory"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (UsageError("not so"), 2, "error: not so"),
    ],
)
@pytest.mark.parametrize("command", LINES)
def test_a_bug_and_an_interrupt_have_codes_of_their_own_and_one_line(
    command, raised, code, said, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise raised

    monkeypatch.chdir(folder)
    monkeypatch.setattr(ANALYSES[command], broken)

    done = run(*LINES[command].replace("INPUT", "bad").split())

    assert (done.exit_code, done.stdout) == (code, "")
    assert said in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("command", EMPTY)
def test_nothing_analysed_is_inconclusive_unless_that_is_allowed(
    command, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    input_ = "good" if command == "explain" else "empty"
    line = EMPTY[command].replace("INPUT", input_).split()

    codes = [run(*line, *more).exit_code for more in ([], ["--allow-empty"])]

    # An empty folder of pictures and a table without rows cannot be told from a wrong path.
    assert codes in ([4, 0], [3, 3]), codes
    assert command != "weights" or codes == [4, 0]


def test_good_inputs_are_reported_beside_a_broken_one(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)

    done = run("weights", "good.safetensors", "broken.safetensors", "bad.safetensors", "-f", "json")

    report = json.loads(done.stdout)
    assert done.exit_code == report["gate"]["exit_code"] == 3
    assert [f["input"] for f in report["findings"] if f["rule"] == "W101"] == ["bad.safetensors"]
    assert [e["input"] for e in report["errors"]] == ["broken.safetensors"]


# --- stdout ---------------------------------------------------------------------------------------

REPORTS = jsonschema.Draft202012Validator(report_schema())


def _is_json(text: str) -> None:
    REPORTS.validate(json.loads(text, parse_constant=lambda token: pytest.fail(token)))


PARSERS: dict[str, Callable[[str], object]] = {
    "json": _is_json,
    "jsonl": lambda text: [json.loads(line) for line in text.splitlines()],
    "csv": lambda text: list(csv.DictReader(io.StringIO(text), strict=True)),
    "sarif": json.loads,
    "junit": lambda text: ElementTree.fromstring(text.encode()),
    "github": lambda text: [
        re.fullmatch(r"::(error|warning|notice) .*", line)[0] for line in text.splitlines()
    ],
    "markdown": lambda text: text.index("## gradscope "),
    "html": lambda text: re.fullmatch(r"<!doctype html>.*</html>", text.strip(), re.DOTALL)[0],
    "model-card": lambda text: re.fullmatch(r"<!-- (\S+):begin -->.*<!-- \1:end -->\n", text, re.S)[
        0
    ],
    "table": lambda text: re.search(r"^(PASSED|FAILED|\x1b\[.*(PASSED|FAILED))", text, re.M)[0],
}


@pytest.mark.parametrize("options", ["", "-q", "-v", "--color always", "--no-progress", "--debug"])
@pytest.mark.parametrize("format_", BUILT_IN)
def test_stdout_is_the_report_whole_and_alone_under_every_option(
    format_, options, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    line = ["weights", "bad.safetensors", "missing.pt", "-f", format_]
    allow = '--config=allow=[{rules=["W113"],reason="x",expires=2020-01-01}]'

    done = run(*line, allow, "--report", "json=r.json", *options.split(), FORCE_COLOR="1")

    PARSERS[format_](done.stdout)
    assert ("\x1b" in done.stdout) is (format_ == "table")
    assert "gradscope: " not in done.stdout
    assert done.exit_code == 3


@pytest.mark.parametrize("command", LINES)
@pytest.mark.parametrize("format_", BUILT_IN)
def test_so_it_is_for_every_command(
    command, format_, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)

    done = run(*LINES[command].replace("INPUT", "bad").split(), "-f", format_)

    PARSERS[format_](done.stdout)
    assert done.exit_code == 1


def test_schemas_and_the_configuration_are_machine_readable_too(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)

    assert json.loads(run("schema", "config").stdout) == config_schema()
    jsonschema.Draft202012Validator.check_schema(config_schema())
    shown = tomllib.loads(run("config", "--isolated").stdout)
    jsonschema.Draft202012Validator(config_schema()).validate(shown)
