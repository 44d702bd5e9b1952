"""Files are known by their content, and what cannot be read is named with its remedy."""

from __future__ import annotations

import gzip
import io
import json
import lzma
import pickle
import struct
import subprocess
import sys
import tarfile
import zipfile
import zlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save

from gradscope.checkpoints.sniff import sniff
from gradscope.errors import GradscopeError, InputError

torch = pytest.importorskip("torch")

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4665ab12\nsize 4912345678\n"


def zipped(*names: str) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name in names:
            archive.writestr(name, b"content")
    return stream.getvalue()


def tarred(*names: str) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        for name in names:
            archive.addfile(tarfile.TarInfo(name))
    return stream.getvalue()


def torch_saved(**options: object) -> bytes:
    stream = io.BytesIO()
    torch.save({"w": torch.ones(2)}, stream, **options)
    return stream.getvalue()


def npz() -> bytes:
    stream = io.BytesIO()
    np.savez(stream, a=np.ones(2))
    return stream.getvalue()


def npy() -> bytes:
    stream = io.BytesIO()
    np.save(stream, np.ones(2))
    return stream.getvalue()


def broken_header() -> bytes:
    return struct.pack("<Q", 20) + b'x"w": {"data_offsets": [0'


INDEX = json.dumps({"metadata": {}, "weight_map": {"w": "model.safetensors"}}).encode()
LATE_INDEX = json.dumps({"metadata": {"x": "y" * 100_000}, "weight_map": {}}).encode()

READ: list[tuple[str, str, bytes]] = [
    ("safetensors", "safetensors", save({"w": np.ones(2)})),
    ("spaces first", "safetensors", struct.pack("<Q", 4) + b"  {}"),
    ("empty header", "safetensors", struct.pack("<Q", 2) + b"{}"),
    ("damaged header", "safetensors", broken_header()),
    ("damaged length", "safetensors", b"\xff" * 8 + b'{"w":{"data_offsets":[0,8]}}'),
    ("index", "safetensors-index", INDEX),
    ("index with spaces", "safetensors-index", b"\n  " + INDEX),
    ("index with long metadata", "safetensors-index", LATE_INDEX),
    ("torch zip", "zip-torch", torch_saved()),
    ("torch legacy", "torch-legacy", torch_saved(_use_new_zipfile_serialization=False)),
    *(
        (
            f"torch legacy, protocol {protocol}",
            "torch-legacy",
            torch_saved(_use_new_zipfile_serialization=False, pickle_protocol=protocol),
        )
        for protocol in (0, 1, 4)
    ),
    ("TorchScript", "torchscript", zipped("m/data.pkl", "m/constants.pkl", "m/code/a.py")),
    ("exported", "pt2", zipped("m/archive_format", "m/models/model.json")),
    ("exported, long ago", "pt2", zipped("serialized_exported_program.json", "version")),
    ("npz", "npz", npz()),
    ("npy", "npy", npy()),
]


