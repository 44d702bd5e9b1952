"""Folders as people have them: all of a model is read, or what is not is said, with what to do."""

from __future__ import annotations

import io
import json
import os
import zipfile
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from gradscope.checkpoints import open_checkpoint
from gradscope.checkpoints.tensors import Checkpoint
from gradscope.errors import InputError, UsageError
from gradscope.weights.analysis import analyze_weights

torch = pytest.importorskip("torch")


def put(path: Path, *names: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: np.ones((2, 2), np.float32) for name in names or ("w",)}, path)


def put_torch(path: Path, *names: str, under: str | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {name: torch.ones(2, 2) for name in names or ("w",)}
    torch.save({under: state} if under else state, path)


def put_json(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def names(path: Path) -> list[str]:
    return [ref.name for ref in open_checkpoint(str(path)).tensors]


def files(path: Path) -> list[str]:
    return [os.path.relpath(ref.file, path) for ref in open_checkpoint(str(path)).tensors]


def says(checkpoint: Checkpoint, *words: str) -> bool:
    return all(word in " ".join(checkpoint.notes) for word in words)


def refused(path: Path | str, *words: str) -> InputError:
    with pytest.raises(InputError) as caught:
        open_checkpoint(str(path))
    assert all(word in caught.value.message for word in words), caught.value.message
    return caught.value


def exit_code(path: Path) -> int:
    return analyze_weights(path, headers_only=True).gate.exit_code


# The same model twice.


@pytest.mark.parametrize("stem", ["model", "diffusion_pytorch_model", "weights"])
@pytest.mark.parametrize("word", [".fp16", ".bf16", "_fp16", ".non_ema", "-float16"])
def test_a_plain_file_is_read_rather_than_its_variant(tmp_path: Path, stem: str, word: str) -> None:
    put(tmp_path / f"{stem}.safetensors")
    put(tmp_path / f"{stem}{word}.safetensors")
    assert files(tmp_path) == [f"{stem}.safetensors"]
    assert says(open_checkpoint(str(tmp_path)), f"'{stem}{word}.safetensors'")
    assert exit_code(tmp_path) == 0


def test_of_variants_alone_the_most_precise_is_read(tmp_path: Path) -> None:
    for word in ("fp16", "bf16", "int8"):
        put(tmp_path / f"model.{word}.safetensors")
    assert files(tmp_path) == ["model.bf16.safetensors"]
    put(tmp_path / "model.fp32.safetensors")
    assert files(tmp_path) == ["model.fp32.safetensors"]


def test_averaged_and_plain_weights_are_two_models(tmp_path: Path) -> None:
    put(tmp_path / "decoder.safetensors")
    put(tmp_path / "encoder.safetensors")
    with pytest.raises(UsageError, match="could mean"):
        open_checkpoint(str(tmp_path))


@pytest.mark.parametrize(
    "index", ["model.fp16.safetensors.index.json", "model.safetensors.index.fp16.json"]
)
def test_a_variant_in_shards_does_not_win_over_the_plain_file(tmp_path: Path, index: str) -> None:
    shard = "model.fp16-00001-of-00001.safetensors"
    put(tmp_path / shard, "half")
    put_json(tmp_path / index, {"metadata": {}, "weight_map": {"half": shard}})
    assert names(tmp_path) == ["half"]
    put(tmp_path / "model.safetensors", "whole")
    assert names(tmp_path) == ["whole"]


def test_a_state_dict_is_read_rather_than_the_module(tmp_path: Path) -> None:
    put_torch(tmp_path / "model.pt", "a")
    put_torch(tmp_path / "model_state_dict.pt", "b")
    assert names(tmp_path) == ["b"]
    assert says(open_checkpoint(str(tmp_path)), "not 'model.pt'")


# Parts of one model.


def test_metas_shards_hold_slices_of_the_same_tensors(tmp_path: Path) -> None:
    for number in (0, 1):
        put_torch(tmp_path / f"consolidated.0{number}.pth", "norm.weight")
    assert names(tmp_path) == ["consolidated.00.norm.weight", "consolidated.01.norm.weight"]
    assert exit_code(tmp_path) == 0
    os.rename(tmp_path / "consolidated.01.pth", tmp_path / "consolidated.02.pth")
    assert exit_code(tmp_path) == 3


def test_counted_shards_of_different_tensors_keep_their_names(tmp_path: Path) -> None:
    put(tmp_path / "weights.00.safetensors", "a")
    put(tmp_path / "weights.01.safetensors", "b")
    assert names(tmp_path) == ["a", "b"]


def test_each_ranks_file_is_read(tmp_path: Path) -> None:
    for rank in range(11):
        put_torch(tmp_path / f"model_world_size_11_rank_{rank}.pt")
    assert names(tmp_path) == [f"model_world_size_11_rank_{rank}.w" for rank in range(11)]


MODULES = [
    {"path": "", "type": "sentence_transformers.models.Transformer"},
    {"path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
    {"path": "2_Dense", "type": "sentence_transformers.models.Dense"},
]


@pytest.fixture
def sentences(tmp_path: Path) -> Path:
    put(tmp_path / "model.safetensors", "embeddings.weight")
    put_json(tmp_path / "1_Pooling/config.json", {})
    put(tmp_path / "2_Dense/model.safetensors", "linear.weight")
    put_json(tmp_path / "modules.json", MODULES)
    return tmp_path


def test_every_module_of_a_sentence_transformer_is_read(sentences: Path) -> None:
    assert names(sentences) == ["embeddings.weight", "2_Dense.linear.weight"]
    assert exit_code(sentences) == 0


@pytest.mark.parametrize("lost", ["2_Dense/model.safetensors", "model.safetensors"])
def test_a_module_without_its_weights_is_a_failure(sentences: Path, lost: str) -> None:
    (sentences / lost).unlink()
    assert exit_code(sentences) == 3
    assert len(names(sentences)) == 1


@pytest.mark.parametrize("place", ["../secret", "/etc", "a/../../b", "c:x"])
def test_a_document_cannot_send_the_reader_out_of_the_folder(sentences: Path, place: str) -> None:
    put(sentences.parent / "secret/model.safetensors", "secret")
    put_json(sentences / "modules.json", [*MODULES, {"path": place, "type": "x.Dense"}])
    assert "secret" not in " ".join(names(sentences))


@pytest.fixture
def pipeline(tmp_path: Path) -> Path:
    put(tmp_path / "unet/diffusion_pytorch_model.safetensors")
    put(tmp_path / "unet/diffusion_pytorch_model.fp16.safetensors")
    put(tmp_path / "text_encoder/model.safetensors")
    described = {
        "_class_name": "StableDiffusionPipeline",
        "text_encoder": ["transformers", "CLIPTextModel"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "scheduler": ["diffusers", "PNDMScheduler"],
        "safety_checker": [None, None],
        "requires_safety_checker": False,
    }
    put_json(tmp_path / "model_index.json", described)
    return tmp_path


def test_every_component_of_a_pipeline_is_read(pipeline: Path) -> None:
    assert names(pipeline) == ["text_encoder.w", "unet.w"]
    assert exit_code(pipeline) == 0
    assert says(open_checkpoint(str(pipeline)), "2 components", "fp16")


def test_a_component_without_weights_is_a_failure(pipeline: Path) -> None:
    (pipeline / "text_encoder/model.safetensors").unlink()
    report = analyze_weights(pipeline, headers_only=True)
    assert "'text_encoder'" in report.errors[0].message
    assert report.gate.exit_code == 3


@pytest.mark.parametrize(
    "extra", ["adapter_model.safetensors", "value_head.bin", "mm_projector.bin"]
)
def test_an_adapter_or_head_beside_a_model_is_read_with_it(tmp_path: Path, extra: str) -> None:
    put(tmp_path / "model.safetensors", "w")
    (put if extra.endswith("s") else put_torch)(tmp_path / extra, "added")
    assert names(tmp_path) == ["w", "added"]
    assert says(open_checkpoint(str(tmp_path)), extra)


# Training.


def test_the_optimizers_state_beside_a_model_is_named_with_the_way_to_read_it(
    tmp_path: Path,
) -> None:
    put(tmp_path / "model.safetensors")
    put_torch(tmp_path / "optimizer.pt")
    put_torch(tmp_path / "scheduler.pt")
    path = str(tmp_path / "optimizer.pt")
    assert names(tmp_path) == ["w"]
    assert says(open_checkpoint(str(tmp_path)), "'optimizer.pt'", f"`gradscope weights {path}`")
    assert exit_code(tmp_path) == 0
    (tmp_path / "model.safetensors").unlink()
    refused(tmp_path, "'optimizer.pt'", "is no model", f"`gradscope weights {path}`")


def test_a_run_of_checkpoints_names_the_newest(tmp_path: Path) -> None:
    for step in (500, 1000, 90):
        put(tmp_path / f"checkpoint-{step}/model.safetensors")
    refused(
        tmp_path,
        "'checkpoint-90', 'checkpoint-500', 'checkpoint-1000'",
        f"the newest: `gradscope weights {tmp_path / 'checkpoint-1000'}`",
    )


def test_checkpoints_far_below_are_found(tmp_path: Path) -> None:
    put_torch(tmp_path / "version_0/checkpoints/last.ckpt")
    refused(tmp_path, "'version_0/checkpoints'")


@pytest.mark.parametrize("newest", ["epoch=10-step=1000.ckpt", "last.ckpt"])
def test_of_several_steps_the_newest_is_named(tmp_path: Path, newest: str) -> None:
    for name in ("epoch=9-step=900.ckpt", newest):
        put_torch(tmp_path / name)
    with pytest.raises(UsageError, match=r"name one of them \(the newest: .*" + newest):
        open_checkpoint(str(tmp_path))


@pytest.mark.parametrize("given_as", ["run", "step"])
def test_deepspeeds_model_states_are_read_and_its_optimizers_named(
    tmp_path: Path, given_as: str
) -> None:
    step = tmp_path / "global_step500"
    put_torch(step / "mp_rank_00_model_states.pt", "a", under="module")
    put_torch(step / "zero_pp_rank_0_mp_rank_00_optim_states.pt", under="optimizer_state_dict")
    (tmp_path / "latest").write_text("global_step500")
    (tmp_path / "zero_to_fp32.py").write_text("")
    path = tmp_path if given_as == "run" else step
    assert names(path) == ["a"]
    assert says(open_checkpoint(str(path)), "python zero_to_fp32.py . pytorch_model.bin")


@pytest.mark.parametrize("given_as", ["run", "step"])
def test_what_zero_3_cut_over_ranks_is_refused_with_the_command_that_joins_it(
    tmp_path: Path, given_as: str
) -> None:
    step = tmp_path / "global_step500"
    for rank in (0, 1):
        put_torch(step / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt", under="module")
    (tmp_path / "latest").write_text("global_step500")
    path = tmp_path if given_as == "run" else step
    refused(path, "ZeRO-3", "2 ranks", "-m deepspeed.utils.zero_to_fp32 . pytorch_model.bin")


@pytest.mark.parametrize("tag", ["../secret", "none", ""])
def test_a_tag_that_names_no_step_is_not_followed(tmp_path: Path, tag: str) -> None:
    put(tmp_path.parent / "secret/model.safetensors")
    (tmp_path / "latest").write_text(tag)
    refused(tmp_path, "no checkpoint in the folder")


@pytest.mark.parametrize("given_as", ["run", "iteration"])
def test_every_rank_of_megatron_is_read(tmp_path: Path, given_as: str) -> None:
    step = tmp_path / "iter_0001000"
    for rank in (0, 1):
        put_torch(step / f"mp_rank_0{rank}/model_optim_rng.pt", under="model")
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("1000\n")
    path = tmp_path if given_as == "run" else step
    assert names(path) == ["mp_rank_00.w", "mp_rank_01.w"]
    assert exit_code(path) == 0
    (step / "mp_rank_01/model_optim_rng.pt").unlink()
    assert exit_code(path) == 3


def test_a_folder_of_fsdp_is_named_with_the_command(tmp_path: Path) -> None:
    inside = tmp_path / "pytorch_model_fsdp_0"
    inside.mkdir()
    (inside / "__0_0.distcp").write_bytes(b"x")
    (inside / ".metadata").write_bytes(b"x")
    put_torch(tmp_path / "scheduler.bin")
    refused(tmp_path, "'pytorch_model_fsdp_0'", str(inside))


def test_what_lies_beside_distributed_shards_is_not_the_model(tmp_path: Path) -> None:
    (tmp_path / "__0_0.distcp").write_bytes(b"x")
    put_torch(tmp_path / "common.pt")
    refused(tmp_path, "torch.distributed.checkpoint")


# Other frameworks, and caches.


def test_a_stable_baselines_model_is_named_with_its_policy(tmp_path: Path) -> None:
    policy = io.BytesIO()
    torch.save({"w": torch.ones(2)}, policy)
    with zipfile.ZipFile(tmp_path / "best_model.zip", "w") as archive:
        archive.writestr("data", "{}")
        archive.writestr("policy.pth", policy.getvalue())
    np.savez(tmp_path / "evaluations.npz", results=np.ones((3, 5)))
    place = str(tmp_path / "best_model")
    for path in (tmp_path, tmp_path / "best_model.zip"):
        refused(path, "Stable-Baselines3", f"`gradscope weights {place}/policy.pth`")


def test_a_log_of_evaluations_is_no_model(tmp_path: Path) -> None:
    np.savez(tmp_path / "evaluations.npz", results=np.ones((3, 5)))
    refused(tmp_path, "'evaluations.npz' is no model")


@pytest.mark.parametrize(
    ("files", "words"),
    [
        (["model.ckpt-9.data-00000-of-00001", "model.ckpt-9.index"], "TensorFlow"),
        (["_CHECKPOINT_METADATA"], "Orbax"),
        (["manifest.ocdbt"], "Orbax"),
    ],
)
def test_folders_of_other_frameworks_are_named(
    tmp_path: Path, files: list[str], words: str
) -> None:
    for name in files:
        (tmp_path / name).write_text("x")
    refused(tmp_path, words)


def test_a_hub_cache_reads_the_snapshot_that_main_names(tmp_path: Path) -> None:
    cache = tmp_path / "models--org--name"
    put(cache / "snapshots/abc/model.safetensors")
    assert names(cache) == ["w"]
    put(cache / "snapshots/def/model.safetensors", "other")
    with pytest.raises(UsageError, match="2 snapshots; name one of them"):
        open_checkpoint(str(cache))
    (cache / "refs").mkdir()
    (cache / "refs/main").write_text("def")
    assert names(cache) == ["other"]
    assert says(open_checkpoint(str(cache)), "refs/main")


def test_a_lock_and_an_unfinished_download_are_named(tmp_path: Path) -> None:
    put(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors.lock").write_bytes(b"")
    (tmp_path / "x.incomplete").write_bytes(b"abc")
    refused(tmp_path / "model.safetensors.lock", "a lock", str(tmp_path / "model.safetensors"))
    assert refused(tmp_path / "x.incomplete", "unfinished download").kind == "truncated"
