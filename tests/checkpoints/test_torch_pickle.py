"""What stands for torch's tensors in its pickles, and what else may occur there."""

from __future__ import annotations

import argparse
import collections
import datetime
import pathlib
import pickle

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


def test_every_needed_class_is_named_with_the_way_to_convert():
    value = {"args": argparse.Namespace(a=1), "counts": collections.UserList([1]), "ok": {1: 2}}
    error = refusal(pickle.dumps(value))
    assert "argparse.Namespace, collections.UserList" in error.message
    assert "torch.save(model.state_dict()" in error.message
    assert "file.pt" not in error.message


def test_more_names_can_be_allowed_and_stay_inert():
    data = pickle.dumps(argparse.Namespace(a=1))
    read = read_torch_pickle(data, "f", "x", allow=lambda name: name == "argparse.Namespace").value
    assert isinstance(read, Instance)
    assert (read.name, read.state) == ("argparse.Namespace", {"a": 1})
    assert value_of(b"\x80\x02ctorch\nfloat32\n.") == Global("torch.float32")


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
