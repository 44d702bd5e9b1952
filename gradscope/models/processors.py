"""Preprocessing as it is specified on the command line or in a file.

``--preprocess``, Hugging Face's ``preprocessor_config.json``, timm's ``config.json``: each becomes
a ``Preprocessing``. What libraries know of their own models is in ``published``.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from gradscope.errors import InputError, UsageError
from gradscope.models.preprocessing import IMAGENET, Preprocessing
from gradscope.models.processor_values import (
    Wrong,
    filter_named,
    numbers,
    positive,
    size_of,
    value_of,
    whole,
)
from gradscope.text import quoted

#: Written with a model for its weights; what else libraries write is about an architecture.
PROCESSORS = ("preprocessor_config.json", "processor_config.json")


def parse(text: str) -> Preprocessing:
    """The steps of ``--preprocess``: ``imagenet``, a JSON file, its folder, or ``key=value`` pairs.

    Keys are Hugging Face's, or timm's where ``input_size`` and ``mean`` are among them. Mean and
    standard deviation default to ImageNet's. ``size=N`` is the shorter edge. Raises UsageError
    for a wrong value, InputError for a wrong file.
    """
    text = text.strip()
    if text == "imagenet":
        return IMAGENET
    if _is(text, Path.is_file):
        return read_preprocessing(text)
    if "=" in text:
        keys = _unique(_pairs(text))
        timm = from_timm(keys, _OPTION, _asked) if keys.keys() <= _TIMM else None
        return timm or _from_keys(keys, _OPTION, _asked)
    if not text:
        raise _asked(f"it is empty; {_FORMS}")
    found = beside(text) if _is(text, Path.is_dir) else None
    return found or read_preprocessing(text)


_OPTION = "--preprocess"
_FORMS = (
    "--preprocess is imagenet, a JSON file or key=value pairs such as "
    "image_mean=0.5/0.5/0.5,image_std=0.5/0.5/0.5,size=224"
)


def _asked(message: str) -> Exception:
    return UsageError(f"{_OPTION}: {message}")


def _is(text: str, kind: Callable[[Path], bool]) -> bool:
    """Whether a path exists and is of this kind; pairs may be too long for a file name."""
    try:
        return bool(text) and kind(Path(text))
    except OSError:
        return False


def read_preprocessing(path: str) -> Preprocessing:
    """The steps in a processor's or a timm model's configuration. Raises InputError."""

    def wrong(message: str) -> Exception:
        return InputError(path, "malformed", message)

    try:
        # Some editors write a byte order mark.
        keys = json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise InputError(path, "missing", f"file not found; {_FORMS}") from None
    except IsADirectoryError:
        message = "this folder has neither a preprocessor_config.json nor a timm config.json"
        raise InputError(path, "missing", message) from None
    except OSError as error:
        raise InputError(path, "missing", f"it cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise wrong(f"it is not valid JSON ({error}); {_FORMS}") from None
    if not isinstance(keys, dict):
        raise wrong(f"it is not a JSON object of preprocessing keys; {_FORMS}")
    keys = _of_pictures(keys)
    return from_timm(keys, path, wrong) or _from_keys(keys, path, wrong)


def beside(model: str) -> Preprocessing | None:
    """The steps in a file next to the model; None where no file has any.

    Raises InputError for a processor's configuration with wrong values.
    """
    folder = Path(model) if Path(model).is_dir() else Path(model).parent
    for name in PROCESSORS:
        keys = _of_pictures(_json(folder / name))
        if {"image_mean", "do_normalize", "size", "crop_size"} & keys.keys():
            return read_preprocessing(str(folder / name))
    config = folder / "config.json"
    return read_preprocessing(str(config)) if _is_timms(_json(config)) else None


def _of_pictures(keys: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of a processor of pictures and texts that is about pictures."""
    inner = keys.get("image_processor")
    return inner if isinstance(inner, Mapping) else keys


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _is_timms(keys: Mapping[str, Any]) -> bool:
    config = keys.get("pretrained_cfg", keys)
    return isinstance(config, Mapping) and {"mean", "input_size"} <= config.keys()


_TIMM = {"input_size", "mean", "std", "crop_pct", "crop_mode", "interpolation"}


def from_timm(keys: Mapping[str, Any], source: str, wrong: Wrong) -> Preprocessing | None:
    """The steps of ``timm.data.transforms_imagenet_eval``; None where the keys are not timm's."""
    if not _is_timms(keys):
        return None
    config = keys.get("pretrained_cfg", keys)
    channels, height, width = whole(config["input_size"], "input_size", wrong, 3)
    share = positive(numbers(config.get("crop_pct") or 0.875, "crop_pct", wrong, 1), "crop_pct",
                      wrong)[0]  # fmt: skip
    mode = config.get("crop_mode") or "center"
    if mode not in ("center", "squash"):
        raise wrong(f"crop_mode is {mode!r}; center and squash are supported")
    scaled = (math.floor(min(height / share, 1e6)), math.floor(min(width / share, 1e6)))
    found = Preprocessing(
        scaled if mode == "squash" else min(scaled),
        (height, width),
        numbers(config["mean"], "mean", wrong, channels),
        positive(numbers(config.get("std"), "std", wrong, channels), "std", wrong),
        filter_named(config.get("interpolation") or "bilinear", wrong),
        source=source,
    )
    return _checked(found, wrong)


