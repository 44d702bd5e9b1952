"""The fixture ``gradient_recorder``, in a pytest of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from importlib import import_module
from pathlib import Path
from xml.etree import ElementTree

import pytest

ROOT = Path(__file__).resolve().parents[1]
TESTS = """
import pytest
import torch
from torch import nn


def model(depth, activation):
    torch.manual_seed(0)
    layers = [layer for _ in range(depth) for layer in (nn.Linear(8, 8), activation())]
    return nn.Sequential(*layers, nn.Linear(8, 2))


def train(model, recorder=None, steps=20, rate=0.01):
    optimizer = torch.optim.SGD(model.parameters(), rate)
    record = recorder(model, optimizer) if recorder else None
    x = torch.randn(64, 8)
    y = x @ torch.randn(8, 2)
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x), y).backward()
        optimizer.step()
    return record


def test_healthy(gradient_recorder):
    train(model(2, nn.ReLU), gradient_recorder)


def test_vanishing(gradient_recorder):
    train(model(12, nn.Sigmoid), gradient_recorder)


def test_vanishing_is_ignored(gradient_recorder):
    train(model(12, nn.Sigmoid), lambda m, o: gradient_recorder(m, o, ignore=["F102"]))


def test_vanishing_is_allowed(gradient_recorder):
    train(model(12, nn.Sigmoid), lambda m, o: gradient_recorder(m, o, fail_on="never"))


def test_low_is_asked_for_and_capture_is_called(gradient_recorder):
    net = model(2, nn.ReLU)
    optimizer = torch.optim.SGD(net.parameters(), 1e4)
    with gradient_recorder(net, optimizer, fail_on="low") as recorder:
        for step in range(20):
            optimizer.zero_grad()
            loss = net(torch.ones(4, 8)).square().mean()
            loss.backward()
            recorder.capture(step, loss=loss)
            optimizer.step()


def test_the_second_run_vanishes(gradient_recorder):
    train(model(2, nn.ReLU), gradient_recorder)
    train(model(12, nn.Sigmoid), gradient_recorder)


@pytest.fixture
def trained(gradient_recorder):
    return train(model(12, nn.Sigmoid), gradient_recorder)


def test_vanishing_in_a_fixture(trained):
    pass


def test_too_short_to_judge(gradient_recorder):
    train(model(2, nn.ReLU), gradient_recorder, steps=1)


def test_no_step(gradient_recorder):
    train(model(2, nn.ReLU), gradient_recorder, steps=0)


def test_no_call(gradient_recorder):
    pass


def test_its_own_failure_comes_first(gradient_recorder):
    train(model(12, nn.Sigmoid), gradient_recorder)
    assert 1 + 1 == 3


@pytest.mark.xfail(strict=True)
def test_expected(gradient_recorder):
    train(model(12, nn.Sigmoid), gradient_recorder)


def test_without_the_fixture():
    train(model(12, nn.Sigmoid))
"""
PASSED = {
    "test_healthy", "test_vanishing_is_ignored", "test_vanishing_is_allowed",
    "test_without_the_fixture",
}  # fmt: skip
FAILED = {
    "test_vanishing": "F102 vanishing-gradient",
    "test_low_is_asked_for_and_capture_is_called": "at or above low",
    "test_the_second_run_vanishes": "gradients-1",
    "test_vanishing_in_a_fixture": "F102 vanishing-gradient",
    "test_too_short_to_judge": "nothing was analysed",
    "test_no_step": "no step was recorded",
    "test_no_call": "was never called",
    "test_its_own_failure_comes_first": "1 + 1",
}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ElementTree.Element]:
    folder = tmp_path_factory.mktemp("plugin")
    (folder / "test_training.py").write_text(TESTS)
    words = ["-p", "gradscope.pytest_plugin", "-p", "no:cacheprovider", "--junitxml=out.xml"]
    subprocess.run(
        [sys.executable, "-m", "pytest", "-q", *words, f"--basetemp={folder / 'tmp'}", "."],
        cwd=folder, capture_output=True,
        env=os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTEST_ADDOPTS": "",
                          "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    return {
        case.attrib["name"]: case for case in ElementTree.parse(folder / "out.xml").iter("testcase")
    }


def test_each_test_has_the_outcome_that_its_run_deserves(outcomes) -> None:
    kinds = {name: [child.tag for child in case] for name, case in outcomes.items()}

    assert {name for name, kind in kinds.items() if not kind} == PASSED
    assert {name for name, kind in kinds.items() if kind == ["failure"]} == set(FAILED)
    assert kinds["test_expected"] == ["skipped"]


@pytest.mark.parametrize(("name", "said"), FAILED.items())
def test_a_failure_says_why(outcomes, name: str, said: str) -> None:
    (failure,) = outcomes[name]

    assert said in f"{failure.text}"


def test_the_plugin_imports_nothing_heavy() -> None:
    code = (
        "import sys, gradscope.pytest_plugin, gradscope.testing\n"
        "print({'torch', 'numpy', 'numba', 'pydantic', 'rich'} & set(sys.modules))"
    )

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert done.stdout == "set()\n"


def test_it_is_registered_with_pytest() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

    (module,) = project["entry-points"]["pytest11"].values()
    assert hasattr(import_module(module), "gradient_recorder")
