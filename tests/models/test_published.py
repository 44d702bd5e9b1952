"""Recipes of published weights: those that the file is, or a doubt."""

from __future__ import annotations

import sys
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from torch import nn

from gradscope.models.preprocessing import Preprocessing
from gradscope.models.published import of_module, of_timm, of_torchvision

OTHER = "0" * 64


def test_what_another_library_calls_its_configuration_is_let_be() -> None:
    for config in ({"mean": np.ones(3), "std": (1,), "input_size": (3, 8, 8)}, object(), 3,
                   {"mean": None, "std": None, "input_size": None}):  # fmt: skip
        assert of_module(SimpleNamespace(default_cfg=config)) is None
    good = {"mean": [0.5] * 3, "std": [0.5] * 3, "input_size": (3, 8, 8)}
    both = SimpleNamespace(pretrained_cfg={}, default_cfg=SimpleNamespace(**good))
    assert of_module(both) == Preprocessing(
        9, (8, 8), (0.5,) * 3, (0.5,) * 3, source="timm's configuration"
    )
    assert of_module(nn.Linear(1, 1)) is None


# --- torchvision ----------------------------------------------------------------------------------


class Weights(list):
    """An enumeration of weights, the last of which is the default."""

    def __init__(self, *resized: tuple[str, int]) -> None:
        super().__init__(self.entry(*one) for one in resized)
        self.DEFAULT = self[-1]

    @staticmethod
    def entry(name: str, edge: int) -> Any:
        steps = SimpleNamespace(
            mean=[0.1] * 3, std=[0.2] * 3, resize_size=[edge], crop_size=[224],
            interpolation=SimpleNamespace(value="bilinear"),
        )  # fmt: skip
        url = f"https://example.org/models/resnet50-{name.lower() * 4}.pth"
        return SimpleNamespace(name=name, url=url, transforms=lambda: steps)


def installed(monkeypatch: pytest.MonkeyPatch, **modules: Any) -> None:
    for name, content in modules.items():
        module = ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name.replace("_", "."), module)


@pytest.fixture
def torchvision(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    known = {"resnet50": Weights(("A1", 256), ("B2", 232)), "alexnet": Weights(("C3", 256)),
             "vgg16": Weights(("D4", 256), ("E5", 256))}  # fmt: skip
    installed(monkeypatch, torchvision={}, torchvision_models={"get_model_weights": known.get})
    return known


@pytest.mark.parametrize(
    ("name", "sha256", "edge", "told"),
    [
        ("resnet50-a1a1a1a1.pth", OTHER, 256, "A1"),
        ("resnet50-b2b2b2b2.pth", OTHER, 232, "B2"),
        ("my-resnet50-a1a1a1a1.safetensors", OTHER, 256, "A1"),
        # Renamed, its contents still are what the name would say.
        ("model.pth", "a1a1a1a1" + "7" * 56, 256, "A1"),
        ("model.pth", OTHER, 232, None),
    ],
)
def test_the_file_tells_which_weights_it_is(
    torchvision: dict[str, Any], name: str, sha256: str, edge: int, told: str | None
) -> None:
    found = of_torchvision("resnet50", name, sha256)

    assert found is not None
    assert (found.resize, found.crop, found.mean) == (edge, (224, 224), (0.1,) * 3)
    assert found.assumed is (told is None)
    assert found.source == f"torchvision's {told or 'B2'} for resnet50"


@pytest.mark.parametrize("name", ["alexnet", "vgg16"])
def test_where_all_weights_share_a_recipe_there_is_no_doubt(
    torchvision: dict[str, Any], name: str
) -> None:
    found = of_torchvision(name, "model.pth", OTHER)

    assert found is not None
    assert not found.assumed


def test_without_the_library_or_its_name_nothing_is_known(
    torchvision: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert of_torchvision("mine", "model.pth", OTHER) is None
    monkeypatch.setitem(sys.modules, "torchvision.models", None)
    assert of_torchvision("resnet50", "model.pth", OTHER) is None
    monkeypatch.setitem(sys.modules, "timm", None)
    assert of_timm("resnet50", "model.pth", OTHER) is None


def test_the_libraries_own_records_are_read() -> None:
    try:
        version("torchvision")
    except PackageNotFoundError:
        pytest.skip("torchvision is not installed (extra zoo)")

    first = of_torchvision("resnet50", "resnet50-0676ba61.pth", OTHER)
    second = of_torchvision("resnet50", "resnet50-11ad3fa6.pth", OTHER)

    assert first is not None
    assert second is not None
    assert (first.resize, second.resize) == (256, 232)
    assert not first.assumed
    assert not second.assumed


# --- timm -----------------------------------------------------------------------------------------


def config(tag: str, share: float) -> Any:
    keys = {"input_size": (3, 224, 224), "mean": (0.5,) * 3, "std": (0.5,) * 3, "crop_pct": share,
            "url": f"https://example.org/net_{tag}-{tag * 8}.pth"}  # fmt: skip
    return SimpleNamespace(tag=tag, to_dict=lambda: keys)


@pytest.mark.parametrize(
    ("model", "file", "resize", "assumed"),
    [
        ("net", "net.b.safetensors", 448, False),
        ("net", "net-bbbbbbbb.pth", 448, False),
        ("net.b", "model.safetensors", 448, False),
        ("net", "model.safetensors", 224, True),
    ],
)
def test_a_tag_in_the_name_or_the_file_tells_timms_weights(
    monkeypatch: pytest.MonkeyPatch, model: str, file: str, resize: int, assumed: bool
) -> None:
    known = {"net.a": config("a", 1.0), "net.b": config("b", 0.5), "net": config("a", 1.0)}
    installed(monkeypatch, timm={
        "list_pretrained": lambda _pattern: ["net.a", "net.b"],
        "models": SimpleNamespace(get_pretrained_cfg=known.get),
    })  # fmt: skip

    found = of_timm(model, file, OTHER)

    assert found is not None
    assert (found.resize, found.assumed) == (resize, assumed)
