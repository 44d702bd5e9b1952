"""The arrays of .npz and .npy files are found where numpy.load finds them."""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import struct
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gradscope.checkpoints.npz import read_npz
from gradscope.errors import InputError

if TYPE_CHECKING:
    from gradscope.checkpoints.tensors import TensorRef

NUMPY_NAMES = {
    "BOOL": "?", "U8": "u1", "I8": "i1", "U16": "u2", "I16": "i2", "U32": "u4", "I32": "i4",
    "U64": "u8", "I64": "i8", "F16": "f2", "F32": "f4", "F64": "f8", "C64": "c8", "C128": "c16",
}  # fmt: skip


def materialise(ref: TensorRef) -> np.ndarray:
    dtype = np.dtype(NUMPY_NAMES[ref.dtype]).newbyteorder(">" if ref.big_endian else "<")
    data = Path(ref.source).read_bytes()[ref.offset :]
    if ref.strides is None:
        return np.frombuffer(data, dtype, ref.numel).reshape(ref.shape)
    flat = np.frombuffer(data[: ref.nbytes], dtype)
    strides = [stride * dtype.itemsize for stride in ref.strides]
    return np.lib.stride_tricks.as_strided(flat, ref.shape, strides)


ARRAYS = {
    **{name: np.arange(6).reshape(2, 3).astype(code) for name, code in NUMPY_NAMES.items()},
    "fortran": np.asfortranarray(np.arange(24.0).reshape(2, 3, 4)),
    "big": np.arange(5, dtype=">f4"),
    "big fortran": np.asfortranarray(np.arange(6, dtype=">i2").reshape(2, 3)),
    "scalar": np.float32(1.5),
    "empty": np.zeros((0, 3)),
    "column": np.arange(4.0).reshape(4, 1),
}


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_every_array_equals_what_numpy_loads(tmp_path, save):
    path = str(tmp_path / "a.npz")
    save(path, **ARRAYS)
    checkpoint = read_npz(path)
    assert checkpoint.format == "npz"
    assert checkpoint.nbytes == os.path.getsize(path)
    assert [ref.name for ref in checkpoint.tensors] == list(ARRAYS)
    with np.load(path) as loaded:
        for ref in checkpoint.tensors:
            np.testing.assert_array_equal(materialise(ref), loaded[ref.name])
            assert ref.shape == loaded[ref.name].shape


def test_a_bare_npy_is_one_array(tmp_path):
    path = str(tmp_path / "a.npy")
    np.save(path, np.arange(6.0).reshape(2, 3).T)
    checkpoint = read_npz(path)
    assert (checkpoint.format, checkpoint.tensors[0].name) == ("npy", "array")
    np.testing.assert_array_equal(materialise(checkpoint.tensors[0]), np.load(path))


def test_arrays_appended_to_an_npy_are_a_failure(tmp_path):
    path = tmp_path / "a.npy"
    with path.open("wb") as file:
        np.save(file, np.arange(3))
        end = file.tell()
        np.save(file, np.arange(3))
    checkpoint = read_npz(str(path))
    (failure,) = checkpoint.failures
    assert f"{os.path.getsize(path) - end} bytes behind the array, from byte {end} on" in (
        failure.message
    )
    assert "like another array" in failure.message
    assert [ref.shape for ref in checkpoint.tensors] == [(3,)]


def test_bfloat16_that_numpy_saved_as_raw_bytes_is_read(tmp_path):
    values = torch.tensor([[1.0, -2.5], [3.0, torch.inf]]).bfloat16()
    raw = values.view(torch.uint16).numpy().view("V2")
    np.savez(tmp_path / "a.npz", w=raw, x=np.ones(2))
    checkpoint = read_npz(str(tmp_path / "a.npz"))
    assert [(ref.name, ref.dtype) for ref in checkpoint.tensors] == [("w", "BF16"), ("x", "F64")]
    assert checkpoint.skipped == ()
    assert any("read as bfloat16" in note for note in checkpoint.notes)
    stored = np.fromfile(checkpoint.path, np.uint8)[checkpoint.tensors[0].offset :][:8]
    assert torch.equal(torch.from_numpy(stored.copy()).view(torch.bfloat16).view(2, 2), values)