_KEYS = {
    "do_resize", "size", "resample", "do_center_crop", "crop_size", "do_rescale", "rescale_factor",
    "do_normalize", "image_mean", "image_std", "crop_pct",
}  # fmt: skip


def _from_keys(given: Mapping[str, Any], source: str, wrong: Wrong) -> Preprocessing:
    """Hugging Face's keys; other keys in their files are ignored."""
    unknown = [key for key in given if key not in _KEYS]
    if unknown and source == _OPTION:
        known = f"{', '.join(sorted(_KEYS))}, or timm's {', '.join(sorted(_TIMM))}"
        raise wrong(f"unknown key {quoted(unknown[0], 60)}; the keys are {known}")
    # Their files have null for steps that a processor lacks.
    keys = {k: v for k, v in given.items() if v is not None or k in ("image_mean", "image_std")}
    if not _KEYS & keys.keys():
        raise wrong(f"it has none of the keys {', '.join(sorted(_KEYS))}")
    resize, crop = _sizes(keys, source, wrong)
    rescale = numbers(keys.get("rescale_factor", 1 / 255), "rescale_factor", wrong, 1)
    mean, std = _normalisation(keys, wrong)
    found = Preprocessing(
        resize,
        crop,
        mean,
        std,
        filter_named(keys.get("resample", "bilinear"), wrong),
        positive(rescale, "rescale_factor", wrong)[0]
        if _flag(keys, "do_rescale", True, wrong)
        else 1.0,
        source,
    )
    return _checked(found, wrong)


def _sizes(
    keys: Mapping[str, Any], source: str, wrong: Wrong
) -> tuple[int | tuple[int, int] | None, tuple[int, int] | None]:
    """The size to resize to, and the centre to crop."""
    resize: int | tuple[int, int] | None = None
    crop = None
    size = size_of(keys.get("size", 224), "size", wrong)
    if _flag(keys, "do_resize", "size" in keys, wrong):
        resize = size
    if _flag(keys, "do_center_crop", "crop_size" in keys, wrong):
        found = size_of(keys.get("crop_size", size), "crop_size", wrong)
        crop = (found, found) if isinstance(found, int) else found
    if not isinstance(resize, int) or crop is not None:
        return resize, crop
    if "crop_pct" in keys:
        return _convnext(resize, keys, wrong)
    # A plain number in a file without a crop is a square: older files of ViT, BEiT and Swin.
    plain = source != _OPTION and not isinstance(keys.get("size"), Mapping)
    return ((resize, resize) if plain else resize), None


def _convnext(
    edge: int, keys: Mapping[str, Any], wrong: Wrong
) -> tuple[int | tuple[int, int], tuple[int, int]]:
    """ConvNeXT's processor: small sizes are cropped, from 384 on the picture is squashed."""
    share = positive(numbers(keys["crop_pct"], "crop_pct", wrong, 1), "crop_pct", wrong)[0]
    return (int(min(edge / share, 1e6)) if edge < 384 else (edge, edge)), (edge, edge)


def _flag(keys: Mapping[str, Any], key: str, default: bool, wrong: Wrong) -> bool:
    value = keys.get(key, default)
    if value not in (True, False):
        raise wrong(f"{key} is {value!r}; it has to be true or false")
    return bool(value)


def _normalisation(
    keys: Mapping[str, Any], wrong: Wrong
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    if not _flag(keys, "do_normalize", True, wrong):
        return (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    mean = numbers(keys.get("image_mean", IMAGENET.mean), "image_mean", wrong)
    std = numbers(keys.get("image_std", IMAGENET.std), "image_std", wrong)
    if len(mean) != len(std) or len(mean) in (0, 2):
        raise wrong(
            f"image_mean has {len(mean)} numbers and image_std {len(std)}; both need one (grey), "
            "or three and more"
        )
    return mean, positive(std, "image_std", wrong)


def _checked(found: Preprocessing, wrong: Wrong) -> Preprocessing:
    resize = [found.resize] if isinstance(found.resize, int) else found.resize or ()
    for key, sizes in (("size", resize), ("the crop's size", found.crop or ())):
        if not all(1 <= size <= 16384 for size in sizes):
            raise wrong(f"{key} is {'×'.join(map(str, sizes))}; edges are 1 to 16384 pixels")
    if found.channels == 2:
        raise wrong("images have one channel, or three and more, not 2")
    return found


def _pairs(text: str) -> Iterator[tuple[str, Any]]:
    """``key=value`` pairs; commas inside brackets belong to the value."""
    for pair in re.split(r",(?![^\[{(]*[\]})])", text):
        key, equals, value = pair.strip().partition("=")
        if not equals:
            raise _asked(f"{quoted(pair, 60)} is not key=value")
        yield key.strip(), value_of(value.strip())


def _unique(pairs: Iterator[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise _asked(f"{key} is given twice")
        found[key] = value
    return found
