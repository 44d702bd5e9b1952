"""Bytes of a file that belong to no archive and no array are counted, placed and end in 3."""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import gradscope
from gradscope.checkpoints.npz import read_npz
from gradscope.checkpoints.open import open_checkpoint
from gradscope.checkpoints.torchfile import read_torch
from gradscope.errors import InputError

Bytes = Callable[[float], bytes]


def zipped(value: float, shape: tuple[int, ...] = (4, 4)) -> bytes:
    file = io.BytesIO()
    torch.save({"w": torch.full(shape, value)}, file)
    return file.getvalue()


def legacy(value: float, shape: tuple[int, ...] = (4, 4)) -> bytes:
    file = io.BytesIO()
    torch.save({"w": torch.full(shape, value)}, file, _use_new_zipfile_serialization=False)
    return file.getvalue()


def npz(value: float, shape: tuple[int, ...] = (4, 4)) -> bytes:
    file = io.BytesIO()
    np.savez(file, w=np.full(shape, value, np.float32))
    return file.getvalue()


def npy(value: float, shape: tuple[int, ...] = (4, 4)) -> bytes:
    file = io.BytesIO()
    np.save(file, np.full(shape, value, np.float32))
    return file.getvalue()


ALL = {"zip": zipped, "legacy": legacy, "npz": npz, "npy": npy}
SAID = {
    "zip": "another zip archive", "npz": "another zip archive",
    "legacy": "another file of torch.save", "npy": "another array",
}  # fmt: skip


@pytest.mark.parametrize("second", ALL)
@pytest.mark.parametrize("first", ALL)
@pytest.mark.parametrize("large", [False, True], ids=["same size", "larger"])
def test_two_files_that_were_joined_are_one_and_the_rest_is_named(tmp_path, first, second, large):
    one = ALL[first](1.0)
    two = ALL[second](float("nan"), (300, 300) if large else (4, 4))
    path = tmp_path / "joined"
    path.write_bytes(one + two)
    report = gradscope.analyze_weights(path)
    assert report.gate.exit_code == 3
    assert [t.shape for t in report.result.tensors] == [(4, 4)]
    (error,) = report.errors
    assert f"{len(two):,} bytes behind" in error.message
    assert f"from byte {len(one):,} on" in error.message
    assert f"tail -c +{len(one) + 1}" in error.message
    assert SAID[second] in error.message


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("count", [1, 100, 70_000])
def test_zero_bytes_behind_the_end_are_named(tmp_path, name, count):
    path = tmp_path / "padded"
    path.write_bytes(ALL[name](1.0) + b"\0" * count)
    checkpoint = open_checkpoint(str(path))
    assert len(checkpoint.tensors) == 1
    (failure,) = checkpoint.failures
    assert failure.message.startswith(f"{count:,} byte")
    assert "zero bytes" in failure.message


@pytest.mark.parametrize("name", ALL)
def test_a_file_that_ends_where_it_should_has_no_rest(tmp_path, name):
    path = tmp_path / "whole"
    path.write_bytes(ALL[name](1.0))
    assert open_checkpoint(str(path)).failures == ()


def test_a_directory_of_the_first_archive_is_not_taken_for_the_seconds(tmp_path):
    """Archives of one size: the last end record's absolute offsets point into the first."""
    path = tmp_path / "a.pt"
    path.write_bytes(b"".join(map(zipped, range(5))))
    checkpoint = read_torch(str(path))
    assert f"{4 * len(zipped(0)):,} bytes" in checkpoint.failures[0].message


@pytest.mark.parametrize("make", [zipped, npz])
@pytest.mark.parametrize("before", [b"\0" * 100, b"MZ\x90\0" + b"x" * 70_000], ids=["few", "many"])
def test_bytes_before_an_archive_are_named(tmp_path, make, before):
    path = tmp_path / "a.pt"
    path.write_bytes(before + make(1.0))
    with pytest.raises(InputError) as caught:
        open_checkpoint(str(path))
    assert caught.value.kind == "malformed"
    assert f"{len(before):,} bytes that belong to no archive" in caught.value.message
    assert f"tail -c +{len(before) + 1}" in caught.value.message


@pytest.mark.parametrize("cut", [1, 20, 200])
def test_a_second_file_hides_no_damage_of_the_first(tmp_path, cut):
    path = tmp_path / "a.pt"
    path.write_bytes(zipped(1.0)[:-cut])
    with pytest.raises(InputError) as caught:
        read_torch(str(path))
    assert caught.value.kind in ("truncated", "malformed")


def test_marks_of_an_end_inside_the_data_are_not_taken_for_it(tmp_path):
    marks = np.frombuffer(b"PK\5\6" + b"\0" * 18, np.uint8)
    np.savez(tmp_path / "a.npz", w=np.tile(marks, 1000))
    whole = (tmp_path / "a.npz").read_bytes()
    (tmp_path / "b.npz").write_bytes(whole + npz(1.0))
    checkpoint = read_npz(str(tmp_path / "b.npz"))
    assert checkpoint.tensors[0].shape == (22_000,)
    assert f"from byte {os.path.getsize(tmp_path / 'a.npz'):,} on" in checkpoint.failures[0].message


def test_other_programs_files_are_not_called_archives(tmp_path):
    path: Path = tmp_path / "a.bin"
    path.write_bytes(b"\x7fELF" + b"x" * 1000)
    with pytest.raises(InputError, match="program"):
        open_checkpoint(str(path))
