"""What a shell offers behind the tabulator key, as its own script asks for it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from gradscope.attribution.methods import methods
from gradscope.cli import app, completion
from gradscope.errors import UsageError
from gradscope.report.formats import BUILT_IN


def offered(line: str) -> list[str]:
    """What bash is told for the last word of a line."""
    words = line.split(" ")
    environment = {
        "_GRADSCOPE_COMPLETE": "complete_bash",
        "COMP_WORDS": line,
        "COMP_CWORD": str(len(words) - 1),
    }
    done = CliRunner().invoke(app, [], env=environment, prog_name="gradscope")
    assert done.exit_code == 0
    return done.stdout.split()


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("gradscope we", ["weights"]),
        ("gradscope weights --fail", ["--fail-on"]),
        ("gradscope weights --fail-on ", ["info", "low", "medium", "high", "critical", "never"]),
        ("gradscope flow --format ", list(BUILT_IN)),
        ("gradscope render r.json --report sv", ["svg="]),
        ("gradscope weights --select dead", ["dead-units", "dead-expert"]),
        ("gradscope flow --ignore F101,dead", ["F101,dead-zone"]),
        ("gradscope rules W10", [f"W10{n}" for n in range(1, 10)]),
        ("gradscope explain -m ", list(methods())),
        ("gradscope explain -m gradcam,layer", ["gradcam,layercam"]),
        ("gradscope methods finer", ["finercam"]),
        ("gradscope weights --cast fp16,fp8", ["fp16,fp8_e4m3", "fp16,fp8_e5m2"]),
        ("gradscope layers --device c", ["cpu", "cuda"]),
        ("gradscope drift --colors mono", ["monochrome"]),
        ("gradscope weights --select nothing-of-the-kind", []),
    ],
)
def test_commands_options_and_values_are_offered(line: str, words: list[str]) -> None:
    assert offered(line) == words


def test_other_shells_are_told_what_a_name_means() -> None:
    asked = {
        "_GRADSCOPE_COMPLETE": "complete_zsh",
        "_TYPER_COMPLETE_ARGS": "gradscope rules W105",
    }

    done = CliRunner().invoke(app, [], env=asked, prog_name="gradscope")

    assert "W105" in done.stdout
    assert "Output units whose L2 norm" in done.stdout


def test_a_plug_in_that_is_broken_spoils_no_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise UsageError("the plug-in x cannot be imported")

    monkeypatch.setattr("gradscope.report.rules.load_rules", broken)

    assert offered("gradscope weights --select dead") == []


@pytest.fixture
def program(tmp_path: Path) -> dict[str, str]:
    """An environment in which `gradscope` is this checkout, and says what it imported."""
    script = tmp_path / "bin" / "gradscope"
    script.parent.mkdir()
    script.write_text(
        f"#!{sys.executable}\nimport os, sys\nsys.argv[0] = 'gradscope'\n"
        f"sys.path.insert(0, {str(Path(completion.__file__).parents[2])!r})\n"
        "from gradscope.cli import app\ntry:\n    app(prog_name='gradscope')\nfinally:\n"
        "    open(os.environ['SEEN'], 'w').write(' '.join(sys.modules))\n"
    )
    script.chmod(0o755)
    return os.environ | {
        "PATH": f"{script.parent}{os.pathsep}{os.environ['PATH']}",
        "HOME": str(tmp_path), "SEEN": str(tmp_path / "seen"),
    }  # fmt: skip


def test_the_script_for_bash_completes_without_anything_heavy(
    program: dict[str, str], tmp_path: Path
) -> None:
    line = (
        'eval "$(gradscope --show-completion bash)"; COMP_WORDS=(gradscope explain -m layer); '
        "COMP_CWORD=3; _gradscope_completion gradscope; echo ${COMPREPLY[@]}"
    )

    done = subprocess.run(["bash", "-c", line], env=program, capture_output=True, text=True)

    assert (done.stdout, done.stderr) == ("layercam\n", "")
    assert {"torch", "numpy", "numba"}.isdisjoint((tmp_path / "seen").read_text().split())


def test_it_is_installed_where_the_shell_looks(program: dict[str, str], tmp_path: Path) -> None:
    line = "gradscope --install-completion && true"  # for the shell that it is a child of

    done = subprocess.run(["bash", "-c", line], env=program, capture_output=True, text=True)

    assert done.returncode == 0, done.stderr
    assert "gradscope" in (tmp_path / ".bashrc").read_text()
