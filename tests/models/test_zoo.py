"""The layer that ``auto`` takes in the architectures of timm and torchvision."""

from __future__ import annotations

import re

import pytest
import zoo

pytestmark = pytest.mark.filterwarnings("ignore")

PAGE = zoo.DOCUMENT.read_text().splitlines()


@pytest.mark.parametrize("name", zoo.EXPECTED)
def test_auto_takes_the_layer_that_is_expected(name: str) -> None:
    library = name.partition(":")[0]
    pytest.importorskip(library, reason=f"{library} is not installed (extra zoo)")

    line = zoo.row(name)

    assert line.split(" | ")[2] == f"`{zoo.EXPECTED[name]}`"
    assert line in PAGE, "python fixtures/zoo.py writes the page anew"


def test_the_page_has_the_layers_that_are_expected_and_no_others() -> None:
    rows = [re.findall("`([^`]+)`", line) for line in PAGE if line.startswith("| `")]

    assert dict(rows) == dict(zoo.EXPECTED)
    assert len(rows) >= 60
    assert any(f"in {len(rows)} architectures" in line for line in PAGE)
