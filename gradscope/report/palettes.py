"""Colours of pages and charts, by scheme, for light and dark surroundings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from gradscope.errors import UsageError


@dataclass(frozen=True, slots=True)
class Palette:
    """Names of colours to their values; ``@@name`` in a chart is looked up here."""

    light: dict[str, str]
    dark: dict[str, str]


_PAPER = {"bg": "#ffffff", "panel": "#f6f8fa", "fg": "#1f2328", "dim": "#59636e", "line": "#d1d9e0"}
_NIGHT = {"bg": "#0d1117", "panel": "#151b23", "fg": "#e6edf3", "dim": "#9198a1", "line": "#3d444d"}

#: Okabe and Ito's colours, which people with any colour vision tell apart; viridis for amounts.
_DEFAULT = Palette(
    _PAPER
    | {
        "critical": "#a4004f", "high": "#c8401e", "medium": "#9a6700", "low": "#0969da",
        "info": "#59636e", "good": "#00785a", "accent": "#0969da",
        "amount0": "#440154", "amount1": "#3b528b", "amount2": "#21918c", "amount3": "#5ec962",
        "amount4": "#fde725", "none": "#e6e9ed",
        "line1": "#0072b2", "line2": "#d55e00", "line3": "#009e73", "line4": "#cc79a7",
    },
    _NIGHT
    | {
        "critical": "#ff6ba9", "high": "#ff8c5a", "medium": "#e3b341", "low": "#6cb6ff",
        "info": "#9198a1", "good": "#3fd6a5", "accent": "#6cb6ff",
        "amount0": "#440154", "amount1": "#3b528b", "amount2": "#21918c", "amount3": "#5ec962",
        "amount4": "#fde725", "none": "#262c36",
        "line1": "#56b4e9", "line2": "#e69f00", "line3": "#2bd4a0", "line4": "#f09ac8",
    },
)  # fmt: skip
_CIVIDIS = {
    "amount0": "#00224e", "amount1": "#3e4a6b", "amount2": "#7d7c78", "amount3": "#bcae6c",
    "amount4": "#fee838",
}  # fmt: skip

PALETTES: Mapping[str, Palette] = {
    "default": _DEFAULT,
    "high-contrast": Palette(
        _DEFAULT.light
        | {
            "bg": "#ffffff", "panel": "#ffffff", "fg": "#000000", "dim": "#303030",
            "line": "#000000", "critical": "#8b0000", "high": "#a02c00", "medium": "#5c4400",
            "low": "#003c9e", "info": "#303030", "good": "#00501e", "accent": "#003c9e",
        },
        _DEFAULT.dark
        | {
            "bg": "#000000", "panel": "#000000", "fg": "#ffffff", "dim": "#d8d8d8",
            "line": "#ffffff", "critical": "#ff7ab8", "high": "#ffa07a", "medium": "#ffd75e",
            "low": "#8fc7ff", "info": "#d8d8d8", "good": "#5cf0bd", "accent": "#8fc7ff",
        },
    ),
    "colour-blind": Palette(
        _DEFAULT.light
        | _CIVIDIS
        | {
            "critical": "#882255", "high": "#b0430c", "medium": "#8a6d00", "low": "#005a9c",
            "good": "#00624a",
        },
        _DEFAULT.dark
        | _CIVIDIS
        | {
            "critical": "#f08ac0", "high": "#f0863c", "medium": "#f0e442", "low": "#56b4e9",
            "good": "#32d0a0",
        },
    ),
    "monochrome": Palette(
        _PAPER
        | {
            "critical": "#000000", "high": "#222222", "medium": "#444444", "low": "#5a5a5a",
            "info": "#666666", "good": "#666666", "accent": "#000000", "none": "#f4f4f4",
            "amount0": "#111111", "amount1": "#484848", "amount2": "#7f7f7f", "amount3": "#b5b5b5",
            "amount4": "#e6e6e6", "line1": "#000000", "line2": "#555555", "line3": "#888888",
            "line4": "#aaaaaa",
        },
        _NIGHT
        | {
            "critical": "#ffffff", "high": "#e8e8e8", "medium": "#cccccc", "low": "#b4b4b4",
            "info": "#a0a0a0", "good": "#a0a0a0", "accent": "#ffffff", "none": "#1c1c1c",
            "amount0": "#2a2a2a", "amount1": "#5a5a5a", "amount2": "#8a8a8a", "amount3": "#bababa",
            "amount4": "#f0f0f0", "line1": "#ffffff", "line2": "#bbbbbb", "line3": "#8a8a8a",
            "line4": "#6a6a6a",
        },
    ),
}  # fmt: skip


def palette(name: str) -> Palette:
    """The palette of a name. Raises UsageError when there is none."""
    if name not in PALETTES:
        raise UsageError(f"unknown colours {name!r}; choose from {', '.join(PALETTES)}")
    return PALETTES[name]
