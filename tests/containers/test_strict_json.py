"""JSON parsed so that no two readers understand it differently."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradscope.containers.strict_json import (
    MAX_DEPTH,
    MalformedError,
    Repeated,
    is_text,
    is_too_deep,
    parse,
    parse_once,
    type_name,
)

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)  # fmt: skip


@given(VALUES)
def test_what_the_standard_library_writes_is_read(value: object) -> None:
    assert parse(json.dumps(value).encode(), "it") == value
    assert parse_once(json.dumps(value).encode(), "it") == value


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"{", "is not valid JSON: .* at byte 1"),
        (b"", "is not valid JSON"),
        (b"\xff", "is not UTF-8 at byte 0"),
        ('["ü" x]'.encode(), "at byte 6"),
        (b"[NaN]", "NaN is used as a number"),
        (b"-Infinity", "-Infinity is used as a number"),
        (b"[" * 100_000, "nested too deeply"),
        (b"9" * 10_000, "thousands of digits"),
    ],
)
def test_everything_else_is_refused_with_its_place(data: bytes, said: str) -> None:
    with pytest.raises(MalformedError, match=said):
        parse(data, "the header")


def test_non_finite_numbers_are_read_where_asked() -> None:
    assert parse(b"[-Infinity]", "it", non_finite=True) == [-math.inf]


def test_a_key_given_twice_keeps_every_occurrence() -> None:
    value = parse(b'{"a": 1, "b": 2, "a": 3, "b": 4, "a": 5}', "it")
    assert value == {"a": 5, "b": 4}
    assert isinstance(value, Repeated)
    assert value.repeated() == ["a", "b"]
    assert value.pairs[0] == ("a", 1)


@pytest.mark.parametrize("data", [b'{"a": 1, "a": 1}', b'[0, {"x": [{"a": 1, "a": 2}]}]'])
def test_a_key_given_twice_can_be_refused_at_any_depth(data: bytes) -> None:
    with pytest.raises(MalformedError, match="the key 'a' twice"):
        parse_once(data, "it")


def test_depth_is_counted_through_objects_and_arrays() -> None:
    def nested(depth: int) -> object:
        value: object = 0
        for level in range(depth):
            value = [value] if level % 2 else {"x": value}
        return value

    assert not is_too_deep(nested(MAX_DEPTH - 2))
    assert is_too_deep(nested(MAX_DEPTH))


def test_half_a_surrogate_pair_is_not_text() -> None:
    half = parse(b'"\\ud800"', "it")
    assert isinstance(half, str)
    assert not is_text(half)
    assert is_text("ü🦀")


@pytest.mark.parametrize(
    ("data", "name"),
    [(b"{}", "an object"), (b"[]", "an array"), (b'""', "a string"), (b"true", "a boolean"),
     (b"1", "an integer"), (b"1.0", "a number with a fraction or exponent"), (b"null", "null")],
)  # fmt: skip
def test_values_are_named_in_the_words_of_json(data: bytes, name: str) -> None:
    assert type_name(parse(data, "it")) == name
