"""A byte that changed after a file was written costs its tensor, and is said."""

from __future__ import annotations

import struct
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.serialization import set_crc32_options

from gradscope.checkpoints.integrity import verified
from gradscope.checkpoints.open import open_checkpoint
from gradscope.checkpoints.tensors import Checkpoint
from gradscope.weights.analysis import analyze_weights

ARRAYS = {"left": np.arange(6.0), "hit": np.full(100, 7.0), "right": np.ones((2, 3))}


def saved(path: Path) -> str:
    if path.suffix == ".npz":
        np.savez(path, **ARRAYS)
    else:
        torch.save({name: torch.from_numpy(array) for name, array in ARRAYS.items()}, path)
    return str(path)


@pytest.fixture
def without_crcs():
    set_crc32_options(False)
    yield
    set_crc32_options(True)


@pytest.fixture(params=["model.npz", "model.pt"])
def path(request, tmp_path) -> str:
    return saved(tmp_path / request.param)


def flip(path: str, name: str) -> None:
    """Flip one bit in the middle of a tensor."""
    (ref,) = (ref for ref in open_checkpoint(path).tensors if ref.name == name)
    data = bytearray(Path(path).read_bytes())
    data[ref.offset + ref.nbytes // 2] ^= 1
    Path(path).write_bytes(data)


def names(checkpoint: Checkpoint) -> list[str]:
    return [ref.name for ref in checkpoint.tensors]


def stdlib_accepts(path: str) -> bool:
    with zipfile.ZipFile(path) as archive:
        return archive.testzip() is None


def test_a_healthy_file_is_left_as_it_is(path: str) -> None:
    assert stdlib_accepts(path)
    checkpoint = open_checkpoint(path)
    assert verified(checkpoint) is checkpoint
    assert all(ref.checksum is not None for ref in checkpoint.tensors)


def test_a_flipped_bit_costs_its_tensor_and_no_other(path: str) -> None:
    flip(path, "hit")
    assert not stdlib_accepts(path)
    checkpoint = verified(open_checkpoint(path))
    assert names(checkpoint) == ["left", "right"]
    assert [skipped.subject for skipped in checkpoint.skipped] == ["hit"]
    (failure,) = checkpoint.failures
    assert failure.kind == "malformed"
    assert "checksum" in failure.message
    assert "Copy or save the file again" in failure.message


def test_weights_analyses_the_healthy_tensors_and_ends_with_3(path: str) -> None:
    flip(path, "hit")
    report = analyze_weights(path)
    assert report.gate.exit_code == 3
    assert [tensor.name for tensor in report.result.tensors] == ["left", "right"]
    (error,) = report.errors
    assert (error.input, error.kind) == (path, "malformed")


def test_headers_alone_are_read_without_the_data(path: str) -> None:
    flip(path, "hit")
    assert names(open_checkpoint(path)) == list(ARRAYS)


def test_a_torch_file_without_crcs_is_read_unchecked(tmp_path: Path, without_crcs: None) -> None:
    path = saved(tmp_path / "model.pt")
    assert not stdlib_accepts(path)
    flip(path, "hit")
    checkpoint = verified(open_checkpoint(path))
    assert names(checkpoint) == list(ARRAYS)
    assert checkpoint.failures == ()


def test_storages_left_out_by_torch_to_be_filled_in_later_are_read(tmp_path: Path) -> None:
    with torch.serialization.skip_data():
        path = saved(tmp_path / "model.pt")
    assert names(verified(open_checkpoint(path))) == list(ARRAYS)


def test_all_views_of_a_damaged_storage_are_left_out(tmp_path: Path) -> None:
    base = torch.arange(48.0).view(6, 8)
    path = str(tmp_path / "model.pt")
    torch.save({"whole": base, "part": base[2:4, 1:], "turned": base.t(), "ok": base + 1}, path)
    flip(path, "whole")
    checkpoint = verified(open_checkpoint(path))
    assert names(checkpoint) == ["ok"]
    assert len(checkpoint.skipped) == 3
    assert len(checkpoint.failures) == 1


def test_an_exported_program_is_checked(tmp_path: Path) -> None:
    path = str(tmp_path / "model.pt2")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(torch.nn.Linear(4, 4), (torch.ones(1, 4),))
        torch.export.save(program, path)
    flip(path, "weight")
    assert names(verified(open_checkpoint(path))) == ["bias"]


def test_a_damaged_shard_is_named(tmp_path: Path) -> None:
    for number, name in ((1, "a"), (2, "b")):
        shard = tmp_path / f"pytorch_model-0000{number}-of-00002.bin"
        torch.save({name: torch.ones(64)}, shard)
    flip(str(shard), "b")
    checkpoint = verified(open_checkpoint(str(tmp_path)))
    assert names(checkpoint) == ["a"]
    assert checkpoint.failures[0].message.startswith(f"{shard.name}: member ")


def test_a_compressed_array_that_is_damaged_costs_only_itself(tmp_path: Path) -> None:
    path = tmp_path / "model.npz"
    np.savez_compressed(path, **ARRAYS)
    with zipfile.ZipFile(path) as archive:
        at = archive.getinfo("hit.npy").header_offset
    data = bytearray(path.read_bytes())
    data[at + 14] ^= 1  # the CRC in the local header is not the one that counts …
    assert names(read(path, data)) == list(ARRAYS)
    central = data.index(b"hit.npy", data.index(b"PK\1\2")) - 46
    (crc,) = struct.unpack_from("<L", data, central + 16)
    struct.pack_into("<L", data, central + 16, crc ^ 1)  # … this one is
    assert names(read(path, data)) == ["left", "right"]


def read(path: Path, data: bytes) -> Checkpoint:
    path.write_bytes(data)
    return verified(open_checkpoint(str(path)))


def test_a_file_that_is_gone_is_left_to_the_reader_of_its_data(path: str) -> None:
    checkpoint = open_checkpoint(path)
    Path(path).unlink()
    assert verified(checkpoint) is checkpoint


def test_a_damaged_pickle_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path / "model.pt")
    data = bytearray(Path(path).read_bytes())
    data[data.index(b"right")] ^= 1
    Path(path).write_bytes(data)
    assert [error.kind for error in analyze_weights(path).errors] == ["malformed"]
