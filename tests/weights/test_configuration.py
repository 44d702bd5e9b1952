"""``config.json`` against the tensors: a fault of each kind, and the healthy forms of many models.

Models are headers over zeros: shapes are all that is compared.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gradscope
from gradscope.report.model import Finding

from .checkpoints import Array, Codes, Tensor, lora, transformer, write, write_sharded

Config = dict[str, Any]
Shapes = dict[str, tuple[int, ...]]


def planted(folder: Path, tensors: Mapping[str, Tensor], config: Config) -> Path:
    folder.mkdir(exist_ok=True)
    write(folder / "model.safetensors", tensors)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def shaped(shapes: Shapes) -> dict[str, Array]:
    return {name: np.zeros(shape, np.float16) for name, shape in shapes.items()}


def mismatches(path: Path, **options: Any) -> list[Finding]:
    found = gradscope.analyze_weights(path, headers_only=True, **options).findings
    return [f for f in found if f.name == "config-mismatch"]


def keys(path: Path) -> list[object]:
    return [f.evidence["key"] for f in mismatches(path)]


#: What the transformer of the tests is.
LLAMA: Config = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 256,
    "hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 4, "head_dim": 8, "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}  # fmt: skip


def test_a_configuration_that_agrees_is_no_finding(tmp_path: Path) -> None:
    path = planted(tmp_path, transformer(), LLAMA)
    assert gradscope.analyze_weights(path).findings == ()


@pytest.mark.parametrize(
    ("change", "key", "promised", "found"),
    [
        ({"vocab_size": 300}, "vocab_size", 300, 256),
        ({"vocab_size": 257}, "vocab_size", 257, 256),
        ({"vocab_size": 100}, "vocab_size", 100, 256),
        ({"vocab_size": 255, "pad_vocab_size_multiple": 5}, "vocab_size", 255, 256),
        ({"hidden_size": 64}, "hidden_size", 64, 32),
        ({"intermediate_size": 100}, "intermediate_size", 100, 128),
        ({"num_attention_heads": 8}, "num_attention_heads × head_dim", 64, 32),
        ({"num_key_value_heads": 2}, "num_key_value_heads × head_dim", 16, 32),
        ({"num_hidden_layers": 3}, "num_hidden_layers", 3, 4),
    ],
)
def test_each_number_that_disagrees_is_one_medium_finding(
    change: Config, key: str, promised: int, found: int, tmp_path: Path
) -> None:
    (seen,) = mismatches(planted(tmp_path, transformer(), {**LLAMA, **change}))
    assert seen.severity == "medium"
    assert (seen.evidence["key"], seen.evidence["promised"], seen.evidence["found"]) == (
        key, promised, found,
    )  # fmt: skip


@pytest.mark.parametrize(
    "change",
    [
        {"vocab_size": 250},  # padded to 256
        {"vocab_size": 255, "pad_vocab_size_multiple": 8},
        {"vocab_size": 300, "decoder_vocab_size": 256},
        {"hidden_size": 64, "embedding_size": 32},
        {"hidden_size": 64, "word_embed_proj_dim": 32},
        {"intermediate_size": [128, 64]},
        {"intermediate_size": 64, "moe_intermediate_size": 128},
        {"num_key_value_heads": 2, "q_lora_rank": 8},
        {"num_attention_heads": 2},  # with a gate beside the queries
        {"num_hidden_layers": 3, "num_nextn_predict_layers": 1},
        {"vocab_size": None, "hidden_size": "big", "num_hidden_layers": True},
        {"torch_dtype": "bfloat16"},
    ],
)
def test_what_models_do_on_purpose_is_no_finding(change: Config, tmp_path: Path) -> None:
    config = {**LLAMA, "num_key_value_heads": None, **change}
    assert keys(planted(tmp_path, transformer(), config)) == []


def test_half_of_a_promised_width_is_no_promise_kept_by_a_model_that_writes(tmp_path: Path) -> None:
    """Detectors count what a gate is beside twice; language models never do."""
    wide = {**LLAMA, "intermediate_size": 256}
    assert keys(planted(tmp_path / "a", transformer(), wide)) == ["intermediate_size"]
    detector = {**wide, "architectures": ["DeimForObjectDetection"]}
    assert keys(planted(tmp_path / "b", transformer(), detector)) == []


SPEECH: Shapes = {
    "model.encoder.conv1.weight": (32, 80, 3),
    "model.encoder.embed_positions.weight": (100, 32),
    "model.decoder.embed_positions.weight": (56, 32),
    "bert.embeddings.token_type_embeddings.weight": (2, 32),
}


@pytest.mark.parametrize(
    ("key", "told", "wrong"),
    [
        ("num_mel_bins", 80, 128),
        ("max_source_positions", 100, 1500),
        ("max_target_positions", 54, 448),
        ("type_vocab_size", 2, 4),
    ],
)
def test_lengths_of_speech_models_and_of_token_types(
    key: str, told: int, wrong: int, tmp_path: Path
) -> None:
    assert keys(planted(tmp_path / "a", shaped(SPEECH), {key: told})) == []
    assert keys(planted(tmp_path / "b", shaped(SPEECH), {key: wrong})) == [key]


TOWER: Shapes = {
    "vision_tower.layers.0.layer_norm1.weight": (48,),
    "vision_tower.layers.0.mlp.fc1.weight": (96, 48),
    "vision_tower.projector.mlp.fc1.weight": (64, 48),
    "language_model.model.layers.0.mlp.gate_proj.weight": (128, 32),
}


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({}, None),
        ({"hidden_size": 64}, "vision_config.hidden_size"),
        ({"intermediate_size": 192}, "vision_config.intermediate_size"),
    ],
)
def test_the_vision_part_has_widths_of_its_own(
    change: Config, key: str | None, tmp_path: Path
) -> None:
    said = {"hidden_size": 48, "intermediate_size": 96, "architectures": ["ForCausalLM"], **change}
    path = planted(tmp_path, shaped(TOWER), {"vision_config": said})
    assert keys(path) == ([key] if key else [])


def test_a_length_that_follows_from_the_width_is_compared_where_queries_prove_it(
    tmp_path: Path,
) -> None:
    derived = {**LLAMA, "head_dim": None, "num_key_value_heads": 2}
    assert keys(planted(tmp_path, transformer(), derived)) == ["num_key_value_heads × head_dim"]
    wide = transformer()
    for layer in range(4):
        wide[f"model.layers.{layer}.self_attn.q_proj.weight"] = np.ones((64, 32), np.float32)
    assert keys(planted(tmp_path, wide, derived)) == []  # Gemma's heads are longer than that


# -- the output layer -----------------------------------------------------------------------------


def headless(**others: Tensor) -> dict[str, Tensor]:
    made: dict[str, Tensor] = dict(transformer())
    del made["lm_head.weight"]
    return {**made, **{name.replace("__", "."): t for name, t in others.items()}}


HALF = np.ones((256, 32), np.float16)


@pytest.mark.parametrize(
    "config",
    [
        {"tie_word_embeddings": False},
        {"tie_word_embeddings": False, "architectures": ["GPT2LMHeadModel"]},
        {"tie_word_embeddings": False, "architectures": ["Qwen3VLForConditionalGeneration"]},
        {"architectures": ["XForCausalLM"], "text_config": {"tie_word_embeddings": False}},
    ],
)
def test_a_head_that_is_promised_and_absent_is_medium(config: Config, tmp_path: Path) -> None:
    (found,) = mismatches(planted(tmp_path, headless(), config))
    assert (found.severity, found.evidence["key"]) == ("medium", "tie_word_embeddings")


@pytest.mark.parametrize(
    ("config", "tensors"),
    [
        ({"tie_word_embeddings": True}, headless()),
        ({}, headless()),
        ({"tie_word_embeddings": True}, transformer()),
        ({"tie_word_embeddings": False, "text_config": {"tie_word_embeddings": True}}, headless()),
        ({"tie_word_embeddings": False, "architectures": ["LlamaModel"]}, headless()),
        ({"tie_word_embeddings": False, "architectures": ["LlamaForSequenceClassification"]},
         headless(score__weight=np.ones((2, 32), np.float16))),
        ({"tie_word_embeddings": False}, headless(embed_out__weight=HALF)),
        ({"tie_word_embeddings": False}, headless(output__weight=HALF)),
        ({"tie_word_embeddings": False}, headless(transformer__final__weight=HALF)),
        ({"tie_word_embeddings": False}, headless(transformer__final__kernel=HALF.T.copy())),
        ({"tie_word_embeddings": False}, headless(lm_head__qweight=np.ones((4, 256), np.int32))),
        ({"tie_word_embeddings": False, "is_encoder_decoder": True}, headless()),
        ({"tie_word_embeddings": False}, lora()),
        ({"tie_word_embeddings": False}, {"a.weight": HALF}),
    ],
)  # fmt: skip
def test_a_head_that_is_tied_elsewhere_or_not_needed_is_not_missing(
    config: Config, tensors: dict[str, Tensor], tmp_path: Path
) -> None:
    assert keys(planted(tmp_path, tensors, config)) == []


def test_a_head_in_another_shard_or_left_out_is_not_missing(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    folder = write_sharded(tmp_path, transformer())
    assert keys(folder) == []
    assert keys(folder / "model-00001-of-00003.safetensors") == []
    (folder / "model-00003-of-00003.safetensors").unlink()
    assert keys(folder) == []
    path = planted(tmp_path / "whole", transformer(), LLAMA)
    assert mismatches(path, exclude=["lm_head*"]) == []


# -- experts, positions, parts --------------------------------------------------------------------


def moe(experts: int, layers: int = 2, stacked: bool = False) -> dict[str, Array]:
    shapes: Shapes = {"model.embed_tokens.weight": (256, 32), "lm_head.weight": (256, 32)}
    for layer in range(layers):
        start = f"model.layers.{layer}.mlp"
        if stacked:
            shapes[f"{start}.experts.gate_up_proj"] = (experts, 32, 64)
        for n in range(0 if stacked else experts):
            shapes[f"{start}.experts.{n}.up_proj.weight"] = (16, 32)
    return shaped(shapes)


@pytest.mark.parametrize("key", ["num_local_experts", "n_routed_experts", "num_experts"])
@pytest.mark.parametrize("stacked", [True, False])
@pytest.mark.parametrize(("promised", "fires"), [(8, False), (16, True), (4, True)])
def test_the_number_of_experts(
    key: str, stacked: bool, promised: int, fires: bool, tmp_path: Path
) -> None:
    path = planted(tmp_path, moe(8, stacked=stacked), {**LLAMA, key: promised})
    found = [f for f in mismatches(path) if f.evidence["key"] == "experts"]
    assert [(f.evidence["promised"], f.evidence["found"]) for f in found] == (
        [(promised, 8)] if fires else []
    )


def test_one_expert_missing_in_one_layer(tmp_path: Path) -> None:
    tensors = moe(8)
    del tensors["model.layers.1.mlp.experts.5.up_proj.weight"]
    (found,) = mismatches(planted(tmp_path, tensors, {"num_local_experts": 8}))
    assert found.subject == "model.layers.1.mlp.experts"


def test_experts_that_compute_nothing_count_with_the_others(tmp_path: Path) -> None:
    config = {"n_routed_experts": 8, "zero_expert_num": 4}
    assert keys(planted(tmp_path, moe(12, stacked=True), config)) == []


def test_a_dense_model_whose_configuration_has_experts_is_no_finding(tmp_path: Path) -> None:
    assert keys(planted(tmp_path, transformer(), {**LLAMA, "num_experts": 8})) == []


@pytest.mark.parametrize(
    ("name", "rows", "config", "fires"),
    [
        ("embeddings.position_embeddings.weight", 512, {"max_position_embeddings": 512}, False),
        ("embeddings.position_embeddings.weight", 500, {"max_position_embeddings": 512}, True),
        ("roberta.embeddings.position_embeddings.weight", 514, {"max_position_embeddings": 514},
         False),
        ("model.decoder.embed_positions.weight", 514, {"max_position_embeddings": 512}, False),
        ("wpe.weight", 1024, {"n_positions": 1024}, False),
        ("wpe.weight", 1024, {"n_positions": 2048, "n_ctx": 2048}, True),
        ("model.encoder.embed_positions.weight", 1500,
         {"max_position_embeddings": 448, "max_source_positions": 1500}, False),
    ],
)  # fmt: skip
def test_the_number_of_positions(
    name: str, rows: int, config: Config, fires: bool, tmp_path: Path
) -> None:
    path = planted(tmp_path, shaped({name: (rows, 16)}), config)
    assert keys(path) == (["max_position_embeddings"] if fires else [])


COMPOSED: Config = {
    "architectures": ["LlavaForConditionalGeneration"],
    "text_config": {"vocab_size": 256, "hidden_size": 32, "intermediate_size": 128},
    "vision_config": {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2},
}


def composed(vocabulary: int = 256) -> dict[str, Array]:
    return shaped(
        {
            "vision_tower.layers.0.mlp.fc1.weight": (96, 48),
            "vision_tower.position_embedding.weight": (50, 48),
            "language_model.model.embed_tokens.weight": (vocabulary, 32),
            "language_model.model.layers.0.mlp.up_proj.weight": (128, 32),
        }
    )


def test_a_composed_models_language_part_has_a_configuration_of_its_own(tmp_path: Path) -> None:
    assert keys(planted(tmp_path, composed(), COMPOSED)) == []
    assert keys(planted(tmp_path, composed(200), COMPOSED)) == ["vocab_size"]
    assert keys(planted(tmp_path, composed(264), COMPOSED)) == []  # Mllama's own tokens


def test_packed_tables_are_not_compared(tmp_path: Path) -> None:
    packed = {"model.embed_tokens.weight": np.zeros((100, 4), np.uint32)}
    assert keys(planted(tmp_path, packed, LLAMA)) == []
    half = {"model.embed_tokens.weight": Codes("F8_E4M3", np.zeros((100, 32), np.uint8))}
    assert keys(planted(tmp_path, half, {**LLAMA, "tie_word_embeddings": None})) == ["vocab_size"]


#: Released models, by the tensors that are compared.
RELEASED: dict[str, tuple[Config, Shapes]] = {
    "gpt2": (
        {"n_embd": 768, "n_head": 12, "n_layer": 12, "n_positions": 1024, "vocab_size": 50257},
        {"wte.weight": (50257, 768), "wpe.weight": (1024, 768), "h.0.ln_1.weight": (768,),
         "h.0.attn.c_attn.weight": (768, 2304), "h.0.mlp.c_fc.weight": (768, 3072)},
    ),
    "bert": (
        {"hidden_size": 768, "intermediate_size": 3072, "max_position_embeddings": 512,
         "num_attention_heads": 12, "vocab_size": 30522},
        {"bert.embeddings.word_embeddings.weight": (30522, 768),
         "bert.embeddings.position_embeddings.weight": (512, 768),
         "bert.encoder.layer.0.intermediate.dense.weight": (3072, 768)},
    ),
    "albert": (
        {"embedding_size": 128, "hidden_size": 768, "intermediate_size": 3072, "vocab_size": 30000},
        {"albert.embeddings.word_embeddings.weight": (30000, 128)},
    ),
    "opt": (
        {"hidden_size": 1024, "word_embed_proj_dim": 512, "ffn_dim": 4096, "vocab_size": 50272,
         "max_position_embeddings": 2048, "num_attention_heads": 16},
        {"model.decoder.embed_tokens.weight": (50272, 512),
         "model.decoder.embed_positions.weight": (2050, 1024),
         "model.decoder.layers.0.self_attn.q_proj.weight": (1024, 1024),
         "model.decoder.layers.0.fc1.weight": (4096, 1024)},
    ),
    "t5": (
        {"d_model": 512, "d_kv": 64, "d_ff": 2048, "num_heads": 8, "num_layers": 6,
         "is_encoder_decoder": True, "vocab_size": 32128, "tie_word_embeddings": False,
         "architectures": ["T5ForConditionalGeneration"]},
        {"shared.weight": (32128, 512), "lm_head.weight": (32128, 512),
         "encoder.block.0.layer.1.DenseReluDense.wi.weight": (2048, 512),
         "decoder.block.0.layer.0.SelfAttention.q.weight": (512, 512)},
    ),
    "llama 3": (
        {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32,
         "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": False},
        {"model.embed_tokens.weight": (128256, 4096), "lm_head.weight": (128256, 4096),
         "model.layers.0.self_attn.q_proj.weight": (4096, 4096),
         "model.layers.0.self_attn.k_proj.weight": (1024, 4096),
         "model.layers.0.mlp.up_proj.weight": (14336, 4096)},
    ),
    "gemma": (
        {"head_dim": 256, "hidden_size": 3072, "intermediate_size": 24576,
         "num_attention_heads": 16, "num_key_value_heads": 16, "vocab_size": 256000},
        {"model.embed_tokens.weight": (256000, 3072),
         "model.layers.0.self_attn.q_proj.weight": (4096, 3072),
         "model.layers.0.self_attn.k_proj.weight": (4096, 3072)},
    ),
    "mamba": (
        {"hidden_size": 768, "vocab_size": 50277, "pad_vocab_size_multiple": 8, "n_layer": 24},
        {"backbone.embeddings.weight": (50280, 768)},
    ),
    "deepseek v2": (
        {"hidden_size": 2048, "intermediate_size": 10944, "moe_intermediate_size": 1408,
         "n_routed_experts": 2, "num_attention_heads": 16, "num_key_value_heads": 16,
         "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "vocab_size": 102400},
        {"model.embed_tokens.weight": (102400, 2048),
         "model.layers.0.mlp.gate_proj.weight": (10944, 2048),
         "model.layers.0.self_attn.q_proj.weight": (3072, 2048),
         "model.layers.1.mlp.experts.0.gate_proj.weight": (1408, 2048),
         "model.layers.1.mlp.experts.1.gate_proj.weight": (1408, 2048)},
    ),
    "phi-3": (
        {"hidden_size": 3072, "intermediate_size": 8192, "num_attention_heads": 32,
         "num_key_value_heads": 32, "vocab_size": 32064, "tie_word_embeddings": False},
        {"model.embed_tokens.weight": (32064, 3072), "lm_head.weight": (32064, 3072),
         "model.layers.0.self_attn.qkv_proj.weight": (9216, 3072),
         "model.layers.0.mlp.gate_up_proj.weight": (16384, 3072)},
    ),
    "bert, padded": (
        {"hidden_size": 768, "vocab_size": 30522},
        {"embeddings.word_embeddings.weight": (30528, 768)},
    ),
}  # fmt: skip


@pytest.mark.parametrize("model", RELEASED)
def test_a_released_model_agrees_with_its_configuration(model: str, tmp_path: Path) -> None:
    config, shapes = RELEASED[model]
    sparse(tmp_path / "model.safetensors", shapes)
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert keys(tmp_path) == []


def sparse(path: Path, shapes: Shapes) -> None:
    """A file whose data is a hole: full sizes cost nothing."""
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    described = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(described).to_bytes(8, "little") + described)
        file.truncate(8 + len(described) + end)


# -- adapters -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "wrong"),
    [
        ({"r": 8}, 0),
        ({"r": 16}, 4),
        ({"r": 16, "peft_type": "LORA", "rank_pattern": {"q_proj": 8}}, 0),
        ({"r": 8, "rank_pattern": {"layers.1.q_proj": 4}}, 1),
        ({"r": 16, "rank_pattern": {r"layers\.[0-3]\.q_proj": 8}}, 0),  # not run, not judged
        ({"r": 12, "peft_type": "ADALORA"}, 0),
        ({"r": 16, "target_parameters": ["experts.w1"]}, 0),
        ({"r": None}, 0),
    ],
)
def test_the_rank_of_an_adapter(config: Config, wrong: int, tmp_path: Path) -> None:
    write(tmp_path / "adapter_model.safetensors", lora())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": 3}))
    assert [f.evidence["modules"] for f in mismatches(tmp_path)] == ([wrong] if wrong else [])
