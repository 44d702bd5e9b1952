"""Distributed checkpoints are read from their folder: every part where .metadata says it lies."""

from __future__ import annotations

import io
import pickle
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.distributed.checkpoint import metadata as described
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.state_dict_saver import save

import gradscope
from gradscope.checkpoints.open import open_checkpoint
from gradscope.checkpoints.tensors import TensorRef
from gradscope.checkpoints.tiles import read_range
from gradscope.errors import InputError, UsageError

Block = tuple[tuple[int, ...], torch.Tensor]


def saved(folder: Path, value: Mapping[str, Any]) -> str:
    """What torch itself writes in one process: each tensor is one part."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        save(dict(value), checkpoint_id=folder, no_dist=True)
    return str(folder)


def sharded(
    folder: Path, tensors: Mapping[str, tuple[tuple[int, ...], list[Block]]], **paths: Any
) -> str:
    """A checkpoint of several processes: part i of each tensor is in the file of process i."""
    folder.mkdir()
    table: dict[str, Any] = {}
    places: dict[Any, Any] = {}
    files: dict[str, bytes] = {}
    for name, (shape, blocks) in tensors.items():
        chunks = []
        for rank, (offsets, block) in enumerate(blocks):
            file = f"__{rank}_0.distcp"
            data = io.BytesIO()
            torch.save(block.clone(), data)
            start = len(files.setdefault(file, b""))
            files[file] += data.getvalue()
            at = torch.Size(offsets)
            chunks.append(described.ChunkStorageMetadata(at, block.shape))
            places[described.MetadataIndex(name, at, rank)] = _StorageInfo(
                file, start, len(data.getvalue())
            )
        properties = described.TensorProperties(dtype=blocks[0][1].dtype)
        table[name] = described.TensorStorageMetadata(properties, torch.Size(shape), chunks)
    whole = described.Metadata(table, planner_data=paths.get("paths"), storage_data=places)
    for file, content in files.items():
        (folder / file).write_bytes(content)
    (folder / ".metadata").write_bytes(pickle.dumps(whole))
    return str(folder)


def halves(tensor: torch.Tensor) -> tuple[tuple[int, ...], list[Block]]:
    """A tensor in two parts along dimension 0."""
    cut = (len(tensor) + 1) // 2
    rest = (0,) * (tensor.dim() - 1)
    return tuple(tensor.shape), [((0, *rest), tensor[:cut]), ((cut, *rest), tensor[cut:])]


def values(ref: TensorRef) -> np.ndarray[Any, Any]:
    return read_range(ref, 0, ref.numel).reshape(ref.shape)


def test_what_torch_saved_is_read(tmp_path):
    state = {f"layer.{i}.weight": torch.randn(3, 4) for i in range(3)}
    state["half"] = torch.randn(5).bfloat16()
    folder = saved(tmp_path / "a", {"model": state, "step": 7})
    checkpoint = open_checkpoint(folder)
    assert checkpoint.format == "dcp"
    refs = {ref.name: ref for ref in checkpoint.tensors}
    assert refs.keys() == state.keys()
    assert refs["half"].dtype == "BF16"
    for name in list(state)[:3]:
        np.testing.assert_array_equal(values(refs[name]), state[name].numpy())
    assert (checkpoint.skipped, checkpoint.failures) == ((), ())
    assert checkpoint.nbytes == sum(p.stat().st_size for p in Path(folder).iterdir())


def test_a_fault_in_any_part_is_found(tmp_path):
    weight = torch.randn(8, 8)
    weight[7, 7] = torch.nan
    report = gradscope.analyze_weights(sharded(tmp_path / "a", {"l.weight": halves(weight)}))
    assert [(f.name, f.subject) for f in report.findings] == [("non-finite", "part1/l.weight")]
    assert report.gate.exit_code == 1
    assert report.result.overall.parameters == 64


def test_a_whole_checkpoint_is_quiet(tmp_path):
    folder = sharded(tmp_path / "a", {f"l.{i}.weight": halves(torch.randn(9, 8)) for i in range(3)})
    report = gradscope.analyze_weights(folder)
    assert (report.gate.exit_code, report.findings, report.errors) == (0, (), ())
    assert (report.coverage.analyzed, report.coverage.total) == (6, 6)
    assert any("in parts" in note for note in report.result.notes)


def test_parts_are_where_they_are_said_to_be(tmp_path):
    weight = torch.randn(4, 6)
    columns: list[Block] = [((0, 0), weight[:, :4]), ((0, 4), weight[:, 4:])]
    folder = sharded(tmp_path / "a", {"w": ((4, 6), columns)})
    first, second = open_checkpoint(folder).tensors
    together = np.concatenate([values(first), values(second)], axis=1)
    np.testing.assert_array_equal(together, weight.numpy())


W = torch.ones(4, 2)
FAULTS: Mapping[str, tuple[list[Block], str]] = {
    "gap": ([((0, 0), W[:1]), ((2, 0), W[:2])], "parts are missing: they hold 6 of 8 elements"),
    "overlap": ([((0, 0), W[:3]), ((1, 0), W[:1])], "parts overlap"),
    "twice": ([((0, 0), W[:2]), ((0, 0), W[:2])], "parts overlap"),
    "outside": ([((0, 0), W[:2]), ((3, 0), W[:2])], "outside the tensor"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_parts_that_are_not_the_whole_tensor_are_a_failure(tmp_path, fault):
    blocks, said = FAULTS[fault]
    report = gradscope.analyze_weights(sharded(tmp_path / "a", {"w": ((4, 2), blocks)}))
    assert report.gate.exit_code == 3
    assert said in report.errors[0].message
    assert "'w'" in report.errors[0].message


def test_a_missing_file_costs_its_parts(tmp_path):
    folder = sharded(tmp_path / "a", {"w": halves(torch.ones(4, 2)), "b": ((2,), [((0,), W[0])])})
    (Path(folder) / "__1_0.distcp").unlink()
    report = gradscope.analyze_weights(folder)
    assert report.gate.exit_code == 3
    assert "__1_0.distcp" in report.errors[0].message
    assert [t.name for t in report.result.tensors] == ["part0/w", "b"]


def test_a_cut_file_costs_the_parts_beyond_its_end(tmp_path):
    folder = sharded(tmp_path / "a", {f"w{i}": ((4, 2), [((0, 0), W)]) for i in range(3)})
    file = Path(folder) / "__0_0.distcp"
    file.write_bytes(file.read_bytes()[:-10])
    checkpoint = open_checkpoint(folder)
    assert [ref.name for ref in checkpoint.tensors] == ["w0", "w1"]
    assert "incomplete" in checkpoint.skipped[0].reason


def test_training_state_is_told_apart(tmp_path):
    value = {
        "model": {"w": torch.ones(2, 2)},
        "optim": {"state": {"w": {"exp_avg": torch.zeros(2, 2)}}, "param_groups": [{"lr": 0.1}]},
    }
    for number, folder in enumerate(
        [
            saved(tmp_path / "a", value),
            sharded(
                tmp_path / "b",
                {
                    "w": ((2, 2), [((0, 0), W[:2])]),
                    "optim.state.w.exp_avg": ((4, 2), [((0, 0), W)]),
                },
            ),
        ]
    ):
        found = {ref.name: ref.part for ref in open_checkpoint(folder).tensors}
        assert found == {"w": "model", "optim.state.w.exp_avg": "optimizer"}, number


def test_a_key_names_an_entry(tmp_path):
    folder = saved(tmp_path / "a", {"a": {"x": W}, "b": {"y": W, "z": W}})
    assert [ref.name for ref in open_checkpoint(folder, "a").tensors] == ["x"]
    with pytest.raises(UsageError, match="a \\(1 tensor\\)"):
        open_checkpoint(folder, "c")


def test_one_file_alone_is_refused_with_the_way_to_go(tmp_path):
    folder = saved(tmp_path / "a", {"w": W})
    with pytest.raises(InputError) as caught:
        open_checkpoint(f"{folder}/__0_0.distcp")
    assert f"give its folder, {folder}" in caught.value.message
    shutil.copy(f"{folder}/__0_0.distcp", tmp_path / "__0_0.distcp")
    for path in (tmp_path / "__0_0.distcp", tmp_path):
        with pytest.raises(InputError) as caught:
            open_checkpoint(str(path))
        assert caught.value.exit_code == 3
        assert ".metadata" in caught.value.message


class Runs:
    def __reduce__(self):
        return eval, ("1/0",)


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b"", "truncated"),
        (b"junk", "truncated"),
        (pickle.dumps({"a": 1}), "malformed"),
        (pickle.dumps([1]), "malformed"),
        (pickle.dumps(Runs()), "unsafe"),
    ],
)
def test_metadata_that_is_none_is_refused(tmp_path, content, kind):
    folder = Path(saved(tmp_path / "a", {"w": W}))
    (folder / ".metadata").write_bytes(content)
    with pytest.raises(InputError) as caught:
        open_checkpoint(str(folder))
    assert caught.value.kind == kind


@pytest.mark.parametrize("place", ["../secret", "/etc/passwd", "a/../../b"])
def test_no_part_lies_outside_the_folder(tmp_path, place):
    folder = Path(sharded(tmp_path / "a", {"w": ((4, 2), [((0, 0), W)])}))
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    for info in metadata.storage_data.values():
        info.relative_path = place
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(InputError, match="outside the folder"):
        open_checkpoint(str(folder))
