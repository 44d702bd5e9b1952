"""A format is one row of a table, from which everything else follows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from gradscope import formats
from gradscope.checkpoints import Checkpoint, TensorRef, open_checkpoint
from gradscope.checkpoints.sniff import sniff
from gradscope.containers.beginning import Beginning
from gradscope.errors import InputError
from gradscope.formats import CHECKPOINT, FORMATS, Format, find, function, supported


def is_toy(file: Beginning) -> bool:
    return file.start.startswith(b"TOY!")


def read_toy(path: str) -> Checkpoint:
    return Checkpoint(path, "toy", 8, (TensorRef("w", "F32", (1,), path, 4),))


TOY = Format(
    name="toy",
    family="Toys",
    suffixes=(".toy",),
    kind="tensors",
    recognises=f"{__name__}:is_toy",
    reader=f"{__name__}:read_toy",
)


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "FORMATS", (*FORMATS, TOY))


def write(path: Path) -> str:
    path.write_bytes(b"TOY!" + np.float32(1).tobytes())
    return str(path)


@pytest.mark.parametrize("row", FORMATS, ids=lambda row: row.name)
def test_every_row_has_a_reader_and_a_recogniser(row: Format) -> None:
    assert callable(row.load())
    assert callable(function(row.recognises))
    assert row.model is None or callable(function(row.model))
    assert (row.model is not None) == (row.kind == "program")
    assert find(row.name) is row


def test_names_are_unique() -> None:
    assert len({row.name for row in FORMATS}) == len(FORMATS)


@pytest.mark.usefixtures("toy")
def test_families_are_listed_with_their_suffixes_once_and_in_the_order_of_the_table() -> None:
    listed = supported(*CHECKPOINT)

    assert listed.startswith("safetensors (.safetensors, .index.json), PyTorch (.pt2, .pt, ")
    assert listed.endswith("Toys (.toy)")
    assert listed.count(".pt,") == 1


@pytest.mark.usefixtures("toy")
def test_a_row_is_all_that_a_reader_needs(tmp_path: Path) -> None:
    path = write(tmp_path / "model.toy")
    assert sniff(path) == "toy"
    assert open_checkpoint(path).tensors[0].name == "w"
    assert open_checkpoint(str(tmp_path)).tensors[0].name == "w"
    assert "Toys (.toy)" in supported(*CHECKPOINT)


@pytest.mark.usefixtures("toy")
def test_shards_may_be_in_the_format_of_any_row(tmp_path: Path) -> None:
    for number in (1, 2):
        write(tmp_path / f"model-0000{number}-of-00002.toy")
    (tmp_path / "model.toy.index.json").write_text(
        '{"weight_map": {"w": "model-00001-of-00002.toy"}}'
    )
    assert open_checkpoint(str(tmp_path)).tensors[0].name == "w"


@pytest.mark.usefixtures("toy")
def test_a_refusal_lists_the_rows(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(bytes(range(200, 256)))
    with pytest.raises(InputError, match=r"gradscope reads .*Toys \(\.toy\)"):
        sniff(str(tmp_path / "x"))
