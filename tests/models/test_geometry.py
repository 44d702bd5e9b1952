"""Maps that find their way back to the picture."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradscope.models.images import Picture
from gradscope.models.preprocessing import IMAGENET, Preprocessing


def box(seen: np.ndarray) -> tuple[int, int, int, int]:
    """Top, left, bottom and right of what is seen."""
    rows, columns = np.flatnonzero(seen.any(1)), np.flatnonzero(seen.any(0))
    return rows[0], columns[0], rows[-1] + 1, columns[-1] + 1


@given(st.integers(8, 60), st.integers(8, 60), st.sampled_from([16, (12, 20), None]))
def test_a_maps_pixel_lies_in_the_picture_where_the_input_took_it(
    height: int, width: int, resize: Any
) -> None:
    """A ramp through resize, crop and back is the ramp."""
    down, across = np.mgrid[0:height, 0:width] / 60
    pixels = np.stack([down, across, down], 2).astype(np.float32)
    given = Picture("a", "PNG", "F", 1, "0", pixels)
    crop = None if resize is None else (10, 10)

    made = Preprocessing(resize, crop, (0.0,) * 3, (1.0,) * 3)(given)
    back = [made.geometry.to_picture(c.numpy().astype(np.float64)) for c in made.inputs[:2]]

    seen = ~np.isnan(back[0])
    top, left, bottom, right = box(seen)
    assert seen[top:bottom, left:right].all()
    # Away from borders, where filters see less, each pixel finds its own place.
    inner = np.zeros_like(seen)
    inner[top + 6 : bottom - 6, left + 6 : right - 6] = True
    inner[:6] = inner[-6:] = inner[:, :6] = inner[:, -6:] = False
    for wanted, found in zip((down, across), back, strict=True):
        assert np.abs(np.where(inner & seen, found - wanted, 0)).max() < 0.6 / 60


def test_geometry_of_a_smaller_picture_is_the_same_place() -> None:
    made = IMAGENET(Picture("a", "PNG", "RGB", 1, "0", np.zeros((300, 450, 3), np.uint8))).geometry

    half = made.of_size(150, 225)

    ramp = np.linspace(0, 1, 224)[:, None].repeat(224, 1)
    whole, small = made.to_picture(ramp), half.to_picture(ramp)
    # The centre of a large pixel lies between two small ones.
    edges = [edge / 2 for edge in box(~np.isnan(whole))]
    assert list(box(~np.isnan(small))) == pytest.approx(edges, abs=0.5)
    np.testing.assert_allclose(whole[100:102, 200].mean(), small[50, 100], atol=1e-9)
