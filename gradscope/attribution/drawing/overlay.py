"""Heatmaps, and heatmaps over the picture that was explained."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from gradscope.attribution.drawing.colour import Floats, Pixels, coloured, default
from gradscope.errors import UsageError

Mask = npt.NDArray[np.bool_]

#: Share of the picture's light that is left where the model did not look.
_DIMMED = 0.45


def normalised(values: Floats, sign: str, clip: float = 0.995) -> Floats:
    """A map [H, W] for display, between the ends of its ``bounds``.

    0..1, and -1..1 where both signs mean something, so that zero stays zero. NaN stays; a map with
    nothing to show is all zeros; no epsilon is added to what divides.
    """
    low, high = bounds(values, sign, clip)
    shown = values.astype(np.float64)
    if not high > low:
        return np.where(np.isnan(shown), shown, 0.0)
    if sign == "signed":
        return np.clip(shown / high, -1, 1)
    return np.clip((shown - low) / (high - low), 0, 1)


def bounds(values: Floats, sign: str, clip: float = 0.995) -> tuple[float, float]:
    """The values at the ends of a map's colours; below zero there is nothing to see unless signed.

    The upper one is the ``clip`` quantile of what is not zero, so that one pixel does not darken
    all others.
    """
    known = values[np.isfinite(values)].astype(np.float64)
    size = np.abs(known) if sign == "signed" else known.clip(0)
    if not (size > 0).any():
        return 0.0, 0.0
    high = float(np.quantile(size[size > 0], clip))
    return (-high, high) if sign == "signed" else (float(size.min()), high)


def top_mass(values: Floats, share: float) -> Mask:
    """The smallest set of the greatest values that holds ``share`` of their positive sum.

    Values equal to the least of them are all in it.
    """
    mass = np.nan_to_num(values.astype(np.float64), nan=0.0).clip(0)
    ordered = np.sort(mass, axis=None)[::-1]
    total = ordered.sum()
    if not total > 0:
        return np.zeros(values.shape, dtype=bool)
    reached = int(np.searchsorted(np.cumsum(ordered), share * total))
    found: Mask = mass >= max(ordered[min(reached, ordered.size - 1)], np.finfo(float).tiny)
    return found


def heatmap(values: Floats, sign: str, colormap: str | None = None) -> Pixels:
    """A map [H, W] in colours [H, W, 3]."""
    return coloured(normalised(values, sign), colormap or default(sign))


def overlay(
    picture: Pixels,
    values: Floats,
    sign: str,
    colormap: str | None = None,
    *,
    opacity: float = 0.65,
    contour: float | None = 0.5,
    faded: bool = False,
) -> Pixels:
    """The picture [H, W, 3] under its map [H, W]; where there is no heat it stays as it is.

    Heat hides the picture by its strength times ``opacity``. A line goes around the top
    ``contour`` of the mass. Where values are NaN, the model saw nothing, and it is darker. With
    ``faded`` the picture is grey and pale, for maps of single pixels that its colours would hide.
    """
    shown = normalised(values, sign)
    if faded:
        light = picture @ np.array([0.2126, 0.7152, 0.0722])
        picture = np.repeat((110 + 0.5 * light)[:, :, None], 3, axis=2).astype(np.uint8)
    strength = opacity * np.sqrt(np.abs(np.nan_to_num(shown)))[:, :, None]
    mixed = picture * (1 - strength) + coloured(shown, colormap or default(sign)) * strength
    mixed = np.where(np.isnan(values)[:, :, None], picture * _DIMMED, mixed)
    drawn = np.rint(mixed).astype(np.uint8)
    if contour is not None:
        _outline(drawn, top_mass(np.abs(values) if sign == "signed" else values, contour))
    return drawn


def _outline(image: Pixels, inside: Mask) -> None:
    """A white line inside the border of a region and a dark one outside, in place."""
    width = max(1, round(min(inside.shape) / 300))
    image[_grown(inside, width) & ~inside] = (20, 20, 20)
    image[inside & _grown(~inside, width)] = (255, 255, 255)


def _grown(mask: Mask, by: int) -> Mask:
    found = mask.copy()
    for _ in range(by):
        grown = found.copy()
        grown[1:] |= found[:-1]
        grown[:-1] |= found[1:]
        grown[:, 1:] |= found[:, :-1]
        grown[:, :-1] |= found[:, 1:]
        found = grown
    return found


def save_png(path: str | Path, image: Pixels, metadata: Mapping[str, str]) -> None:
    """Write a PNG whole or not at all. Raises UsageError where it cannot be written."""
    info = PngInfo()
    for key, value in metadata.items():
        info.add_itxt(key, value.encode("utf-8", "replace").decode())
    write_whole(path, lambda stream: Image.fromarray(image).save(stream, "PNG", pnginfo=info))


def write_whole(path: str | Path, write: Callable[[BinaryIO], object]) -> None:
    """Write a file beside its place and move it there. Raises UsageError naming the file."""
    path = Path(path)
    try:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=path.suffix)
        try:
            with os.fdopen(handle, "wb") as stream:
                write(stream)
            os.chmod(name, 0o644)
            os.replace(name, path)
        except BaseException:
            os.unlink(name)
            raise
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {error.strerror or error}") from error
