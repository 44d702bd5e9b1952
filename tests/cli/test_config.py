"""Where the configuration is looked for, what wins, and how it is shown."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from gradscope.cli.configuration import in_force
from gradscope.errors import UsageError
from gradscope.report.config import Config, layer, merged


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository with a folder inside, where the program is started."""
    for name in [n for n in os.environ if n.startswith("GRADSCOPE_")]:
        monkeypatch.delenv(name)
    (tmp_path / "repo" / ".git").mkdir(parents=True)
    (tmp_path / "repo" / "models").mkdir()
    monkeypatch.chdir(tmp_path / "repo" / "models")
    return tmp_path / "repo"


def fail_on(*given: str, isolated: bool = False) -> tuple[str, str]:
    """What --fail-on would be, and why."""
    config, origins = in_force(given, isolated)
    return config.fail_on, origins.get(("fail-on",), "default")


def own(folder: Path, value: str) -> None:
    (folder / "gradscope.toml").write_text(f'fail-on = "{value}"\n')


def shared(folder: Path, value: str) -> None:
    (folder / "pyproject.toml").write_text(f'[tool.gradscope]\nfail-on = "{value}"\n')


def test_the_nearest_own_file_is_taken_else_the_nearest_table(repository: Path) -> None:
    assert fail_on() == ("high", "default")
    shared(repository, "info")
    assert fail_on() == ("info", "../pyproject.toml")
    shared(repository / "models", "low")
    assert fail_on() == ("low", "pyproject.toml")
    own(repository, "medium")
    assert fail_on() == ("medium", "../gradscope.toml")
    own(repository / "models", "critical")
    assert fail_on() == ("critical", "gradscope.toml")


def test_a_pyproject_without_our_table_is_passed_over(repository: Path) -> None:
    shared(repository, "info")
    (repository / "models" / "pyproject.toml").write_text("[project]\nname = 'x'\n")

    assert fail_on() == ("info", "../pyproject.toml")


def test_files_are_not_merged(repository: Path) -> None:
    own(repository, "medium")
    (repository / "pyproject.toml").write_text('[tool.gradscope]\nselect = ["W1"]\n')

    assert in_force((), False)[0].select == ()


