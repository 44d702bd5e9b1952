"""How a model sees a picture that is being made."""

from __future__ import annotations

import pytest
import torch

from gradscope.attribution.synthesis.views import Area, Stage, seen, smaller, stages, view

SHARP = Stage(1.0, (512, 512), (224, 224), (0.35, 0.57))


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def test_a_picture_of_512_is_made_at_128_256_and_512_for_a_model_of_224() -> None:
    found = stages((512, 512), (224, 224), smaller((224, 224)))

    assert [s.made for s in found] == [(128, 128), (256, 256), (512, 512)]
    assert [s.seen for s in found] == [(128, 128), (160, 160), (224, 224)]
    assert [s.until for s in found] == [0.55, 0.85, 1.0]


def test_a_model_of_one_size_sees_the_whole_first_then_parts() -> None:
    found = stages((512, 512), (224, 224), ())

    assert [s.seen for s in found] == [(224, 224)] * 3
    assert [s.made for s in found] == [(224, 224), (339, 339), (512, 512)]
    assert found[0].cover == (0.8, 1.2)
    assert found[2].cover == pytest.approx((0.35, 0.57), abs=0.01)


@pytest.mark.parametrize(
    ("picture", "model"),
    [((512, 512), (224, 224)), ((64, 64), (224, 224)), ((512, 384), (256, 192)), ((8, 8), (8, 8)),
     ((1, 1), (32, 32)), ((1000, 10), (300, 3))],
)  # fmt: skip
def test_views_are_about_as_sharp_as_the_picture_at_every_stage(picture: Area, model: Area) -> None:
    for stage in stages(picture, model, ()):
        assert all(1 <= side <= whole for side, whole in zip(stage.made, picture, strict=True))
        low, high = stage.cover
        assert 0 < low <= high <= 1.2
        if max(picture) >= max(model):
            # Pixels of the picture for each of the view.
            assert 0.75 < low * max(stage.made) / max(stage.seen) < 1.35
    assert stages(picture, model, ())[-1].made == picture


def test_smaller_views_keep_the_shape_and_the_stride_that_networks_ask_for() -> None:
    assert smaller((224, 224)) == ((128, 128), (160, 160))
    assert smaller((384, 384)) == ((224, 224), (288, 288))
    assert smaller((256, 192)) == ((160, 96), (192, 128))


def test_a_view_that_changes_nothing_shows_the_image() -> None:
    image = torch.rand(1, 3, 6, 5)

    same = seen(image, torch.tensor([[[1.0, 0, 0], [0, 1.0, 0]]]), (6, 5))

    torch.testing.assert_close(same, image)


def test_views_turn_scale_and_shift_within_their_bounds_and_differ() -> None:
    random = generator()
    scales, turns, shifts = [], [], []
    for _ in range(400):
        found = view(SHARP, random)[0]
        scale = float(torch.linalg.det(found[:, :2])) ** 0.5
        scales.append(scale)
        turns.append(float(torch.rad2deg(torch.atan2(found[1, 0], found[0, 0]))))
        shifts.append(float(found[:, 2].abs().max()) - (1 - scale))

    assert 0.35 <= min(scales) < 0.36
    assert 0.56 < max(scales) <= 0.5701
    assert -15.01 <= min(turns) < -14
    assert 14 < max(turns) <= 15.01
    assert 0.08 < max(shifts) <= 0.1001


def test_parts_of_a_sharp_picture_reach_all_of_it() -> None:
    image, random = torch.zeros(1, 1, 64, 64, requires_grad=True), generator()
    stage = Stage(1.0, (64, 64), (28, 28), (0.35, 0.57))

    total = sum(seen(image, view(stage, random), (28, 28)).sum() for _ in range(200))

    (touched,) = torch.autograd.grad(torch.as_tensor(total), image)
    assert int((touched > 0).sum()) == 64 * 64
