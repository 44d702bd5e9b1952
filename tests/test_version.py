"""Versions, compared by their numbers."""

from __future__ import annotations

import pytest

from gradscope.version import release


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("2.13.0+cpu", (2, 13, 0, 0)),
        ("2.13", (2, 13, 0, 0)),
        ("3.0rc1", (3, 0, 0, 0)),
        ("1.2.3.post4", (1, 2, 3, 0)),
        ("10", (10, 0, 0, 0)),
        ("unknown", (0, 0, 0, 0)),
        ("", (0, 0, 0, 0)),
    ],
)
def test_a_release_is_its_leading_numbers(text: str, numbers: tuple[int, ...]) -> None:
    assert release(text) == numbers


def test_releases_compare_as_numbers() -> None:
    assert release("0.9") < release("0.10") < release("1") == release("1.0")
