"""What the pickle reader builds, what it refuses, and that it runs nothing."""

from __future__ import annotations

import argparse
import collections
import contextlib
import io
import os
import pathlib
import pickle
import struct
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gradscope.containers.pickle_machine import Dialect
from gradscope.containers.pickles import PYTHON_CALLS, PYTHON_INERT, read_pickle
from gradscope.errors import InputError

PLAIN = Dialect(PYTHON_CALLS, PYTHON_INERT.__contains__)


def value_of(data: bytes):
    return read_pickle(data, "file.pt", "data.pkl", PLAIN).value


def refusal(data: bytes) -> InputError:
    with pytest.raises(InputError) as caught:
        read_pickle(data, "file.pt", "data.pkl", PLAIN)
    return caught.value


plain_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text()
    | st.binary(),
    lambda inner: (
        st.lists(inner)
        | st.dictionaries(st.text() | st.integers(-(2**59), 2**59), inner)
        | st.tuples(inner, inner)
    ),
    max_leaves=20,
)


class Runs:
    """Its pickle makes a file when it is executed."""

    def __init__(self, path: pathlib.Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_pickles_without_classes_are_read_as_pickle_reads_them():
    @given(plain_values, st.integers(0, pickle.HIGHEST_PROTOCOL))
    def check(value, protocol):
        assert value_of(pickle.dumps(value, protocol)) == value

    check()


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_standard_containers_become_plain_ones(protocol):
    value = {
        "ordered": collections.OrderedDict([("a", 1), ("b", 2)]),
        "counter": collections.Counter("aab"),
        "default": collections.defaultdict(list, x=[1]),
        "set": {1},
        "bytes": b"\x00\xff",
        "complex": 1 + 2j,
    }
    assert value_of(pickle.dumps(value, protocol)) == {
        "ordered": {"a": 1, "b": 2},
        "counter": {"a": 2, "b": 1},
        "default": {"x": [1]},
        "set": [1],
        "bytes": b"\x00\xff",
        "complex": 1 + 2j,
    }


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_payload_is_named_and_does_not_run(tmp_path, protocol):
    ran = tmp_path / "ran"
    error = refusal(pickle.dumps({"weights": [1, 2], "payload": Runs(ran)}, protocol))
    assert error.kind == "unsafe"
    assert f"{os.name}.system" in error.message
    assert not ran.exists()


@pytest.mark.parametrize(
    "data",
    [
        b"(S'touch ran'\nios\nsystem\n.",
        b"(cos\nsystem\nS'touch ran'\no.",
        b"\x80\x04\x8c\x02os\x94\x8c\x06system\x94\x93\x8c\x09touch ran\x85R.",
        b"\x80\x02cbuiltins\neval\nX\x04\x00\x00\x001+1\n\x85R.",
        b"\x80\x02cbuiltins\ngetattr\ncbuiltins\nlist\nX\x01\x00\x00\x00a\x86R.",
        b"\x80\x02c__builtin__\n__import__\nX\x02\x00\x00\x00os\x85R.",
        b"\x80\x02ctorch.hub\nload\n)R.",
        b"\x80\x02ctorch\nload\n)R.",
        b"\x80\x04\x8c\x08builtins\x8c\x0clist.__new__\x93.",
    ],
)
def test_other_ways_to_call_are_refused_by_name(data):
    assert refusal(data).kind == "unsafe"


def test_names_cannot_forge_terminal_output():
    error = refusal(b"\x80\x02cevil\x1b[2J\nname\n.")
    assert "\x1b" not in error.message


def test_state_set_on_dictionaries_has_no_effect():
    data = pickle.dumps(collections.OrderedDict(a=1), 2)[:-1]
    state = pickle.dumps({"items": None}, 0)[:-1]
    assert value_of(data + state + b"b.") == {"a": 1}


def test_only_latin1_text_is_encoded():
    assert (
        value_of(b"\x80\x02c_codecs\nencode\nX\x01\x00\x00\x00aX\x06\x00\x00\x00latin1\x86R.")
        == b"a"
    )
    wrong = b"\x80\x02c_codecs\nencode\nX\x01\x00\x00\x00aX\x05\x00\x00\x00rot13\x86R."
    assert refusal(wrong).kind == "malformed"


HOSTILE = {
    "empty": b"",
    "no stop": b"\x80\x02}",
    "stack underflow": b"\x80\x02R.",
    "huge string": b"\x80\x04\x8d" + struct.pack("<Q", 1 << 62) + b"x.",
    "huge bytes": b"\x80\x04\x8e" + struct.pack("<Q", 1 << 62) + b"x.",
    "huge bytearray": b"\x80\x05\x96" + struct.pack("<Q", 1 << 40) + b"x.",
    "unknown memo": b"\x80\x02h\x07.",
    "extension": b"\x80\x02\x82\x01.",
    "out-of-band buffer": b"\x80\x05\x97.",
    "digits": b"I" + b"9" * 100_000 + b"\n.",
    "call of a string": b"\x80\x02X\x01\x00\x00\x00a)R.",
    "items of a string": b"\x80\x02X\x01\x00\x00\x00aK\x01K\x02s.",
    "text persistent id": b"Pabc\n.",
    "persistent id": b"\x80\x02K\x01Q.",
    "set of a range": b"\x80\x02cbuiltins\nset\ncbuiltins\nrange\nM\xff\xff\x85R\x85R.",
    "bytearray of a size": b"\x80\x02cbuiltins\nbytearray\nJ\xff\xff\xff\x7f\x85R.",
    "deep tuples as persistent id": b"\x80\x02)" + b"\x85" * 100_000 + b"Q.",
    "odd items": b"\x80\x02}(K\x01u.",
}


@pytest.mark.parametrize("data", HOSTILE.values(), ids=HOSTILE.keys())
def test_broken_and_hostile_pickles_are_malformed(data):
    assert refusal(data).kind == "malformed"


def test_a_memo_index_allocates_nothing():
    assert value_of(b"\x80\x02}r\xff\xff\xff\xff.") == {}


def test_containers_may_hold_themselves():
    loop: list[object] = []
    loop.append(loop)
    read = value_of(pickle.dumps(loop))
    assert read[0] is read


def test_deep_nesting_is_no_problem():
    read = value_of(b"\x80\x02)" + b"\x85" * 200_000 + b".")
    assert len(read) == 1


def test_a_key_that_would_hash_for_ever_is_not_hashed():
    doubling = b")" + b"".join(b"q%c0h%ch%c\x86" % (i, i, i) for i in range(100))
    start = time.process_time()
    read = value_of(b"\x80\x02}" + doubling + b"K\x01s.")
    assert list(read.values()) == [1]
    assert time.process_time() - start < 5


def test_sharing_cannot_multiply_copies():
    items = b"](" + b"K\x01" * 10_000 + b"e\x85q\x01"
    copies = b"cbuiltins\nlist\nq\x02" + b"h\x02h\x01R0" * 10_000
    assert "again and again" in refusal(b"\x80\x02" + items + copies + b"N.").message


def test_a_file_that_ends_inside_a_pickle_is_truncated():
    data = pickle.dumps(list(range(100)))
    for cut in range(1, len(data)):
        with pytest.raises(InputError) as caught:
            read_pickle(io.BytesIO(data[:cut]), "f", "its pickle", PLAIN, end=cut)
        assert caught.value.kind == "truncated"


def test_the_position_after_a_pickle_is_known():
    stream = io.BytesIO(pickle.dumps([1, 2]) + b"rest")
    assert read_pickle(stream, "f", "x", PLAIN, end=100).end == len(pickle.dumps([1, 2]))


@settings(max_examples=300, deadline=2000)
@given(st.binary(max_size=200))
def test_arbitrary_bytes_give_a_value_or_an_input_error(data):
    with contextlib.suppress(InputError):
        value_of(b"\x80\x04" + data)


def test_what_a_name_stands_for_is_the_dialects_to_say():
    shout = Dialect({"argparse.Namespace": lambda _machine, args: ["called", *args]})
    assert read_pickle(b"\x80\x02cargparse\nNamespace\nK\x07\x85R.", "f", "x", shout).value == [
        "called",
        7,
    ]


def test_references_outside_the_pickle_are_resolved_and_listed():
    dialect = Dialect({}, persistent=lambda pid: ("storage", pid))
    read = read_pickle(b"\x80\x02]K\x01Qa.", "f", "x", dialect)
    assert read.value == [("storage", 1)]
    assert read.persisted == (("storage", 1),)


def test_the_refusal_says_what_to_do():
    with pytest.raises(InputError, match="write it as JSON"):
        read_pickle(pickle.dumps(argparse.Namespace()), "f", "x", PLAIN, refusal="write it as JSON")
