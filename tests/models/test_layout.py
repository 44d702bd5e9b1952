"""How outputs lie over the image, by shapes of well known models and by moving single values."""

from __future__ import annotations

import pytest
import torch

from gradscope.models.layout import Layout, layout_of

SQUARE = (2, 3, 224, 224)


@pytest.mark.parametrize(
    ("shape", "images", "wanted"),
    [
        ((2, 512, 7, 7), SQUARE, Layout("maps", (7, 7))),
        ((2, 64, 224, 224), SQUARE, Layout("maps", (224, 224))),
        ((2, 7, 7, 768), SQUARE, Layout("channels-last", (7, 7))),
        ((2, 197, 768), SQUARE, Layout("tokens", (14, 14), 1)),
        ((2, 196, 768), SQUARE, Layout("tokens", (14, 14))),
        ((2, 198, 768), SQUARE, Layout("tokens", (14, 14), 2)),
        ((2, 201, 384), (2, 3, 224, 224), Layout("tokens", (14, 14), 5)),
        ((197, 2, 768), SQUARE, Layout("tokens-first", (14, 14), 1)),
        ((1, 29, 32), (1, 3, 32, 48), Layout("tokens", (4, 6), 5)),
        # A stride that does not divide the side: the last patch is padded, or left out.
        ((1, 16, 8), (1, 3, 31, 31), Layout("tokens", (4, 4))),
        ((1, 9, 8), (1, 3, 31, 31), Layout("tokens", (3, 3))),
        # Grids may be off the image's aspect by rounding and borders.
        ((2, 8, 10, 13), SQUARE, Layout("maps", (10, 13))),
        ((2, 8, 1, 2), SQUARE, Layout("maps", (1, 2))),
        ((2, 8, 7, 11), (2, 3, 224, 336), Layout("maps", (7, 11))),
        # Sixteen tokens without a position are registers, more are something else.
        ((2, 212, 8), SQUARE, Layout("tokens", (14, 14), 16)),
        ((2, 213, 8), SQUARE, None),
        # At most half of the tokens may be without a position.
        ((1, 8, 4), (1, 3, 4, 4), Layout("tokens", (2, 2), 4)),
        ((1, 7, 4), (1, 3, 4, 4), Layout("tokens", (2, 2), 3)),
        ((2, 1000), SQUARE, None),
        ((2, 9, 50, 9), SQUARE, None),
        ((2, 8, 1, 3), SQUARE, None),
        ((2, 1, 10, 15), SQUARE, None),
        ((2, 8, 225, 225), SQUARE, None),
        ((2, 8, 0, 0), SQUARE, None),
        ((3, 512, 7, 7), SQUARE, None),
        ((3, 197, 768), SQUARE, None),
        ((2, 512, 7, 7, 1), SQUARE, None),
    ],
)
def test_an_output_lies_over_the_image_by_its_shape(
    shape: tuple[int, ...], images: tuple[int, ...], wanted: Layout | None
) -> None:
    assert layout_of(shape, images) == wanted


@pytest.mark.parametrize(
    ("layout", "shape", "place"),
    [
        (Layout("maps", (2, 3)), (2, 5, 2, 3), (1, 4, 0, 2)),
        (Layout("channels-last", (2, 3)), (2, 2, 3, 5), (1, 0, 2, 4)),
        (Layout("tokens", (2, 3), 4), (2, 10, 5), (1, 4 + 2, 4)),
        (Layout("tokens-first", (2, 3), 4), (10, 2, 5), (4 + 2, 1, 4)),
    ],
)
def test_maps_have_each_value_at_its_position(
    layout: Layout, shape: tuple[int, ...], place: tuple[int, ...]
) -> None:
    """Of the second image, channel 4, first row, third column."""
    values = torch.zeros(shape)
    values[place] = 1

    maps = layout.maps(values)

    assert maps.shape == (2, 5, 2, 3)
    assert maps.nonzero().tolist() == [[1, 4, 0, 2]]
    assert shape[layout.channel_dim] == 5
    assert shape[layout.batch_dim] == 2


def test_a_layout_in_words() -> None:
    assert str(Layout("maps", (7, 9))) == "maps 7×9"
    assert str(Layout("channels-last", (7, 9))) == "maps 7×9, channels last"
    assert str(Layout("tokens", (7, 9))) == "tokens 7×9"
    assert str(Layout("tokens-first", (7, 9), 5)) == "tokens 7×9 + 5 without a position"