def test_raw_bytes_of_another_width_are_not_guessed(tmp_path):
    np.savez(tmp_path / "a.npz", w=np.zeros(4, "V1"), r=np.zeros(2, [("a", "f2")]), x=np.ones(2))
    checkpoint = read_npz(str(tmp_path / "a.npz"))
    assert [ref.name for ref in checkpoint.tensors] == ["x"]
    assert [(s.subject, s.deliberate) for s in checkpoint.skipped] == [("w", False), ("r", False)]


def test_text_and_dates_beside_weights_are_no_missing_weights(tmp_path):
    np.savez(tmp_path / "a.npz", w=np.ones(2), names=np.array(["a"]), day=np.array("2020", "M8[D]"))
    assert all(skipped.deliberate for skipped in read_npz(str(tmp_path / "a.npz")).skipped)


@pytest.mark.parametrize("version", [(1, 0), (2, 0), (3, 0)])
def test_every_version_of_the_format_is_read(tmp_path, version):
    path = tmp_path / "a.npy"
    with path.open("wb") as file:
        np.lib.format.write_array(file, np.arange(3), version=version)
    np.testing.assert_array_equal(materialise(read_npz(str(path)).tensors[0]), [0, 1, 2])


def test_only_compressed_arrays_are_unpacked(tmp_path):
    np.savez(tmp_path / "a.npz", w=np.ones(3))
    np.savez_compressed(tmp_path / "b.npz", w=np.ones(3))
    assert read_npz(str(tmp_path / "a.npz")).tensors[0].unpacked is None
    assert read_npz(str(tmp_path / "b.npz")).tensors[0].unpacked is not None


def test_unpacked_arrays_are_deleted_at_exit(tmp_path):
    path = str(tmp_path / "a.npz")
    np.savez_compressed(path, w=np.ones(3))
    code = (
        "import sys; from gradscope.checkpoints.npz import read_npz\n"
        "print(read_npz(sys.argv[1]).tensors[0].unpacked)"
    )
    shown = subprocess.run([sys.executable, "-c", code, path], capture_output=True, check=True)
    assert shown.stdout.strip()
    assert not os.path.exists(shown.stdout.strip())


@pytest.mark.parametrize(
    ("array", "reason"),
    [
        (np.array(["a", "b"]), "strings"),
        (np.array([b"a"]), "byte strings"),
        (np.array(["2020-01-01"], "M8[D]"), "dates"),
        (np.array([1], "m8[s]"), "time differences"),
        (np.zeros(2, [("a", "f4")]), "records"),
        (np.zeros(2, np.longdouble), "extended-precision"),
        (np.zeros(2, np.clongdouble), "extended-precision"),
    ],
    ids=["str", "bytes", "date", "delta", "record", "longdouble", "clongdouble"],
)
@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_arrays_of_no_analysable_type_are_skipped(tmp_path, save, array, reason):
    save(tmp_path / "a.npz", x=array, w=np.ones(2))
    checkpoint = read_npz(str(tmp_path / "a.npz"))
    assert [ref.name for ref in checkpoint.tensors] == ["w"]
    (skipped,) = checkpoint.skipped
    assert skipped.subject == "x"
    assert reason in skipped.reason


class Runs:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_pickled_objects_are_refused_and_do_not_run(tmp_path, save):
    save(tmp_path / "a.npz", w=np.ones(2), x=np.array([Runs(tmp_path / "ran")], object))
    with pytest.raises(InputError) as caught:
        read_npz(str(tmp_path / "a.npz"))
    assert caught.value.kind == "unsafe"
    assert "array 'x'" in caught.value.message
    assert not (tmp_path / "ran").exists()


