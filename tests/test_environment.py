"""``gradscope doctor``: what an installation is made of, and what is wrong with it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from gradscope import environment
from gradscope.cli import app
from gradscope.environment import Fact, Requirement, facts, requirements


def doctor(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["doctor", *arguments])


@pytest.fixture
def versions(monkeypatch: pytest.MonkeyPatch) -> dict[str, str | None]:
    """Installed versions, to be changed; what is not named is as it is."""
    changed: dict[str, str | None] = {environment.NAMESAKE: None}
    real = environment.installed
    monkeypatch.setattr(environment, "installed", lambda n: changed.get(n, real(n)))
    needed = [
        Requirement("numpy", "2.0", None), Requirement("torch", "2.6", None),
        Requirement("pyarrow", "15", "parquet"), Requirement("pytest", "8.0", "test"),
    ]  # fmt: skip
    monkeypatch.setattr(environment, "requirements", lambda: needed)
    return changed


def named(name: str) -> Fact:
    (found,) = [fact for fact in facts() if fact.name == name]
    return found


def test_a_sound_installation_ends_with_0(versions: dict[str, str | None]) -> None:
    done = doctor()

    assert done.exit_code == 0
    assert done.stdout.startswith("program   gradscope")
    assert done.stdout.endswith("\nnothing is wrong\n")
    assert "cpu" in named("--device").value


@pytest.mark.parametrize(
    ("version", "problem"),
    [
        (None, True), ("1.26.4", True), ("2.0", False), ("2.0.0", False), ("2.0.0rc1", False),
        ("2.13.0+cpu", False), ("10.0", False),
    ],
)  # fmt: skip
def test_a_package_that_is_missing_or_too_old_is_a_problem_with_its_remedy(
    versions: dict[str, str | None], version: str | None, problem: bool
) -> None:
    versions["numpy"] = version

    done = doctor()

    assert done.exit_code == (2 if problem else 0)
    said = named("numpy").problem
    assert said == ("at least 2.0 is needed: pip install 'numpy>=2.0'" if problem else None)
    assert done.stdout.endswith("\n1 problem\n" if problem else "\nnothing is wrong\n")


def test_an_extra_that_is_not_installed_is_none(versions: dict[str, str | None]) -> None:
    versions["pyarrow"] = None

    extra = named("parquet")

    assert "without pyarrow: pip install 'gradscope-diagnostics[parquet]'" in extra.value
    assert extra.problem is None
    versions["pyarrow"] = "24.0"
    assert named("parquet").value == "installed"
    assert not [fact for fact in facts() if fact.name == "test"]


def test_the_other_project_of_the_name_is_a_problem(versions: dict[str, str | None]) -> None:
    versions[environment.NAMESAKE] = "0.3.1"

    done = doctor("--format", "json")

    (other,) = [f for f in json.loads(done.stdout) if f["value"] == "0.3.1, another project"]
    assert "uninstall one" in other["problem"]
    assert done.exit_code == 2


def test_a_torch_that_does_not_import_is_a_problem_and_not_the_end(
    versions: dict[str, str | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken() -> list[str]:
        raise OSError("libcudart.so: cannot open\nmore")

    monkeypatch.setattr(environment, "devices", broken)

    (found,) = [f for f in facts() if f.about == "devices"]
    assert found.problem == "OSError: libcudart.so: cannot open"


def test_a_plug_in_that_fails_to_load_is_a_problem(
    versions: dict[str, str | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    from importlib.metadata import EntryPoint

    point = EntryPoint("acme", "acme.rules", "gradscope.rules")
    monkeypatch.setattr(environment, "plugins", lambda kind: [point] if kind == "rules" else [])

    found = named("rules: acme")

    assert found.value == "acme.rules"
    assert found.problem is not None
    assert (
        "the rules plugin 'acme' (acme.rules) failed to load: ModuleNotFoundError" in found.problem
    )


def test_requirements_are_those_of_the_distribution() -> None:
    text = (Path(__file__).resolve().parents[1] / "pyproject.toml").read_text()

    assert all(f'"{r.package}>={r.least}"' in text for r in requirements() if r.extra is None)
