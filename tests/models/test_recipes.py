"""The size that a model is built for, that it is asked to take, and that files say."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gradscope.errors import UsageError
from gradscope.models.forms import as_model
from gradscope.models.sizes import image_size
from gradscope.models.vision import Vision, open_vision


class Patches(nn.Module):
    """As timm embeds patches: of one size, unless it is dynamic."""

    def __init__(self, size: tuple[int, int], dynamic: bool) -> None:
        super().__init__()
        self.img_size = size
        self.dynamic = dynamic
        self.proj = nn.Conv2d(3, 4, 8, 8)

    def forward(self, x: Tensor) -> Tensor:
        assert self.dynamic or x.shape[2:] == self.img_size, "Input size does not match model"
        return self.proj(x)


class Vit(nn.Module):
    def __init__(self, height: int = 40, width: int = 40, *, says: int | None = None,
                 dynamic: bool = False) -> None:  # fmt: skip
        super().__init__()
        self.patch_embed = Patches((height, width), dynamic)
        self.grid = (height // 8, width // 8)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, 4))
        self.pos_embed = nn.Parameter(torch.randn(1, self.grid[0] * self.grid[1] + 1, 4))
        self.head = nn.Linear(4, 3)
        if says is not None:
            self.pretrained_cfg = {"input_size": (3, says, says), "mean": [0.5] * 3,
                                   "std": [0.5] * 3, "crop_pct": 0.5}  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x)
        places = self.pos_embed[:, 1:].transpose(1, 2).unflatten(2, self.grid)
        if self.patch_embed.dynamic:
            places = nn.functional.interpolate(places, x.shape[2:])
        x = (x + places).flatten(2).transpose(1, 2)
        cls = (self.cls_token + self.pos_embed[:, :1]).expand(len(x), -1, -1)
        return self.head(torch.cat([cls, x], 1).mean(1))


def cnn() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                         nn.Linear(4, 3))  # fmt: skip


def opened(net: Any, preprocess: str | None = None) -> Vision:
    return open_vision(net, preprocess=preprocess)


# --- what is written down -------------------------------------------------------------------------


@pytest.mark.parametrize("dynamic", [False, True])
def test_what_the_model_is_built_for_beats_a_configuration(dynamic: bool) -> None:
    """DINOv2 with registers, built for 224, whose configuration says 518."""
    found = opened(Vit(40, says=80, dynamic=dynamic))

    assert found.size == (3, 40, 40)
    assert (found.preprocessing.resize, found.preprocessing.mean) == (80, (0.5,) * 3)
    assert found.loaded.notes == (
        "timm's configuration says 80×80, the model is built for 40×40, which is used",
    )
    assert not opened(Vit(40, says=40)).loaded.notes


def test_a_vision_transformer_that_is_not_square_sees_the_whole_picture() -> None:
    found = opened(Vit(32, 16, says=224))

    assert found.size == (3, 32, 16)
    assert found.preprocessing.resize == (32, 16)
    _, auto = found.survey()
    assert auto is not None
    assert auto.layer.layout is not None
    assert auto.layer.layout.grid == (4, 2)


@pytest.mark.parametrize(("dynamic", "size", "which"), [(True, 80, "former"), (False, 40, "which")])
def test_a_processor_beside_the_weights_is_followed_where_the_model_can(
    tmp_path: Path, dynamic: bool, size: int, which: str
) -> None:
    keys = {"size": {"height": 80, "width": 80}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(keys))
    torch.save(Vit(40, dynamic=dynamic), tmp_path / "m.pt")

    found = open_vision(str(tmp_path / "m.pt"), trust=["pickle"])

    assert found.size == (3, size, size)
    assert any("preprocessor_config.json says 80×80, the model is built for 40×40" in note
               and which in note for note in found.loaded.notes)  # fmt: skip


# --- what is asked for ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("preprocess", "resize", "size"),
    [
        ("size=32", 32, (32, 32)),
        ("size=20x30", (20, 30), (20, 30)),
        ("size=32,crop_size=28", 32, (28, 28)),
        ("do_resize=false", 224, (224, 224)),
        ("imagenet", 256, (224, 224)),
        (None, 256, (224, 224)),
    ],
)
def test_a_size_is_honoured_where_the_model_leaves_it_free(
    preprocess: str | None, resize: Any, size: tuple[int, int]
) -> None:
    found = opened(cnn(), preprocess)

    assert found.size == (3, *size)
    assert found.preprocessing.resize == resize


@pytest.mark.parametrize(
    ("net", "preprocess", "resize", "size"),
    [
        # The shorter edge, of which the model sees the centre.
        (Vit(40), "size=48", 48, (40, 40)),
        (Vit(40), "size=200", 200, (40, 40)),
        (Vit(40), "size=40", 40, (40, 40)),
        (Vit(40, dynamic=True), "size=80x24", (80, 24), (80, 24)),
        (Vit(40, dynamic=True), "size=24", 24, (24, 24)),
    ],
)
def test_a_size_is_honoured_where_the_model_takes_it(
    net: Any, preprocess: str, resize: Any, size: tuple[int, int]
) -> None:
    found = opened(net, preprocess)

    assert (found.preprocessing.resize, found.size) == (resize, (3, *size))


@pytest.mark.parametrize(
    ("net", "preprocess", "said"),
    [
        (Vit(40), "size=32", r"takes 40×40, not 32×32 \(Input size does not match model\)"),
        (Vit(40), "size=80x80", "takes 40×40, not 80×80"),
        (Vit(32, 16), "size=16x32", "takes 32×16, not 16×32"),
        (nn.Sequential(nn.Flatten(), nn.Linear(3 * 28 * 28, 5)), "size=32", "takes 28×28, not 32"),
    ],
)
def test_a_size_that_the_model_refuses_is_told_with_the_one_it_takes(
    net: Any, preprocess: str, said: str
) -> None:
    with pytest.raises(UsageError, match=said):
        opened(net, preprocess)


def test_a_recipes_name_asks_for_no_size() -> None:
    found = opened(Vit(40), "imagenet")

    assert (found.size, found.preprocessing.resize) == ((3, 40, 40), 46)
    assert any("imagenet says 224×224, the model is built for 40×40" in note
               for note in found.loaded.notes)  # fmt: skip


def test_a_size_that_is_written_down_and_refused_gives_way_and_is_told() -> None:
    flat: Any = nn.Sequential(nn.Flatten(), nn.Linear(3 * 28 * 28, 5))
    flat.pretrained_cfg = Vit(says=32).pretrained_cfg

    found = opened(flat)

    assert found.size == (3, 28, 28)
    assert any("says 32×32, which the model refuses" in note for note in found.loaded.notes)


# --- where nothing says it ------------------------------------------------------------------------


def traced(net: nn.Module, *size: int) -> torch.jit.ScriptModule:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.trace(net.eval(), torch.zeros(1, 3, *size))


@pytest.mark.parametrize("side", [40, 56, 72])
def test_positions_tell_the_size_of_a_traced_transformer(side: int) -> None:
    assert image_size(as_model(traced(Vit(side, side), side, side))) == (3, side, side)


def test_positions_that_make_no_square_are_asked_about() -> None:
    net = traced(Vit(32, 16), 32, 16)

    with pytest.raises(UsageError, match=r"no square; it takes images of 32×16.*size=32x16"):
        opened(net)
    assert opened(net, "size=32x16").size == (3, 32, 16)


class Rearranged(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rearrange = nn.PixelUnshuffle(4)
        self.conv = nn.Conv2d(48, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.rearrange(x)).mean((2, 3))


@pytest.mark.parametrize("preprocess", [None, "size=32", "imagenet"])
def test_space_may_be_rearranged_into_channels_first(preprocess: str | None) -> None:
    assert opened(Rearranged(), preprocess).size[0] == 3


class Stemmed(nn.Module):
    """Visformer's kind: what is cut into patches is no image."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 2, 2)
        self.patch_embed1 = nn.Module()
        self.patch_embed1.img_size = (20, 20)  # type: ignore[assignment]
        self.patch_embed1.proj = nn.Conv2d(4, 4, 4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        assert x.shape[2] == 20, "not 20"
        return self.patch_embed1.proj(x).mean((2, 3))


def test_a_later_embedding_does_not_tell_the_size_of_images() -> None:
    net: Any = Stemmed()
    assert as_model(net).size == (3, None, None)
    net.img_size = 40
    assert opened(net).size == (3, 40, 40)


class Wordless(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        assert x.shape[2] == 96
        return x.mean((2, 3))


class Positions(nn.Module):
    """A four-dimensional parameter that is no convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.pos_embed = nn.Parameter(torch.randn(1, 16, 16, 3))

    def forward(self, x: Tensor) -> Tensor:
        return (x.mean((2, 3)) + self.pos_embed.mean((1, 2))) * 2


def test_models_that_say_nothing_are_tried_out() -> None:
    assert image_size(as_model(Wordless())) == (3, 96, 96)
    assert image_size(as_model(Positions())) == (3, 224, 224)
    hinted: Any = cnn()
    hinted.config = SimpleNamespace(image_size=44)
    assert image_size(as_model(hinted)) == (3, 44, 44)
