"""What stands for torch's tensors in its pickles, and what else may occur there."""

from __future__ import annotations

import argparse
import collections
import dataclasses
import datetime
import decimal
import enum
import functools
import io
import logging
import os
import pathlib
import pickle
import re
import types
import uuid
import zoneinfo

import numpy as np
import pytest

from gradscope.checkpoints.torch_pickle import TensorRecord, read_torch_pickle
from gradscope.containers.pickle_machine import Global, Instance
from gradscope.errors import InputError


def value_of(data: bytes):
    return read_torch_pickle(data, "file.pt", "data.pkl").value


def refusal(data: bytes) -> InputError:
    with pytest.raises(InputError) as caught:
        read_torch_pickle(data, "file.pt", "data.pkl")
    return caught.value


def test_harmless_library_objects_are_inert():
    value = [pathlib.PurePosixPath("a/b"), datetime.date(2020, 1, 1), np.float64(3.0), slice(1, 2)]
    read = value_of(pickle.dumps(value))
    assert all(isinstance(item, Instance) for item in read)


def test_numpy_arrays_are_recognised_and_not_built():
    read = value_of(pickle.dumps({"a": np.arange(3)}))
    assert isinstance(read["a"], TensorRecord)
    assert "NumPy" in read["a"].unreadable


class Colour(enum.Enum):
    RED = 1


@dataclasses.dataclass
class Settings:
    lr: float = 0.1


class Attributes(dict):
    """As Lightning's AttributeDict, a dictionary of a class of its own."""


class Items(list):
    """A list of a class of its own."""


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize(
    "value",
    [
        argparse.Namespace(lr=1, path=pathlib.PurePosixPath("a")), Colour.RED, Settings(),
        Attributes(a=1), Items([1]), functools.partial(int, base=2), decimal.Decimal("1.5"),
        collections.deque([1]), uuid.UUID(int=1), object(), "a".upper,
        np.random.default_rng(0), logging.getLogger("x"), ValueError("x"), re.compile("a"),
        io.BytesIO(b"x"), types.SimpleNamespace(a=1), zoneinfo.ZoneInfo("UTC"),
    ],
    ids=lambda value: type(value).__name__,
)  # fmt: skip
def test_objects_are_records_and_never_built(value, protocol):
    read = value_of(pickle.dumps({"x": value, "rest": 7}, protocol))
    assert isinstance(read["x"], (Instance, Global))
    assert read["rest"] == 7


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("value", [int, str, range, dict, np.ndarray, Settings, os.path.join])
def test_classes_and_functions_are_names(value, protocol):
    read = value_of(pickle.dumps(value, protocol))
    assert read == Global(f"{value.__module__}.{value.__qualname__}")


@pytest.mark.parametrize(
    "name", ["long", "unicode", "xrange", "int", "str", "range"]
)  # as torch.save's protocol 2 calls them
def test_python_2s_names_are_those_of_today(name):
    now = {"long": "int", "unicode": "str", "xrange": "range"}.get(name, name)
    data = f"\x80\x02c__builtin__\n{name}\n.".encode("latin1")
    assert value_of(data) == Global(f"builtins.{now}")


def test_what_an_object_holds_is_kept():
    items = value_of(pickle.dumps(Attributes(a=[1], b=2)))
    assert (items.name.rpartition(".")[2], items.items) == ("Attributes", {"a": [1], "b": 2})
    assert value_of(pickle.dumps(Items([1, 2]))).elements == [1, 2]
    namespace = value_of(pickle.dumps(argparse.Namespace(lr=3)))
    assert (namespace.name, namespace.state) == ("argparse.Namespace", {"lr": 3})


def test_a_call_of_what_was_never_built_is_a_record_too():
    method = b"\x80\x02c__builtin__\ngetattr\ncfoo\nBar\nX\x04\x00\x00\x00make\x86R"
    read = value_of(method + b"K\x01\x85R.")
    assert (read.name, read.args) == ("foo.Bar.make", (1,))


@pytest.mark.parametrize(
    "name",
    [
        "os\nsystem", "posix\nsystem", "nt\nsystem", "subprocess\nPopen", "builtins\neval",
        "__builtin__\nexec", "builtins\n__import__", "builtins\nopen", "builtins\nsetattr",
        "commands\ngetoutput", "runpy\nrun_path", "importlib\nimport_module", "socket\nsocket",
        "torch.serialization\nos.system", "torch\nload", "torch.hub\nload", "pickle\nloads",
        "_io\nopen", "pathlib\nPath.touch", "pathlib\nPosixPath.write_text", "tempfile\nmkdtemp",
        "webbrowser\nopen", "shutil\nrmtree", "sys\nexit", "ctypes\nCDLL", "numpy\nload",
    ],
)  # fmt: skip
def test_what_would_run_a_program_is_refused_by_name(name):
    error = refusal(f"\x80\x02}}X\x01\x00\x00\x00xc{name}\ns.".encode("latin1"))
    assert error.kind == "unsafe"
    assert "do not load it" in error.message
    assert "file.pt" not in error.message


@pytest.mark.parametrize(
    "data",
    [
        b"\x80\x02K\x01Q.",
        b"\x80\x02)" + b"\x85" * 100_000 + b"Q.",
        b"\x80\x02ctorch.hub\nload\n)R.",
    ],
    ids=["number", "deep tuples", "torch.hub.load"],
)
def test_other_references_and_functions_of_torch_are_refused(data):
    assert refusal(data).kind in ("malformed", "unsafe")


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("method", [pathlib.Path.touch, pathlib.Path("x").unlink])
def test_a_method_that_changes_files_is_refused_however_it_is_named(method, protocol):
    assert "athlib" in refusal(pickle.dumps([method], protocol)).message