def test_nothing_is_looked_for_above_the_repository_nor_without_one(
    repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own(repository.parent, "info")
    assert fail_on() == ("high", "default")

    (repository / ".git").rmdir()
    own(repository, "low")
    assert fail_on() == ("high", "default")
    monkeypatch.chdir(repository)
    assert fail_on() == ("low", "gradscope.toml")


def test_options_win_over_variables_over_the_file(
    repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own(repository, "medium")
    monkeypatch.setenv("GRADSCOPE_FAIL_ON", "low")
    monkeypatch.setenv("GRADSCOPE_SELECT", "W1, F102")
    monkeypatch.setenv("GRADSCOPE_ALLOW_EMPTY", "true")

    assert fail_on() == ("low", "GRADSCOPE_FAIL_ON")
    assert fail_on("fail-on=info") == ("info", "--config fail-on=info")
    config = in_force((), False)[0]
    assert (config.select, config.allow_empty) == (("W1", "F102"), True)


def test_a_file_is_named_by_option_or_variable_and_isolated_looks_for_none(
    repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own(repository, "medium")
    (repository / "ci.toml").write_text('fail-on = "low"\n')
    (repository / "a=b.toml").write_text('fail-on = "info"\n')

    assert fail_on("../ci.toml") == ("low", "../ci.toml")
    assert fail_on("../a=b.toml") == ("info", "../a=b.toml")
    assert fail_on(isolated=True) == ("high", "default")
    assert fail_on("../ci.toml", isolated=True) == ("low", "../ci.toml")
    monkeypatch.setenv("GRADSCOPE_CONFIG", "../ci.toml")
    assert fail_on() == ("low", "../ci.toml")
    assert fail_on(isolated=True) == ("high", "default")


def test_thresholds_of_option_and_file_are_put_together(repository: Path) -> None:
    (repository / "gradscope.toml").write_text("[rules.dead-units]\nhigh = 0.5\nmedium = 0.2\n")

    config, _ = in_force(["rules.W105.high=0.4", "rules.all-zero.severity=low"], False)

    assert config.rules == {
        "dead-units": {"high": 0.4, "medium": 0.2},
        "all-zero": {"severity": "low"},
    }


@pytest.mark.parametrize(
    ("given", "why"),
    [
        (["a.toml", "b.toml"], "--config names two files, a.toml and b.toml"),
        (["nowhere.toml"], "the configuration nowhere.toml: No such file"),
        (["failon=low"], "--config failon=low: unknown key 'failon'; did you mean fail-on?"),
        (["="], "--config takes FILE or KEY=VALUE in TOML, not '='"),
        (["rules.dead-units.high="], "rules.dead-units.high is ''; it is a number"),
    ],
)
def test_a_wrong_option_is_told(repository: Path, given: list[str], why: str) -> None:
    with pytest.raises(UsageError) as refusal:
        in_force(given, False)
    assert why in str(refusal.value)


@pytest.mark.parametrize("content", ["tool = 3", "[[tool.other]]", "[tool]"])
def test_a_pyproject_of_another_shape_is_passed_over(repository: Path, content: str) -> None:
    (repository / "pyproject.toml").write_text(content)

    assert in_force((), False) == (Config(), {})


def test_a_link_to_nowhere_is_no_gate_without_a_word(repository: Path) -> None:
    (repository / "gradscope.toml").symlink_to("moved.toml")

    with pytest.raises(UsageError, match=r"gradscope\.toml: No such file"):
        in_force((), False)


def test_a_broken_file_or_variable_is_no_gate_without_a_word(
    repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (repository / "pyproject.toml").write_text("[tool.gradscope\n")
    with pytest.raises(UsageError, match=r"\.\./pyproject\.toml is not TOML"):
        in_force((), False)
    (repository / "pyproject.toml").unlink()
    monkeypatch.setenv("GRADSCOPE_FAIL_ON", "often")
    with pytest.raises(UsageError, match="GRADSCOPE_FAIL_ON: fail-on is 'often'; it is one of"):
        in_force((), False)


# --- gradscope config -----------------------------------------------------------------------------

FULL = """
preset = "strict"
ignore = ["W116"]
baseline = "accepted.json"

[rules.dead-units]
high = 0.2
severity = "low"

[[allow]]
rules = ["W101"]
subjects = ["*.\\"x\\""]
reason = "a \\\\ constant, \\u202e ☃ \\U0001f600 \\t"
expires = 2027-01-31
"""


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "gradscope", *arguments],
        capture_output=True, text=True, timeout=120, cwd=folder,
    )  # fmt: skip


def test_what_is_shown_is_the_same_configuration_with_origins(repository: Path) -> None:
    (repository / "gradscope.toml").write_text(FULL)

    done = run(repository, "config", "--config", "rules.W104.least=9")
    shown = tomllib.loads(done.stdout)

    wanted = layer({**tomllib.loads(FULL), "rules": shown["rules"]}, "FULL")
    assert merged([layer(shown, "shown")])[0] == merged([wanted])[0]
    assert shown["rules"] == {
        "dead-units": {"high": 0.2, "severity": "low"}, "constant-tensor": {"least": 9},
    }  # fmt: skip
    assert "\u202e" not in done.stdout
    assert "\t" not in done.stdout
    origins = dict(line.split("  # ") for line in done.stdout.splitlines() if "  # " in line)
    assert {key.split(" = ")[0].strip(): origin for key, origin in origins.items()} == {
        "preset": "gradscope.toml", "select": "default", "ignore": "gradscope.toml",
        "fail-on": "preset strict", "allow-empty": "default", "baseline": "gradscope.toml",
        "rules.dead-units.high": "gradscope.toml", "rules.dead-units.severity": "gradscope.toml",
        "rules.constant-tensor.least": "--config rules.W104.least=9",
        "[[allow]]": "gradscope.toml",
    }  # fmt: skip


def test_for_programs_it_is_json(repository: Path) -> None:
    (repository / "gradscope.toml").write_text(FULL)

    shown = json.loads(run(repository, "config", "--format", "json").stdout)

    assert shown["fail-on"] == {"value": "medium", "origin": "preset strict"}
    assert shown["allow"]["value"][0]["expires"] == "2027-01-31"
    assert shown["rules.dead-units.high"]["value"] == 0.2


def test_every_analysis_obeys_it_and_no_report_is_written_over_it(repository: Path) -> None:
    (repository / "gradscope.toml").write_text("selct = []\n")
    for line in (["weights", "m.pt"], ["flow", "h.npz"], ["explain", "m.pt", "i.png"], ["config"]):
        done = run(repository, *line)
        assert (done.returncode, done.stdout) == (2, "")
        assert "gradscope.toml: unknown key 'selct'; did you mean select?" in done.stderr

    own(repository, "low")
    done = run(repository, "weights", "m.pt", "--report", "table=gradscope.toml")
    assert "would overwrite an input" in done.stderr


def test_it_imports_neither_torch_nor_numpy(repository: Path) -> None:
    program = (
        "import sys\nfrom gradscope.cli import app\ntry: app(['config'])\n"
        "except SystemExit: pass\n"
        "print({'torch', 'numpy', 'numba'} & set(sys.modules), file=sys.stderr)"
    )

    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)

    assert done.stderr.endswith("set()\n"), done.stderr