def npy(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


def zipped(path: Path, method: int = zipfile.ZIP_STORED, **members: bytes) -> str:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in members.items():
            archive.writestr(f"{name}.npy", data)
    return str(path)


def refusal(path: str) -> InputError:
    with pytest.raises(InputError) as caught:
        read_npz(path)
    return caught.value


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize("change", [b"more", -3])
def test_a_member_longer_or_shorter_than_its_header_says_is_refused(tmp_path, method, change):
    data = npy(np.ones(4))
    data = data + change if isinstance(change, bytes) else data[:change]
    error = refusal(zipped(tmp_path / "a.npz", method, w=data))
    assert error.kind == "malformed"
    assert "array 'w'" in error.message


def test_a_bomb_is_refused_before_it_is_inflated(tmp_path, monkeypatch):
    monkeypatch.setattr("gradscope.containers.zip._BOMB_BYTES", 1 << 20)
    np.savez_compressed(tmp_path / "fine.npz", w=np.zeros(1 << 10))
    np.savez_compressed(tmp_path / "bomb.npz", w=np.zeros(1 << 18))
    assert read_npz(str(tmp_path / "fine.npz")).tensors
    error = refusal(str(tmp_path / "bomb.npz"))
    assert error.kind == "unsafe"
    assert "inflate" in error.message


def test_a_wrong_checksum_of_a_compressed_array_is_noticed(tmp_path):
    path = zipped(tmp_path / "a.npz", zipfile.ZIP_DEFLATED, w=npy(np.ones(4)))
    data = bytearray(Path(path).read_bytes())
    for at in (14, data.rindex(b"PK\1\2") + 16):
        data[at] ^= 1
    Path(path).write_bytes(data)
    (failure,) = read_npz(path).failures
    assert failure.kind == "malformed"
    assert "'w.npy' is damaged: its checksum is wrong" in failure.message


def test_an_unknown_compression_fails_that_array_alone(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("w.npy", npy(np.ones(3)))
        archive.writestr("v.npy", npy(np.ones(3)), zipfile.ZIP_LZMA)
    checkpoint = read_npz(str(tmp_path / "a.npz"))
    assert [ref.name for ref in checkpoint.tensors] == ["w"]
    assert checkpoint.failures[0].kind == "unsupported"


def test_members_that_are_no_arrays_are_skipped(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("readme.txt", "hello")
    checkpoint = read_npz(str(tmp_path / "a.npz"))
    assert checkpoint.tensors == ()
    assert checkpoint.skipped[0].subject == "readme.txt"


@pytest.mark.parametrize(
    "descr", ["'<f4,<f4'", "[('a', '<f4')]", "'O'", "'x'", "3", "'<f3'", "('<f4', (2,))", "None"]
)
def test_hostile_headers_give_an_input_error_or_skip(tmp_path, descr):
    text = f"{{'descr': {descr}, 'fortran_order': False, 'shape': (2,), }}".encode()
    text = text.ljust(117) + b"\n"
    path = tmp_path / "a.npy"
    path.write_bytes(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + bytes(16))
    with contextlib.suppress(InputError):
        assert read_npz(str(path)).tensors == ()


@pytest.mark.parametrize(
    "shape", ["(-1,)", "(True,)", "(2**62,)", "(99999999999999999999,)", "[2]"]
)
def test_impossible_shapes_are_refused(tmp_path, shape):
    text = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}".encode()
    text = text.ljust(117) + b"\n"
    path = tmp_path / "a.npy"
    path.write_bytes(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + bytes(16))
    assert refusal(str(path)).kind in ("malformed", "truncated")


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed, None])
def test_a_file_cut_anywhere_gives_an_input_error(tmp_path, save):
    path = tmp_path / "a"
    stream = io.BytesIO()
    if save:
        save(stream, w=np.arange(20.0), v=np.ones(3))
    whole = stream.getvalue() or npy(np.arange(20.0))
    for cut in range(len(whole)):
        path.write_bytes(whole[:cut])
        assert refusal(str(path)).kind in ("truncated", "malformed")


@pytest.mark.parametrize("content", [b"hello", b"", pickle.dumps([1])])
def test_other_files_are_refused(tmp_path, content):
    path = tmp_path / "a.npz"
    path.write_bytes(content)
    assert refusal(str(path)).kind in ("malformed", "truncated")


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_damaged_files_give_a_checkpoint_or_an_input_error(tmp_path, save):
    stream = io.BytesIO()
    save(stream, w=np.arange(20.0), v=np.asfortranarray(np.ones((3, 2))))
    whole = stream.getvalue()
    path = tmp_path / "a.npz"

    @settings(max_examples=200, deadline=2000, suppress_health_check=[HealthCheck.too_slow])
    @given(st.lists(st.tuples(st.integers(0, len(whole) - 1), st.integers(0, 255)), max_size=4))
    def check(edits):
        data = bytearray(whole)
        for at, byte in edits:
            data[at] = byte
        path.write_bytes(data)
        with contextlib.suppress(InputError):
            read_npz(str(path))

    check()
