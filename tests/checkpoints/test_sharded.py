"""Checkpoints of several files: what an index promises is compared with what shards hold."""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from gradscope.checkpoints import open_checkpoint
from gradscope.checkpoints.tensors import Checkpoint, Problem
from gradscope.errors import GradscopeError, InputError, UsageError

INDEX = "model.safetensors.index.json"


def shard(number: int, total: int, prefix: str = "model") -> str:
    return f"{prefix}-{number:05d}-of-{total:05d}.safetensors"


A, B, C = (shard(number, 3) for number in (1, 2, 3))


def tensors(*names: str) -> dict[str, np.ndarray]:
    return {name: np.ones(4, np.float32) for name in names}


def write_index(folder: Path, weight_map: object, name: str = INDEX, **metadata: object) -> str:
    text = json.dumps({"metadata": metadata, "weight_map": weight_map})
    (folder / name).write_text(text)
    return str(folder / name)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A healthy checkpoint of three shards with two tensors each."""
    held = {A: ("a1", "a2"), B: ("b1", "b2"), C: ("c1", "c2")}
    for name, names in held.items():
        save_file(tensors(*names), tmp_path / name, metadata={"format": "pt"})
    weight_map = {tensor: name for name, names in held.items() for tensor in names}
    write_index(tmp_path, weight_map, total_size=96)
    return tmp_path


def edit_index(folder: Path, **weight_map: str | None) -> None:
    data = json.loads((folder / INDEX).read_text())
    data["weight_map"].update(weight_map)
    data["weight_map"] = {name: place for name, place in data["weight_map"].items() if place}
    (folder / INDEX).write_text(json.dumps(data))


def names(checkpoint: Checkpoint) -> list[str]:
    return [tensor.name for tensor in checkpoint.tensors]


def skipped(checkpoint: Checkpoint) -> list[str]:
    return [item.subject for item in checkpoint.skipped]


def only_problem(checkpoint: Checkpoint) -> Problem:
    (problem,) = checkpoint.problems
    return problem


def says(checkpoint: Checkpoint, words: str) -> bool:
    return any(words in note for note in checkpoint.notes)


# A healthy one.


@pytest.mark.parametrize("given_as", ["index", "folder"])
def test_a_healthy_index_gives_every_tensor_in_shard_order(model: Path, given_as: str) -> None:
    path = str(model / INDEX) if given_as == "index" else str(model)
    checkpoint = open_checkpoint(path)
    assert checkpoint.path == path
    assert checkpoint.format == "safetensors-sharded"
    assert names(checkpoint) == ["a1", "a2", "b1", "b2", "c1", "c2"]
    assert [Path(tensor.file).name for tensor in checkpoint.tensors] == [A, A, B, B, C, C]
    assert checkpoint.nbytes == sum((model / name).stat().st_size for name in (A, B, C))
    assert set(checkpoint.stamps) == {str(model / name) for name in (A, B, C, INDEX)}
    assert checkpoint.metadata == {"format": "pt", "index": {"total_size": 96}}
    assert (checkpoint.problems, checkpoint.skipped, checkpoint.failures) == ((), (), ())


def test_a_wrong_total_size_is_only_noted(model: Path) -> None:
    data = json.loads((model / INDEX).read_text())
    data["metadata"]["total_size"] = 100
    (model / INDEX).write_text(json.dumps(data))
    checkpoint = open_checkpoint(str(model))
    assert says(checkpoint, "total_size is 100 bytes; its tensors take 96")
    assert checkpoint.problems == ()


def test_config_json_is_kept_for_the_rules(model: Path) -> None:
    (model / "config.json").write_text('{"num_hidden_layers": 3}')
    for path in (model, model / INDEX):
        assert open_checkpoint(str(path)).metadata["config"] == {"num_hidden_layers": 3}


@pytest.mark.parametrize("text", ["{", "[]", "NaN", '"x"'])
def test_a_bad_config_json_is_noted(model: Path, text: str) -> None:
    (model / "config.json").write_text(text)
    checkpoint = open_checkpoint(str(model))
    assert "config" not in checkpoint.metadata
    assert says(checkpoint, "config.json was not used")


# Shards that are not there, or not whole.


def test_a_missing_shard_leaves_the_rest_to_be_analysed(model: Path) -> None:
    (model / B).unlink()
    checkpoint = open_checkpoint(str(model))
    assert names(checkpoint) == ["a1", "a2", "c1", "c2"]
    assert skipped(checkpoint) == ["b1", "b2"]
    problem = only_problem(checkpoint)
    assert (problem.kind, problem.subject) == ("missing-shard", B)
    assert problem.evidence == {"tensors": 2}
    assert "'b1', 'b2'" in problem.message
    (failure,) = checkpoint.failures
    assert failure.kind == "missing"
    assert f"1 of 3 shards cannot be opened: '{B}'" in failure.message


def test_all_shards_missing_is_one_failure(model: Path) -> None:
    for name in (A, B, C):
        (model / name).unlink()
    checkpoint = open_checkpoint(str(model))
    assert checkpoint.tensors == ()
    assert [problem.subject for problem in checkpoint.problems] == [A, B, C]
    assert len(checkpoint.failures) == 1


def test_a_truncated_shard_keeps_its_complete_tensors(model: Path) -> None:
    raw = (model / B).read_bytes()
    (model / B).write_bytes(raw[:-1])
    checkpoint = open_checkpoint(str(model))
    assert names(checkpoint) == ["a1", "a2", "b1", "c1", "c2"]
    assert skipped(checkpoint) == ["b2"]
    assert (only_problem(checkpoint).kind, only_problem(checkpoint).subject) == (
        "truncated-file",
        B,
    )
    (failure,) = checkpoint.failures
    assert failure.message.startswith(f"{B}: truncated: 1 byte of")


@pytest.mark.parametrize(
    ("content", "kind", "problems"),
    [
        (b"version https://git-lfs.github.com/spec/v1\nsize 9\n", "unsupported", []),
        (b"", "truncated", ["truncated-file"]),
        (b"\xff\0\0\0\0\0\0\0{", "truncated", ["truncated-file"]),
        (b"\x02\0\0\0\0\0\0\0{]", "malformed", []),
    ],
)
def test_an_unreadable_shard_is_a_failure_that_names_it(
    model: Path, content: bytes, kind: str, problems: list[str]
) -> None:
    (model / B).write_bytes(content)
    checkpoint = open_checkpoint(str(model))
    assert names(checkpoint) == ["a1", "a2", "c1", "c2"]
    assert skipped(checkpoint) == ["b1", "b2"]
    assert [problem.kind for problem in checkpoint.problems] == problems
    (failure,) = checkpoint.failures
    assert failure.kind == kind
    assert failure.message.startswith(f"{B}: ")


def test_an_index_is_not_a_shard(model: Path) -> None:
    write_index(model, {}, name=B)
    (failure,) = open_checkpoint(str(model)).failures
    assert failure.kind == "unsupported"


def test_a_folder_is_not_a_shard(model: Path) -> None:
    (model / B).unlink()
    (model / B).mkdir()
    (failure,) = open_checkpoint(str(model / INDEX)).failures
    assert failure.kind == "unsupported"
    assert "this is a folder" in failure.message


# Index and shards that say different things.


def test_tensors_that_a_shard_does_not_hold_are_one_problem(model: Path) -> None:
    edit_index(model, **{f"ghost{i}": B for i in range(50)})
    checkpoint = open_checkpoint(str(model))
    problem = only_problem(checkpoint)
    assert (problem.kind, problem.subject) == ("index-mismatch", B)
    assert problem.evidence == {"absent": 50, "elsewhere": 0, "unlisted": 0}
    assert "50 tensors" in problem.message
    assert "'ghost0', 'ghost1', 'ghost2' and 47 more" in problem.message
    assert len(checkpoint.skipped) == 50
    assert checkpoint.failures == ()


def test_a_tensor_in_another_shard_is_reported_where_the_index_places_it(model: Path) -> None:
    edit_index(model, a1=B)
    checkpoint = open_checkpoint(str(model))
    assert only_problem(checkpoint).subject == B
    assert only_problem(checkpoint).evidence == {"absent": 1, "elsewhere": 1, "unlisted": 0}
    assert "a1" in names(checkpoint)
    assert checkpoint.skipped == ()


def test_tensors_that_the_index_does_not_name_are_a_problem_of_their_shard(model: Path) -> None:
    edit_index(model, c1=None)
    checkpoint = open_checkpoint(str(model))
    assert only_problem(checkpoint).subject == C
    assert only_problem(checkpoint).evidence == {"absent": 0, "elsewhere": 0, "unlisted": 1}
    assert "c1" in names(checkpoint)


def test_a_tensor_in_two_shards_is_analysed_once_where_the_index_says(model: Path) -> None:
    save_file(tensors("c1", "c2", "a1"), model / C)
    checkpoint = open_checkpoint(str(model))
    assert names(checkpoint).count("a1") == 1
    assert Path(checkpoint.tensors[0].file).name == A
    problem = only_problem(checkpoint)
    assert (problem.kind, problem.subject) == ("duplicate-tensor-name", C)
    assert problem.evidence["tensors"] == 1
    assert skipped(checkpoint) == ["a1"]


def test_an_index_that_names_a_tensor_twice_is_a_mismatch(model: Path) -> None:
    text = (model / INDEX).read_text()
    (model / INDEX).write_text(text.replace('"weight_map": {', f'"weight_map": {{"c1": "{A}", '))
    checkpoint = open_checkpoint(str(model))
    assert (only_problem(checkpoint).kind, only_problem(checkpoint).subject) == (
        "index-mismatch",
        INDEX,
    )


def test_stale_shards_are_noted(model: Path) -> None:
    save_file(tensors("x"), model / "consolidated.safetensors")
    save_file(tensors("x"), model / "model.safetensors")
    (model / "optimizer.bin").write_bytes(b"x")
    checkpoint = open_checkpoint(str(model))
    assert says(checkpoint, "'consolidated.safetensors', 'model.safetensors'")
    (stale,) = [note for note in checkpoint.notes if "not named by it" in note]
    assert "optimizer.bin" not in stale
    assert len(checkpoint.tensors) == 6


def test_numbering_that_promises_more_shards_is_a_missing_shard(model: Path) -> None:
    (model / B).unlink()
    edit_index(model, b1=None, b2=None)
    problem = only_problem(open_checkpoint(str(model)))
    assert problem.kind == "missing-shard"
    assert problem.subject == "model-*-of-00003.safetensors"
    assert "1 of 3 shards are missing by their numbering: 00002" in problem.message


def test_numbering_may_start_at_zero(tmp_path: Path) -> None:
    for number in (0, 1):
        save_file(tensors(f"t{number}"), tmp_path / shard(number, 2))
    checkpoint = open_checkpoint(str(tmp_path))
    assert checkpoint.problems == ()


def test_totals_that_differ_are_a_missing_shard(tmp_path: Path) -> None:
    save_file(tensors("x"), tmp_path / shard(1, 2))
    save_file(tensors("y"), tmp_path / shard(2, 3))
    checkpoint = open_checkpoint(str(tmp_path))
    assert "contradict each other" in only_problem(checkpoint).message
    assert len(checkpoint.tensors) == 2


def test_a_promise_of_a_billion_shards_costs_nothing(tmp_path: Path) -> None:
    save_file(tensors("x"), tmp_path / "model-000000001-of-999999999.safetensors")
    save_file(tensors("y"), tmp_path / "model-000000002-of-999999999.safetensors")
    started = time.process_time()
    checkpoint = open_checkpoint(str(tmp_path))
    assert only_problem(checkpoint).evidence["missing"] == 999_999_997
    assert time.process_time() - started < 1


# Indexes that are refused.


@pytest.mark.parametrize(
    "place", ["../secret", "/etc/passwd", "sub/x.safetensors", "..", ".", "", "a\\b", "C:x", "a\0b"]
)
def test_a_shard_outside_the_folder_is_refused(tmp_path: Path, place: str) -> None:
    path = write_index(tmp_path, {"w": place})
    with pytest.raises(InputError, match="path traversal") as caught:
        open_checkpoint(path)
    assert caught.value.kind == "malformed"


@pytest.mark.parametrize(
    "text",
    ['{"weight_map": []}', '{"weight_map": {"a": 1}}', '{"weight_map": {"a": null}}',
     '["weight_map"]', '{"weight_map": {', '{"weight_map": NaN}',
     '{"weight_map": {"\\ud800": "x"}}'],
)  # fmt: skip
def test_a_malformed_index_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / INDEX).write_text(text)
    with pytest.raises(InputError) as caught:
        open_checkpoint(str(tmp_path / INDEX))
    assert caught.value.kind == "malformed"


@settings(
    max_examples=100,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    weight_map=st.dictionaries(
        st.sampled_from(["a1", "a2", "b1", "x", ""]) | st.text(max_size=4),
        st.sampled_from([A, B, C, "model.safetensors", "none"]) | st.text(max_size=300) | st.none(),
    ),
    total=st.none() | st.integers() | st.text(max_size=3),
)
def test_any_index_gets_an_answer(
    model: Path, weight_map: dict[str, str | None], total: object
) -> None:
    path = write_index(model, weight_map, total_size=total)
    try:
        checkpoint = open_checkpoint(path)
    except GradscopeError:
        return
    found = names(checkpoint)
    assert len(found) == len(set(found))
    assert set(weight_map) <= set(found) | set(skipped(checkpoint))


# Folders.


def test_a_folder_with_one_model_reads_it_with_its_config(tmp_path: Path) -> None:
    save_file(tensors("w"), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"hidden_size": 4}')
    (tmp_path / "training_args.bin").write_bytes(b"x")
    checkpoint = open_checkpoint(str(tmp_path))
    assert (checkpoint.path, checkpoint.format) == (str(tmp_path), "safetensors")
    assert checkpoint.metadata["config"] == {"hidden_size": 4}
    assert checkpoint.notes == ()
    assert open_checkpoint(str(tmp_path / "model.safetensors")).metadata == checkpoint.metadata


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "weights.safetensors"])
def test_the_only_checkpoint_of_a_folder_is_read(tmp_path: Path, name: str) -> None:
    save_file(tensors("w"), tmp_path / name)
    assert names(open_checkpoint(str(tmp_path))) == ["w"]


def test_safetensors_is_preferred_and_the_rest_is_noted(tmp_path: Path) -> None:
    save_file(tensors("w"), tmp_path / "model.safetensors")
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    (tmp_path / "pytorch_model.bin.index.json").write_text("{}")
    checkpoint = open_checkpoint(str(tmp_path))
    assert names(checkpoint) == ["w"]
    assert says(checkpoint, "model.safetensors was read; not 'pytorch_model.bin.index.json'")


def test_of_several_indexes_the_plain_one_is_read(model: Path) -> None:
    save_file(tensors("h"), model / shard(1, 1, "model.fp16"))
    write_index(model, {"h": shard(1, 1, "model.fp16")}, "model.fp16.safetensors.index.json")
    checkpoint = open_checkpoint(str(model))
    assert len(checkpoint.tensors) == 6
    assert says(checkpoint, f"{INDEX} was read; not 'model.fp16.safetensors.index.json'")


def test_numbered_shards_without_an_index_are_read_together(model: Path) -> None:
    (model / INDEX).unlink()
    checkpoint = open_checkpoint(str(model))
    assert names(checkpoint) == ["a1", "a2", "b1", "b2", "c1", "c2"]
    assert (checkpoint.problems, checkpoint.failures) == ((), ())
    assert says(checkpoint, "3 numbered shards were read without an index")


@pytest.mark.parametrize("left", [(A,), (A, C)])
def test_numbered_shards_with_a_gap_are_a_failure(model: Path, left: tuple[str, ...]) -> None:
    for name in {INDEX, A, B, C} - set(left):
        (model / name).unlink()
    checkpoint = open_checkpoint(str(model))
    assert only_problem(checkpoint).kind == "missing-shard"
    assert [failure.kind for failure in checkpoint.failures] == ["missing"]
    assert len(checkpoint.tensors) == 2 * len(left)


def test_unrelated_checkpoints_must_be_named(tmp_path: Path) -> None:
    for name in ("encoder.safetensors", "decoder.safetensors"):
        save_file(tensors("w"), tmp_path / name)
    with pytest.raises(UsageError, match=r"'decoder.safetensors', 'encoder.safetensors'"):
        open_checkpoint(str(tmp_path))


def test_a_folder_without_a_checkpoint_says_what_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"\*\.safetensors") as caught:
        open_checkpoint(str(tmp_path))
    assert caught.value.kind == "missing"


def test_a_folder_of_models_names_its_subfolders(tmp_path: Path) -> None:
    (tmp_path / "unet").mkdir()
    save_file(tensors("w"), tmp_path / "unet" / "model.safetensors")
    with pytest.raises(InputError, match="give one of its folders: 'unet'"):
        open_checkpoint(str(tmp_path))


def test_a_broken_link_is_a_missing_file(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").symlink_to(tmp_path / "gone")
    with pytest.raises(InputError) as caught:
        open_checkpoint(str(tmp_path))
    assert caught.value.kind == "missing"


# Other containers.


@pytest.mark.parametrize("prefix", ["", "module."])
def test_torch_shards_are_read_through_the_same_index(tmp_path: Path, prefix: str) -> None:
    torch = pytest.importorskip("torch")
    held = {"pytorch_model-00001-of-00002.bin": "a", "pytorch_model-00002-of-00002.bin": "b"}
    for file, name in held.items():
        torch.save({f"{prefix}{name}": torch.ones(2)}, tmp_path / file)
    weight_map = {f"{prefix}{name}": file for file, name in held.items()}
    write_index(tmp_path, weight_map, "pytorch_model.bin.index.json")
    checkpoint = open_checkpoint(str(tmp_path))
    assert checkpoint.format == "torch-sharded"
    assert names(checkpoint) == ["a", "b"]
    assert (checkpoint.problems, checkpoint.failures) == ((), ())


def test_tied_torch_weights_are_no_mismatch(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    shared = torch.ones(2)
    file = "pytorch_model-00001-of-00001.bin"
    torch.save({"embed": shared, "head": shared}, tmp_path / file)
    write_index(tmp_path, {"embed": file, "head": file}, "pytorch_model.bin.index.json")
    assert open_checkpoint(str(tmp_path)).problems == ()


def test_numpy_files_are_opened(tmp_path: Path) -> None:
    np.savez(tmp_path / "weights.npz", a=np.ones(3))
    assert names(open_checkpoint(str(tmp_path))) == ["a"]


def test_a_key_into_a_flat_container_is_a_usage_error(model: Path) -> None:
    with pytest.raises(UsageError, match="--key"):
        open_checkpoint(str(model / A), key="model")


# Readers of other packages.


class Entry:
    name = value = "toy"

    def __init__(self, answer: object) -> None:
        self.answer = answer

    def load(self) -> object:
        if isinstance(self.answer, Exception):
            raise self.answer
        return lambda _path: self.answer


@pytest.fixture
def ggml(tmp_path: Path) -> str:
    (tmp_path / "model.bin").write_bytes(b"tjgg\x03\0\0\0")
    return str(tmp_path / "model.bin")


def register(monkeypatch: pytest.MonkeyPatch, *answers: object) -> None:
    entries = [Entry(answer) for answer in answers]
    monkeypatch.setattr("gradscope.plugins.plugins", lambda _kind: entries)


def test_installed_readers_are_asked_before_a_format_is_refused(
    monkeypatch: pytest.MonkeyPatch, ggml: str
) -> None:
    checkpoint = Checkpoint(ggml, "ggml", 8, ())
    register(monkeypatch, None, checkpoint)
    assert open_checkpoint(ggml) is checkpoint


def test_the_refusal_stands_when_no_reader_takes_the_file(
    monkeypatch: pytest.MonkeyPatch, ggml: str
) -> None:
    register(monkeypatch, None)
    with pytest.raises(InputError, match="GGML"):
        open_checkpoint(ggml)


def test_a_reader_that_cannot_be_loaded_is_a_usage_error(
    monkeypatch: pytest.MonkeyPatch, ggml: str
) -> None:
    register(monkeypatch, ImportError("no module named ggml"))
    with pytest.raises(UsageError, match="no module named ggml"):
        open_checkpoint(ggml)