@pytest.mark.parametrize(
    ("expected", "content"), [row[1:] for row in READ], ids=[row[0] for row in READ]
)
@pytest.mark.parametrize("name", ["x.safetensors", "x.pt", "x"])
def test_formats_are_known_by_content_whatever_the_name(
    tmp_path: Path, name: str, expected: str, content: bytes
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    assert sniff(str(path)) == expected


def onnx() -> bytes:
    return b"\x08\x08\x12\x07pytorch\x1a\x052.1.0:\x80\x01"


H5 = b"\x89HDF\r\n\x1a\n"
REFUSED: list[tuple[str, bytes, Iterable[str]]] = [
    ("LFS", LFS, ["Git LFS", "git lfs pull", "4.9 GB (4,912,345,678 bytes)", "4665ab12"]),
    ("HTML", b"<!DOCTYPE html><html><title>Sign in</title>", ["HTML", "'Sign in'", "login"]),
    ("HTML with a mark", b"\xef\xbb\xbf\n<html>", ["HTML"]),
    ("XML", b'<?xml version="1.0"?><Error><Message>NoSuchKey</Message>', ["XML", "NoSuchKey"]),
    ("JSON error", b'{"error":"Repository not found"}', ["JSON", "Repository not found"]),
    ("JSON", b'{"hidden_size": 8}', ["JSON", "weight_map"]),
    ("GGML", b"tjgg\x03\0\0\0" + bytes(16), ["GGML", "GGUF", "safetensors"]),
    ("ONNX", onnx(), ["ONNX"]),
    ("TensorFlow Lite", b"\x1c\0\0\0TFL3" + bytes(99), ["TensorFlow Lite", "weights"]),
    ("OpenVINO", b'<?xml version="1.0"?>\n<net name="m" version="11"><layers>', ["OpenVINO"]),
    ("HDF5", H5 + bytes(99), ["HDF5"]),
    ("HDF5 behind a user block", b"user" * 128 + H5, ["HDF5"]),
    ("Keras", H5 + b"keras_version", ["Keras"]),
    ("Keras 3", zipped("config.json", "model.weights.h5"), ["Keras 3"]),
    ("tar", tarred("model.ckpt"), ["tar archive", "extract"]),
    ("old torch", tarred("sys_info", "pickle"), ["PyTorch before"]),
    ("gzip", gzip.compress(b"x" * 99), ["gzip", "decompress"]),
    ("xz", lzma.compress(b"x" * 99), ["xz", "decompress"]),
    ("zstd", b"\x28\xb5\x2f\xfd" + bytes(9), ["zstd"]),
    ("7z", b"7z\xbc\xaf\x27\x1c" + bytes(9), ["7z"]),
    ("pickle", pickle.dumps({"coef": [1.5] * 9}), ["Python pickle", "run code"]),
    ("pickle of arrays", pickle.dumps(np.ones(9)), ["mentions numpy"]),
    ("text pickle", pickle.dumps({"a": 1}, protocol=0), ["Python pickle"]),
    ("joblib", zlib.compress(pickle.dumps({"a": list(range(99))})), ["Python pickle"]),
    ("SavedModel", b"\x08\x01\x12\x90\x05\x0a\x05serve", ["SavedModel"]),
    ("frozen graph", b"\x0a\x12\x0a\x01x\x12\x0bPlaceholder", ["TensorFlow graph"]),
    ("TF index", bytes(range(1, 99)) + bytes.fromhex("57fb808b247547db"), ["TensorFlow"]),
    ("Flax", b"\x81\xa6params\x82\xa1a\xc7", ["msgpack", "'params'", "Flax"]),
    ("text", "just some wörds\n".encode() * 9, ["text file", "just some wörds"]),
    ("any zip", zipped("a.txt", "b.txt"), ["zip archive without a checkpoint", "'a.txt'"]),
    ("zip of a model", zipped("a/model.safetensors"), ["unzip", "a/model.safetensors"]),
    ("empty zip", zipped(), ["empty zip"]),
    ("noise", bytes(range(200, 256)), ["not recognised", "c8 c9 ca", "safetensors"]),
    ("image", b"\x89PNG\r\n\x1a\n" + bytes(9), ["PNG"]),
]


def refusal(path: Path) -> InputError:
    with pytest.raises(InputError) as caught:
        sniff(str(path))
    assert str(path) not in caught.value.message or "DCP" in caught.value.message
    return caught.value


@pytest.mark.parametrize(
    ("content", "said"), [row[1:] for row in REFUSED], ids=[row[0] for row in REFUSED]
)
def test_other_formats_are_named_with_a_remedy(
    tmp_path: Path, content: bytes, said: Iterable[str]
) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    error = refusal(path)
    assert error.kind == "unsupported"
    for words in said:
        assert words in error.message


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "empty"),
        (b"\0" * 100, "only zero bytes"),
        (b"\0" * 200_000, "zero bytes at its start (200.0 kB)"),
        (b"\x01\xff", "2 bytes, too short"),
        (zipped("a/data.pkl")[:-10], "directory"),
        (torch_saved()[:500], "directory"),
    ],
)
def test_unfinished_downloads_are_truncated(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "model.pt"
    path.write_bytes(content)
    error = refusal(path)
    assert error.kind == "truncated"
    assert said in error.message


def test_control_characters_of_a_strange_text_are_not_repeated(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"hello \x1b[31mworld")
    assert "\x1b" not in refusal(path).message


def test_real_torchscript_and_exported_programs_are_told_apart(tmp_path: Path) -> None:
    code = (
        "import sys, torch\n"
        "m = torch.nn.Linear(3, 2)\n"
        "torch.jit.save(torch.jit.trace(m, torch.ones(1, 3)), sys.argv[1])\n"
        "torch.export.save(torch.export.export(m, (torch.ones(1, 3),)), sys.argv[2])\n"
    )
    script, exported = str(tmp_path / "s"), str(tmp_path / "e.pt2")
    subprocess.run([sys.executable, "-W", "ignore", "-c", code, script, exported], check=True)
    assert (sniff(script), sniff(exported)) == ("torchscript", "pt2")


# Folders.


def folder(path: Path, *names: str) -> Path:
    for name in names:
        (path / name).write_bytes(b"x")
    return path


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (("__0_0.distcp", "__1_0.distcp"), "without its .metadata"),
        (("saved_model.pb",), "SavedModel"),
        (("manifest.ocdbt",), "Orbax"),
    ],
)
def test_foreign_folders_are_named(tmp_path: Path, names: tuple[str, ...], said: str) -> None:
    error = refusal(folder(tmp_path, *names))
    assert error.kind == "unsupported"
    assert said in error.message


@pytest.mark.parametrize("names", [(), ("model.safetensors",), (".metadata", "model.safetensors")])
def test_other_folders_are_folders(tmp_path: Path, names: tuple[str, ...]) -> None:
    assert sniff(str(folder(tmp_path, *names))) == "folder"


def test_what_does_not_exist_is_missing(tmp_path: Path) -> None:
    assert refusal(tmp_path / "none").kind == "missing"
    assert refusal(tmp_path / ("n" * 5000)).kind == "missing"


@settings(
    max_examples=300,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    prefix=st.sampled_from(
        [b"", *(row[2][:80] for row in READ), *(row[1][:80] for row in REFUSED)]
    ),
    rest=st.binary(max_size=60),
    cut=st.integers(0, 80),
)
@example(prefix=b"\x08", rest=b"", cut=80)
@example(prefix=b"\xde", rest=b"1234567", cut=80)
def test_any_bytes_get_an_answer(tmp_path: Path, prefix: bytes, rest: bytes, cut: int) -> None:
    path = tmp_path / "any"
    path.write_bytes(prefix[:cut] + rest)
    assert 0 < len(answer(str(path))) < 2000


def answer(path: str) -> str:
    try:
        return sniff(path)
    except GradscopeError as error:
        return str(error)
