"""Third parties' plugins: found by entry point, and one clear line where one is broken."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from gradscope.plugins import plugins

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures"

RULE = """
from gradscope.report.rules import Observation, rule
from gradscope.report.severity import Severity
from gradscope.weights.result import Examined, Need

@rule("ACME1", "acme-policy", Severity.HIGH, reads=Examined, needs=Need.STATISTICS)
def acme_policy(examined, *, most: int = 3):
    \"\"\"A checkpoint of ours has few tensors.\"\"\"
    if len(examined.tensors) > most:
        yield Observation("checkpoint", "too many tensors", "merge some", threshold=most)
"""


def run(tmp_path: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *map(str, arguments)], capture_output=True, text=True, timeout=120,
        env={"PYTHONPATH": f"{tmp_path}:{Path(__file__).resolve().parents[1]}",
             "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)},
    )  # fmt: skip


def install(folder: Path, kind: str, source: str, value: str = "acme") -> None:
    """What pip leaves of a package that registers one entry point."""
    (folder / "acme.py").write_text(source)
    info = folder / "acme-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: acme\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[gradscope.{kind}]\nacme = {value}\n")


def test_a_rule_with_a_code_of_its_own_is_listed_selected_and_evaluated(tmp_path: Path) -> None:
    install(tmp_path, "rules", RULE)
    digits = FIXTURES / "digits.safetensors"

    listed = run(tmp_path, "-m", "gradscope", "rules", "acme-policy")
    selected = run(tmp_path, "-m", "gradscope", "weights", digits, "--select", "ACME1")
    unmeasured = run(tmp_path, "-m", "gradscope", "weights", digits, "--headers-only", "--format",
                     "json", "--select", "ACME")  # fmt: skip

    assert listed.stdout.startswith("ACME1 acme-policy (high)\n\nA checkpoint of ours")
    assert selected.returncode == 1
    assert "too many tensors" in selected.stdout
    assert '{"rule": "acme-policy", "reason": "needs statistics' in unmeasured.stdout


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("import no_such_module_here", "ModuleNotFoundError: No module named 'no_such_module"),
        ("raise RuntimeError('one\\ntwo')", "RuntimeError: one;"),
        ("import sys; sys.exit(0)", "SystemExit: 0"),
        ("def broken(:", "SyntaxError: invalid syntax"),
        (
            RULE.replace("Need.STATISTICS", "'statistic'"),
            "ValueError: rule ACME1 acme-policy needs 'statistic'; Ex",
        ),
        (RULE.replace("ACME1", "W101"), "ValueError: rule W101 acme-policy is already regist"),
    ],
)
def test_rules_that_cannot_be_imported_are_one_line_and_a_wrong_request(
    tmp_path: Path, source: str, said: str
) -> None:
    install(tmp_path, "rules", source)

    done = run(tmp_path, "-m", "gradscope", "weights", FIXTURES / "digits.safetensors")

    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "the rules plugin 'acme' (acme) failed to load: " + said in done.stderr


@pytest.mark.parametrize(
    ("kind", "arguments"),
    [
        ("formats", ["weights", FIXTURES / "digits.pt", "--format", "acme"]),
        ("methods", ["methods"]),
        ("checkpoints", ["weights", FIXTURES / "README.md"]),
        ("histories", ["flow", FIXTURES / "README.md"]),
    ],
)
def test_a_broken_plugin_of_any_kind_is_one_line(
    tmp_path: Path, kind: str, arguments: list[object]
) -> None:
    install(tmp_path, kind, "raise OSError('no licence')", "acme:read")

    done = run(tmp_path, "-m", "gradscope", *arguments)

    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert f"the {kind} plugin 'acme' (acme:read) failed to load: OSError: no lic" in done.stderr


def test_a_format_of_a_plugin_renders_reports(tmp_path: Path) -> None:
    source = "def render(report, display): return f'{report.command} {len(report.findings)}\\n'"
    install(tmp_path, "formats", source, "acme:render")

    done = run(tmp_path, "-m", "gradscope", "weights", FIXTURES / "digits.pt", "--format", "acme")

    assert done.stdout == "weights 0\n"


@pytest.mark.parametrize("arguments", [["rules", "dead-units"], ["--help"], ["weights", "--help"]])
def test_documentation_survives_an_interpreter_that_drops_docstrings(
    tmp_path: Path, arguments: list[str]
) -> None:
    plain = run(tmp_path, "-m", "gradscope", *arguments)

    assert run(tmp_path, "-OO", "-m", "gradscope", *arguments).stdout == plain.stdout
    assert len(plain.stdout.splitlines()) > 5


def test_a_package_on_a_path_that_is_added_later_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = plugins("rules")
    install(tmp_path, "rules", RULE)
    monkeypatch.syspath_prepend(tmp_path)

    assert [point.name for point in plugins("rules") if point not in before] == ["acme"]


def test_installed_packages_are_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    before = plugins("rules")
    monkeypatch.setattr("gradscope.plugins.entry_points", None)

    assert plugins("rules") == before
