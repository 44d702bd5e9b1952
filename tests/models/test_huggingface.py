"""Models of transformers, as the library itself writes and reads them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from gradscope.errors import InputError, UsageError
from gradscope.models.load import load_model
from gradscope.models.probe import held, run
from gradscope.models.vision import open_vision

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

pytestmark = pytest.mark.filterwarnings("ignore")

TOWER = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32,
    "image_size": 32, "patch_size": 8,
}  # fmt: skip
CNN = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}


def saved(folder: Path, name: str, **settings: Any) -> Any:
    """A model of that class with random weights, and its folder written."""
    made = getattr(transformers, name)
    torch.manual_seed(0)
    net = made(made.config_class(**settings)).eval()
    net.save_pretrained(folder)
    return net


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        # Their names in files are not those of the modules.
        ("ViTForImageClassification", TOWER),
        ("BeitForImageClassification", TOWER),
        ("Dinov2ForImageClassification", TOWER),
        ("ResNetForImageClassification", CNN),
    ],
)
def test_auto_builds_what_the_configuration_names_and_answers_as_it_did(
    tmp_path: Path, name: str, settings: dict[str, Any]
) -> None:
    net = saved(tmp_path, name, **settings, num_labels=5)
    x = torch.randn(2, 3, 32, 32)
    wanted = net(x).logits

    for path in (tmp_path, tmp_path / "model.safetensors"):
        found = load_model(str(path), arch="transformers:AUTO")
        with held(found.model.module):
            torch.testing.assert_close(run(found.model, x).logits, wanted)
    assert type(found.model.module).__name__ == name
    assert not found.notes


def test_half_precision_that_the_configuration_asks_for_is_computed_in_float32(
    tmp_path: Path,
) -> None:
    made = transformers.ViTForImageClassification
    net = made(made.config_class(**TOWER)).half()
    net.save_pretrained(tmp_path)

    found = load_model(str(tmp_path), arch="transformers:AUTO")

    assert {p.dtype for p in found.model.module.parameters()} == {torch.float32}
    assert any("float16 weights are read as float32" in note for note in found.notes)


def test_of_pictures_and_texts_the_tower_of_the_pictures_is_taken(tmp_path: Path) -> None:
    text = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
            "intermediate_size": 16, "vocab_size": 50, "bos_token_id": 0,
            "eos_token_id": 1}  # fmt: skip
    saved(
        tmp_path,
        "CLIPModel",
        vision_config={**TOWER, "projection_dim": 8},
        text_config=text,
        projection_dim=8,
    )

    found = load_model(str(tmp_path), arch="transformers:AUTO")

    assert type(found.model.module).__name__ == "CLIPVisionModelWithProjection"
    assert any("part of CLIPModel that reads pictures" in note for note in found.notes)
    assert any("outside the model" in n and "text_model" in n for n in found.notes)


def test_what_does_not_fit_is_refused_rather_than_drawn_at_random(tmp_path: Path) -> None:
    saved(tmp_path / "a", "ViTForImageClassification", **TOWER, num_labels=5)
    path = str(tmp_path / "a")

    with pytest.raises(InputError, match=r"2 of another shape: classifier\.bias \(file \[5\]"):
        load_model(path, arch="transformers:ViTForImageClassification(num_labels=6)")
    with pytest.raises(InputError, match=r"missing from the file: vit\."):
        load_model(path, arch="transformers:ViTForImageClassification(num_hidden_layers=3)")
    with pytest.raises(UsageError, match="did you mean ViTForImageClassification"):
        load_model(path, arch="transformers:VitForImageClassification")
    with pytest.raises(UsageError, match=r"takes .*not pictures alone"):
        load_model(path, arch="transformers:BertForSequenceClassification")


def test_a_folder_without_what_auto_needs_says_so(tmp_path: Path) -> None:
    saved(tmp_path / "a", "ResNetForImageClassification", **CNN)
    bare = shutil.copytree(tmp_path / "a", tmp_path / "bare")
    (bare / "config.json").unlink()
    own = shutil.copytree(tmp_path / "a", tmp_path / "own")
    config = json.loads((own / "config.json").read_text())
    (own / "config.json").write_text(json.dumps({**config, "architectures": None}))
    coded = {"architectures": ["Mine"], "auto_map": {"AutoModel": "mine.Mine"}}
    (tmp_path / "coded").mkdir()
    shutil.copy(own / "model.safetensors", tmp_path / "coded")
    (tmp_path / "coded" / "config.json").write_text(json.dumps(config | coded))

    for name, said in (
        ("bare", "no config.json beside"),
        ("own", "no architectures; name the class"),
        ("coded", "code of its own"),
    ):
        with pytest.raises(UsageError, match=said):
            load_model(str(tmp_path / name), arch="transformers:AUTO")
    with pytest.raises(UsageError, match="transformers:AUTO, as its config"):
        load_model(str(tmp_path / "a"))


def test_a_processors_steps_are_read_from_either_of_its_files(tmp_path: Path) -> None:
    saved(tmp_path, "ViTForImageClassification", **TOWER)
    steps = {"image_mean": [0.5] * 3, "image_std": [0.25] * 3, "size": {"height": 32, "width": 32}}
    nested = {"image_processor": steps, "processor_class": "CLIPProcessor"}

    for name, content in (("preprocessor_config.json", steps), ("processor_config.json", nested)):
        (tmp_path / name).write_text(json.dumps(content))
        found = open_vision(str(tmp_path), arch="transformers:AUTO").preprocessing
        (tmp_path / name).unlink()
        assert (found.std, found.size, found.assumed) == ((0.25,) * 3, (32, 32), False)
