"""Layers that are not there, or not whole: told by each other and by ``config.json``.

Models are headers over zeros: names are all that is compared.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest

import gradscope

from .checkpoints import write, write_sharded

PARTS = ("norm1", "attn.q", "attn.k", "attn.v", "attn.o", "norm2", "mlp.up", "mlp.down")


def stack(name: str, numbers: Iterable[int], parts: Iterable[str] = PARTS) -> dict[str, np.ndarray]:
    listed = tuple(parts)
    return {
        f"{name}.{n}.{part}.weight": np.zeros((4, 4), np.float16)
        for n in numbers
        for part in listed
    }


def missing(tensors: dict[str, np.ndarray], folder: Path, **config: object) -> list[str]:
    folder.mkdir(exist_ok=True)
    write(folder / "model.safetensors", tensors)
    (folder / "config.json").write_text(json.dumps(config))
    report = gradscope.analyze_weights(folder, headers_only=True, select=["missing-layer"])
    return [f.subject for f in report.findings]


@pytest.mark.parametrize("lost", ["attn.q", "norm1", "mlp.down"])
def test_a_module_that_one_layer_alone_lacks_is_missing(lost: str, tmp_path: Path) -> None:
    tensors = stack("model.layers", range(6))
    assert missing(tensors, tmp_path) == []

    del tensors[f"model.layers.3.{lost}.weight"]
    assert missing(tensors, tmp_path) == [f"model.layers.3.{lost}"]


@pytest.mark.parametrize(
    ("layers", "lost"),
    [
        ((0,), ("attn.q",)),  # the first layer, and the last, may differ
        ((5,), ("attn.q",)),
        ((2, 3), ("attn.q",)),  # more than one: another kind of layer
        ((3,), ("attn.q", "attn.k", "attn.v", "attn.o")),  # a whole block
    ],
)
def test_layers_that_differ_on_purpose_lack_nothing(
    layers: tuple[int, ...], lost: tuple[str, ...], tmp_path: Path
) -> None:
    tensors = stack("model.layers", range(6))
    for name in [f"model.layers.{n}.{part}.weight" for n in layers for part in lost]:
        del tensors[name]
    assert missing(tensors, tmp_path) == []


def test_a_module_in_another_form_is_there(tmp_path: Path) -> None:
    tensors = stack("model.layers", range(6))
    name = "model.layers.3.attn.q"
    tensors[f"{name}.qweight"] = tensors.pop(f"{name}.weight").astype(np.int32)
    tensors[f"{name}.scales"] = np.ones((1, 4), np.float16)
    assert missing(tensors, tmp_path) == []


def test_what_a_shard_lacks_may_be_in_another(tmp_path: Path) -> None:
    tensors = stack("model.layers", range(6))
    del tensors["model.layers.3.attn.q.weight"]
    write_sharded(tmp_path, tensors)
    report = gradscope.analyze_weights(next(tmp_path.glob("*.safetensors")), headers_only=True)
    assert "missing-layer" not in {f.name for f in report.findings}


def test_between_layers_of_two_kinds_a_number_may_hold_nothing(tmp_path: Path) -> None:
    """EfficientFormer flattens maps into tokens there."""
    tensors = stack("stages.3.blocks", (0, 1), ("conv1", "conv2", "norm"))
    tensors |= stack("stages.3.blocks", range(3, 8))
    assert missing(tensors, tmp_path / "a") == []

    alike = stack("stages.3.blocks", (0, 1, 3, 4, 5, 6, 7))
    assert missing(alike, tmp_path / "b") == ["stages.3.blocks.2"]


#: Stack -> where a configuration promises how many layers it has.
PROMISES = {
    "model.layers": {"num_hidden_layers": 6},
    "backbone.layers": {"n_layer": 6},
    "encoder.block": {"num_layers": 6},
    "decoder.block": {"num_layers": 9, "num_decoder_layers": 6},
    "model.encoder.layers": {"encoder_layers": 6},
    "model.decoder.layers": {"decoder_layers": 6, "encoder_layers": 9},
    "bert.encoder.layer": {"num_hidden_layers": 6},
    "language_model.model.layers": {"text_config": {"num_hidden_layers": 6}},
    "model.language_model.layers": {"text_config": {"num_hidden_layers": 6}},
    "vision_tower.encoder.layers": {"vision_config": {"num_hidden_layers": 6}},
    "model.visual.blocks": {"vision_config": {"depth": 6}},
}


@pytest.mark.parametrize("name", PROMISES)
def test_a_stack_that_ends_early_is_told_wherever_its_length_is_promised(
    name: str, tmp_path: Path
) -> None:
    assert missing(stack(name, range(6)), tmp_path / "a", **PROMISES[name]) == []
    assert missing(stack(name, range(4)), tmp_path / "b", **PROMISES[name]) == [f"{name}.4"]


def test_of_two_stacks_in_one_part_neither_is_told(tmp_path: Path) -> None:
    tensors = stack("vision_model.transformer.layers", range(6))
    tensors |= stack("vision_model.global_transformer.layers", range(4))
    assert missing(tensors, tmp_path, vision_config={"num_hidden_layers": 6}) == []
