"""Messages: names made harmless, lists, counts and sizes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradscope.text import escaped, listed, plural, quoted, shortened, size


def test_control_and_direction_characters_are_escaped_and_markup_is_left_as_text() -> None:
    assert escaped("a\x1b[0m\u202e\nb[red]") == "a\\x1b[0m\\u202e\\nb[red]"


@given(st.text(alphabet=st.characters()))
def test_escaped_text_is_one_printable_line_and_escaping_again_changes_nothing(text: str) -> None:
    once = escaped(text)

    assert once.isprintable()
    assert escaped(once) == once


def test_long_text_is_cut_and_a_quoted_name_says_how_long_it_was() -> None:
    assert escaped("abcdef", 3) == "abc…"
    assert quoted("a" * 200) == f"'{'a' * 200}'"
    assert quoted("a" * 1201) == f"'{'a' * 200}…' (1,201 characters)"
    assert shortened("a" * 400) == "a" * 400
    assert shortened("a" * 200 + "b" * 201) == f"{'a' * 100}…(201 characters)…{'b' * 100}"


def test_lists_name_the_first_few_and_count_the_rest() -> None:
    assert listed("abc", 3) == "a, b, c"
    assert listed("abcd", 4) == "a, b, c and 1 more"
    assert listed("ab", 2000, most=2) == "a, b and 1,998 more"
    assert listed([], 0) == ""


def test_counts_are_singular_only_for_one() -> None:
    assert [plural(n, "layer") for n in (0, 1, 2, 1000)] == [
        "0 layers", "1 layer", "2 layers", "1,000 layers",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 bytes"), (1, "1 byte"), (999, "999 bytes"), (1000, "1.0 kB"), (26488, "26.5 kB"),
        (999_949, "999.9 kB"), (999_950, "1.0 MB"), (2.5e9, "2.5 GB"), (3e12, "3.0 TB"),
        (4.2e18, "4,200.0 PB"),
    ],
)  # fmt: skip
def test_sizes_are_decimal(count: float, text: str) -> None:
    assert size(count) == text
