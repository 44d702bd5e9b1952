"""Heatmaps, and heatmaps over the picture that was explained."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from gradscope.attribution.drawing.colour import Floats, Pixels, coloured, default

Mask = npt.NDArray[np.bool_]

#: Brightness of the picture where the model did not see it.
_DIMMED = 0.45


def normalised(values: Floats, sign: str, clip: float = 0.995) -> Floats:
    """A map [H, W] for display, between the ends of its ``bounds``.

    0..1, or -1..1 where both signs have a meaning, so that zero stays zero. NaN stays; a map with
    nothing to show is all zeros; no epsilon is added to denominators.
    """
    low, high = bounds(values, sign, clip)
    shown = values.astype(np.float64)
    if not high > low:
        return np.where(np.isnan(shown), shown, 0.0)
    if sign == "signed":
        return np.clip(shown / high, -1, 1)
    return np.clip((shown - low) / (high - low), 0, 1)


def bounds(values: Floats, sign: str, clip: float = 0.995) -> tuple[float, float]:
    """The values at the ends of a map's colours; negative ones are hidden unless signed.

    The upper one is the ``clip`` quantile of the values above zero, so that one pixel does not
    darken all others.
    """
    known = values[np.isfinite(values)].astype(np.float64)
    size = np.abs(known) if sign == "signed" else known.clip(0)
    if not (size > 0).any():
        return 0.0, 0.0
    high = float(np.quantile(size[size > 0], clip))
    return (-high, high) if sign == "signed" else (float(size.min()), high)


def scale(values: Floats, sign: str) -> str:
    """What the ends of a map's colours are, in words: whether it was cut off or stretched."""
    low, high = bounds(values, sign)
    known = values[np.isfinite(values)]
    if not high > low:
        return "nothing to show: no value is above 0" if sign != "signed" else "all zero"
    if sign == "signed":
        return "symmetric about 0"
    if low > 0:
        return f"min-max: from the least value, {low:.2g}, not from 0"
    return "ReLU: negative values cut off" if (known < 0).any() else "starts at 0"


def top_mass(values: Floats, share: float) -> Mask:
    """The smallest set of the greatest values with ``share`` of the positive sum.

    Values equal to its least are all in it.
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

    Heat covers the picture by its strength times ``opacity``. A line surrounds the top ``contour``
    of the mass. NaN is what the model did not see, and is darker. With ``faded`` the picture is
    grey and pale, for maps of single pixels that its colours would hide.
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
    """Draw a white line inside a region's border and a dark one outside, in place."""
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
