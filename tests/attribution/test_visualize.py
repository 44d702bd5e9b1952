"""``visualize``: pictures of a class or a channel, from Python."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from gradscope import visualize
from gradscope.attribution.result import VisualizeResult
from gradscope.errors import UsageError

STEPS = "image_mean=0.5/0.5/0.5,image_std=0.25/0.25/0.25"


class Net(nn.Module):
    """A small network that takes any size, and remembers what it was shown."""

    def __init__(self, channels: int = 3) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(
            nn.Conv2d(channels, 6, 5, padding=2), nn.BatchNorm2d(6), nn.ReLU()
        )
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.head(self.body(x).mean((2, 3)))
        return found


class Fixed(Net):
    """The same of one size."""

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[2:] != (64, 64):
            raise ValueError("64×64 only")
        return super().forward(x)


def picture(net: nn.Module, target: int | None = 1, **options: Any) -> VisualizeResult:
    options = {"preprocess": f"{STEPS},size=64x64", "steps": 12, "size": 96, **options}
    report = visualize(net, target, **options)
    assert report.result is not None
    return report.result


def written(result: VisualizeResult) -> np.ndarray[Any, Any]:
    assert result.image is not None
    with Image.open(result.image) as image:
        return np.asarray(image)


def test_pictures_have_512_pixels_or_the_size_asked_for(tmp_path: Path) -> None:
    usual = picture(Net(), size=None, steps=2, output=tmp_path)

    assert usual.size == (512, 512)
    assert usual.seen == (64, 64)
    assert written(usual).shape == (512, 512, 3)
    assert picture(Net(), size=80, steps=2).size == (80, 80)
    oblong = picture(Net(), size=None, steps=2, preprocess=f"{STEPS},size=64x128")
    assert oblong.size == (256, 512)


def test_a_model_that_sees_little_gets_a_picture_of_its_own_size() -> None:
    assert picture(Net(), size=None, steps=2, preprocess=f"{STEPS},size=16x16").size == (16, 16)


def test_a_model_that_takes_other_sizes_sees_less_first_and_that_is_said() -> None:
    assert any("saw 37×37 and 46×46" in note for note in picture(Net()).notes)
    assert not any("saw" in note for note in picture(Fixed()).notes)


def test_the_objective_rises_for_classes_and_channels() -> None:
    for result in (
        picture(Net(), 1, steps=64),
        picture(Net(), None, layer="body.0", channel=2, steps=64),
    ):
        assert result.objective[-1] > result.objective[0]
        assert len(result.objective) == 65


def test_the_best_of_several_starts_comes_first_and_all_are_written(tmp_path: Path) -> None:
    result = picture(Net(), starts=3, seed=5, output=tmp_path)

    finals = [result.objective[-1], *(other.objective[-1] for other in result.others)]
    assert finals == sorted(finals, reverse=True)
    assert sorted([result.start, *(other.start for other in result.others)]) == [5, 6, 7]
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == sorted(
        f"class-1{rank}.{kind}" for rank in ("", "-2", "-3") for kind in ("csv", "png")
    )
    assert result.similarity is not None
    assert 0 < result.similarity <= 1
    alone = picture(Net(), seed=result.start, output=tmp_path / "alone")
    assert np.array_equal(written(alone), written(result))
    assert alone.objective == result.objective
    assert alone.similarity is None


def test_pictures_that_are_asked_to_differ_do() -> None:
    usual = picture(Net(), starts=2, steps=48)
    diverse = picture(Net(), starts=2, steps=48, diversity=3)

    assert usual.similarity is not None
    assert diverse.similarity is not None
    assert diverse.similarity < usual.similarity


def test_a_maco_picture_comes_with_its_mask(tmp_path: Path) -> None:
    result = picture(Net(), prior="maco", output=tmp_path)

    assert result.prior == "maco"
    with Image.open(tmp_path / "class-1.alpha.png") as image:
        assert image.mode == "RGBA"
        masked = np.asarray(image)
    assert np.array_equal(masked[..., :3], written(result))
    assert masked[..., 3].max() == 255
    assert masked[..., 3].min() < 255


@pytest.mark.parametrize("channels", [1, 4])
@pytest.mark.parametrize("prior", ["fourier", "maco"])
def test_models_of_one_channel_and_of_four_get_pictures(
    channels: int, prior: str, tmp_path: Path
) -> None:
    each = "/".join(["0.5"] * channels)

    result = picture(
        Net(channels), prior=prior, output=tmp_path, steps=2,
        preprocess=f"image_mean={each},image_std={each},size=64x64",
    )  # fmt: skip

    assert written(result).shape[:2] == (96, 96)


def test_the_model_is_left_as_it_was() -> None:
    net = Net().train()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    random = torch.get_rng_state()

    picture(net, starts=2, diversity=1, prior="maco")

    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    assert all(module.training for module in net.modules())
    assert all(p.requires_grad and p.grad is None for p in net.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())
    assert torch.equal(torch.get_rng_state(), random)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prior": "dct"}, "there is no prior 'dct'; there are fourier, maco"),
        ({"starts": 0}, "starts have to be at least 1"),
        ({"steps": 0}, "steps and starts"),
        ({"size": 0}, "at least 1 pixel"),
        ({"diversity": -1, "starts": 2}, "has to be 0 or more"),
        ({"diversity": float("nan"), "starts": 2}, "has to be 0 or more"),
        ({"diversity": 1}, "nothing to differ from"),
        ({"target": "top1"}, "there is no ranking"),
        ({"layer": "body.0", "target": None, "channel": 6}, "channels 0 to 5"),
    ],
)
def test_what_cannot_be_meant_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        picture(Net(), **options)


def test_pictures_of_a_model_without_maps_have_nothing_to_be_compared_by() -> None:
    flat = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 4))
    small = {"preprocess": f"{STEPS},size=8x8", "size": None, "starts": 2}

    with pytest.raises(UsageError, match="no layer of this model has any"):
        picture(flat, diversity=1, **small)
    assert picture(flat, **small).similarity is None
