"""Every row of the table of methods: its reference, its formula, its oracle."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

import pytest

from gradscope.attribution.methods import methods

from .oracles import ORACLES

HERE = Path(__file__)


@pytest.fixture(scope="module")
def oracles() -> dict[str, set[str]]:
    """What all tests of this folder register, also when pytest runs only this file."""
    for file in HERE.parent.glob("test_*.py"):
        if file != HERE:
            import_module(f"{__package__}.{file.stem}")
    return ORACLES


@pytest.mark.parametrize("name", sorted(methods()))
def test_every_method_is_tested_against_an_oracle(name: str, oracles: dict[str, set[str]]) -> None:
    assert oracles.get(name), f"no test is marked @oracle({name!r}): write one (see oracles.py)"


def test_every_oracle_is_of_a_method(oracles: dict[str, set[str]]) -> None:
    assert oracles.keys() <= methods().keys()


@pytest.mark.parametrize("name", sorted(methods()))
def test_every_method_has_its_reference_and_its_formula(name: str) -> None:
    method = methods()[name]

    assert method.reference
    assert method.compute.__doc__
