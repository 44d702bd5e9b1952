"""How pictures become inputs, read from wherever it was written down, and how to find back.

Torchvision's, timm's and Hugging Face's ways come to the same steps: resize with antialiasing,
crop the centre, scale to 0..1, normalise. They are made with Pillow, as those libraries do, so
inputs are theirs to the bit.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from gradscope.errors import InputError, UsageError
from gradscope.models.images import Picture

Floats = npt.NDArray[np.floating[Any]]

#: Pillow's filters by name; Hugging Face writes their numbers.
FILTERS = {f.name.lower(): f for f in Image.Resampling}


@dataclass(frozen=True, slots=True)
class Geometry:
    """Where the inputs' pixels lie in the picture, down and across.

    Pixel centre ``i`` of the input is at ``(i + 0.5) / scale + offset`` in the picture's pixels.
    """

    picture: tuple[int, int]
    inputs: tuple[int, int]
    scale: tuple[float, float]
    offset: tuple[float, float]

    def box(self) -> tuple[int, int, int, int]:
        """Top, left, bottom and right of what the model sees, in the picture's pixels."""
        (top, bottom), (left, right) = (self._seen(axis) for axis in (0, 1))
        return top, left, bottom, right

    def _seen(self, axis: int) -> tuple[int, int]:
        places = np.flatnonzero(self._places(axis)[1])
        return (int(places[0]), int(places[-1]) + 1) if places.size else (0, 0)

    def of_size(self, height: int, width: int) -> Geometry:
        """The same for the picture at another size."""
        down, across = height / self.picture[0], width / self.picture[1]
        return Geometry(
            (height, width),
            self.inputs,
            (self.scale[0] / down, self.scale[1] / across),
            (self.offset[0] * down, self.offset[1] * across),
        )

    def to_picture(self, values: Floats, fill: float = math.nan) -> Floats:
        """A map [h, w] of the inputs as [H, W] of the picture, bilinearly; ``fill`` unseen."""
        rows, inside_rows = self._places(0)
        columns, inside_columns = self._places(1)
        found = _interpolated(_interpolated(values, rows).T, columns).T
        seen = inside_rows[:, None] & inside_columns[None, :]
        return np.where(seen, found, fill)

    def _places(self, axis: int) -> tuple[Floats, npt.NDArray[np.bool_]]:
        """For each of the picture's rows or columns, where in the input it is, and if it is."""
        centres = np.arange(self.picture[axis]) + 0.5
        found = (centres - self.offset[axis]) * self.scale[axis]
        inside = (found >= 0) & (found <= self.inputs[axis])
        return np.clip(found - 0.5, 0, self.inputs[axis] - 1), inside


def _interpolated(values: Floats, at: Floats) -> Floats:
    low = np.floor(at).astype(int)
    high = np.minimum(low + 1, len(values) - 1)
    share = (at - low)[:, None]
    mixed: Floats = values[low] * (1 - share) + values[high] * share
    return mixed


@dataclass(frozen=True, eq=False, slots=True)
class Prepared:
    """A picture as the model takes it, [C, h, w] float32, and the way back."""

    inputs: Tensor
    geometry: Geometry


@dataclass(frozen=True, slots=True)
class Preprocessing:
    """The steps from a picture to an input, and who said so."""

    #: The shorter edge, or exactly (height, width); None leaves the size.
    resize: int | tuple[int, int] | None
    #: The centre that is cut out (height, width); None leaves all.
    crop: tuple[int, int] | None
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str = "bilinear"
    #: What multiplies bytes 0..255.
    rescale: float = 1 / 255
    source: str = ""
    #: Nothing said how; this is a guess.
    assumed: bool = False

    @property
    def channels(self) -> int:
        """Three, or one for grey inputs (weights of ITU-R 601)."""
        return len(self.mean)

    @property
    def size(self) -> tuple[int, int] | None:
        """The size (height, width) of every input; None where it depends on the picture."""
        if self.crop is not None:
            return self.crop
        return self.resize if isinstance(self.resize, tuple) else None

    def __call__(self, picture: Picture) -> Prepared:
        """An input of this picture. Raises InputError where nothing of it would be left."""
        height, width = self._resized((picture.height, picture.width))
        if height < 1 or width < 1:
            raise InputError(picture.path, "unsupported", "it would be resized to nothing")
        channels = [
            np.asarray(c.resize((width, height), FILTERS[self.interpolation]), np.float32)
            for c in self._planes(picture)
        ]
        unit = 255 if picture.pixels.dtype != np.uint8 else 1
        pixels = torch.from_numpy(np.stack(channels)) * unit
        cropped, offset = _centred(pixels, self.crop)
        scale = (height / picture.height, width / picture.width)
        geometry = Geometry(
            (picture.height, picture.width),
            (cropped.shape[1], cropped.shape[2]),
            scale,
            (offset[0] / scale[0], offset[1] / scale[1]),
        )
        return Prepared(self.normalise((cropped * self.rescale).float()), geometry)

    def _planes(self, picture: Picture) -> list[Image.Image]:
        deep = picture.pixels.dtype != np.uint8
        if deep:
            planes = [Image.fromarray(picture.pixels[:, :, c].astype(np.float32)) for c in range(3)]
            return planes[: self.channels]
        image = Image.fromarray(picture.rgb())
        return list(image.split()) if self.channels == 3 else [image.convert("L")]

    def _resized(self, size: tuple[int, int]) -> tuple[int, int]:
        if self.resize is None or isinstance(self.resize, tuple):
            return self.resize or size
        short = min(size)
        # Torchvision's rounding: the longer edge is cut off.
        height, width = (
            self.resize if edge == short else int(self.resize * edge / short) for edge in size
        )
        return height, width

    def normalise(self, pixels: Tensor) -> Tensor:
        """Pixels 0..1 [..., C, h, w] in the model's units."""
        return (pixels - self._column(self.mean, pixels)) / self._column(self.std, pixels)

    def denormalise(self, inputs: Tensor) -> Tensor:
        """The model's units back to pixels 0..1."""
        return inputs * self._column(self.std, inputs) + self._column(self.mean, inputs)

    @staticmethod
    def _column(values: tuple[float, ...], like: Tensor) -> Tensor:
        return torch.tensor(values, dtype=like.dtype, device=like.device).view(-1, 1, 1)

    def steps(self) -> tuple[str, ...]:
        """The steps in words."""
        return tuple(self._steps())

    def _steps(self) -> Any:
        if isinstance(self.resize, tuple):
            yield f"resize to {self.resize[0]}×{self.resize[1]} ({self.interpolation})"
        elif self.resize is not None:
            yield f"resize the shorter edge to {self.resize} ({self.interpolation})"
        if self.crop is not None:
            yield f"crop the centre {self.crop[0]}×{self.crop[1]}"
        if not math.isclose(self.rescale, 1 / 255):
            yield f"multiply bytes by {self.rescale:g}"
        mean, std = ("/".join(f"{v:g}" for v in values) for values in (self.mean, self.std))
        yield f"subtract {mean}, divide by {std}"


def _centred(pixels: Tensor, crop: tuple[int, int] | None) -> tuple[Tensor, tuple[int, int]]:
    """The centre, padded with zeros where it is smaller, and the offset of its first pixel."""
    if crop is None:
        return pixels, (0, 0)
    lacking = [max(0, want - have) for want, have in zip(crop, pixels.shape[1:], strict=True)]
    (top, bottom), (left, right) = ((n // 2, (n + 1) // 2) for n in lacking)
    padded = torch.nn.functional.pad(pixels, (left, right, top, bottom))
    # Torchvision's rounding, half to even.
    down, across = (
        round((have - want) / 2) for want, have in zip(crop, padded.shape[1:], strict=True)
    )
    found = padded[:, down : down + crop[0], across : across + crop[1]]
    return found, (down - top, across - left)


IMAGENET = Preprocessing(
    256, (224, 224), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), source="imagenet"
)


def fitted(
    preprocessing: Preprocessing, size: tuple[int | None, int | None], channels: int | None
) -> Preprocessing:
    """The steps for a model that takes images of one size, or of one channel.

    A guess keeps ImageNet's ratio of resize to crop; what was written down is only given a size
    where it had none. Grey inputs take the mean of three channels' numbers.
    """
    height, width = size
    if height and width and (preprocessing.assumed or preprocessing.size is None):
        ratio = 256 / 224 if preprocessing.assumed else 1.0
        # No crop keeps the whole of a picture in a shape that is not square.
        edge: int | tuple[int, int] = (
            round(height * ratio) if height == width else (round(height), round(width))
        )
        preprocessing = replace(preprocessing, resize=edge, crop=(height, width))
    if channels == 1 and preprocessing.channels == 3:
        mean, std = (sum(v) / 3 for v in (preprocessing.mean, preprocessing.std))
        preprocessing = replace(preprocessing, mean=(mean,), std=(std,))
    return preprocessing


# --- where it is written down ---------------------------------------------------------------------


def parse(text: str) -> Preprocessing:
    """What ``--preprocess`` says: ``imagenet``, a JSON file, or ``key=value`` pairs.

    Keys are Hugging Face's. Raises UsageError for a wrong value, InputError for a wrong file.
    """
    if text == "imagenet":
        return IMAGENET
    if "=" in text and not Path(text).is_file():
        return _from_keys(dict(_pairs(text)), "--preprocess", UsageError)
    return read_preprocessing(text)


def read_preprocessing(path: str) -> Preprocessing:
    """A ``preprocessor_config.json`` or a timm ``config.json``. Raises InputError."""

    def wrong(message: str) -> Exception:
        return InputError(path, "malformed", message)

    try:
        keys = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(
            path, "missing", "there is no such file; --preprocess takes imagenet, a JSON file "
            "or key=value pairs such as image_mean=0.5/0.5/0.5,image_std=0.5/0.5/0.5,size=224"
        ) from None  # fmt: skip
    except OSError as error:
        raise InputError(path, "missing", f"it cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise wrong(f"it is no JSON ({error})") from None
    if not isinstance(keys, dict):
        raise wrong("it holds no JSON object of preprocessing keys")
    return _from_timm(keys, path, wrong) or _from_keys(keys, path, wrong)


def beside(model: str) -> Preprocessing | None:
    """What a file next to the model says, if there is one that says it."""
    folder = Path(model) if Path(model).is_dir() else Path(model).parent
    for name in ("preprocessor_config.json", "config.json"):
        path = folder / name
        if path.is_file():
            keys = _json(path)
            known = {"image_mean", "do_normalize", "size"} if name[0] == "p" else {"pretrained_cfg"}
            if known & set(keys):
                return read_preprocessing(str(path))
    return None


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def of_module(module: object) -> Preprocessing | None:
    """What a timm model knows of its own inputs."""
    for name in ("pretrained_cfg", "default_cfg"):
        config = getattr(module, name, None)
        keys = config if isinstance(config, Mapping) else getattr(config, "__dict__", {})
        if keys.get("mean") and keys.get("std") and keys.get("input_size"):
            return _from_timm({"pretrained_cfg": dict(keys)}, "timm's configuration", UsageError)
    return None


def of_torchvision(factory: str) -> Preprocessing | None:
    """What torchvision says of the weights of a model it knows by this name."""
    try:
        known = import_module("torchvision.models")
        steps = known.get_model_weights(factory).DEFAULT.transforms()
        mean, std = tuple(steps.mean), tuple(steps.std)
        resize, crop = int(steps.resize_size[0]), int(steps.crop_size[0])
        name = str(getattr(steps.interpolation, "value", steps.interpolation))
    # Absent, broken, or it does not know the name.
    except Exception:
        return None
    source = f"torchvision's weights of {factory}"
    return Preprocessing(resize, (crop, crop), mean, std, name, source=source)


Wrong = Callable[[str], Exception]


def _from_timm(keys: Mapping[str, Any], source: str, wrong: Wrong) -> Preprocessing | None:
    config = keys.get("pretrained_cfg", keys)
    if not isinstance(config, Mapping) or "mean" not in config or "input_size" not in config:
        return None
    channels, height, width = _numbers(config["input_size"], "input_size", wrong, 3)
    share = float(config.get("crop_pct") or 0.875)
    crop = (int(height), int(width))
    edge = math.floor(min(crop) / share)
    squash = config.get("crop_mode") == "squash"
    found = Preprocessing(
        (math.floor(crop[0] / share), math.floor(crop[1] / share)) if squash else edge,
        crop,
        _numbers(config["mean"], "mean", wrong, int(channels)),
        _positive(_numbers(config.get("std", ()), "std", wrong, int(channels)), "std", wrong),
        _filter(config.get("interpolation", "bilinear"), wrong),
        source=source,
    )
    return _checked(found, wrong)


_KEYS = {
    "do_resize", "size", "resample", "do_center_crop", "crop_size", "do_rescale", "rescale_factor",
    "do_normalize", "image_mean", "image_std",
}  # fmt: skip


def _from_keys(keys: Mapping[str, Any], source: str, wrong: Wrong) -> Preprocessing:
    """Hugging Face's keys. Those of other kinds that their files carry are not looked at."""
    unknown = [key for key in keys if key not in _KEYS]
    if unknown and source == "--preprocess":
        raise wrong(f"--preprocess has no key {unknown[0]!r}; there are {', '.join(sorted(_KEYS))}")
    if not _KEYS & set(keys):
        raise wrong(f"none of the keys {', '.join(sorted(_KEYS))} is in it")
    resize: int | tuple[int, int] | None = None
    if keys.get("do_resize", "size" in keys):
        resize = _size(keys.get("size", 224), "size", wrong)
    crop = None
    if keys.get("do_center_crop", "crop_size" in keys):
        found = _size(keys.get("crop_size", keys.get("size", 224)), "crop_size", wrong)
        crop = (found, found) if isinstance(found, int) else found
    rescale = float(_numbers([keys.get("rescale_factor", 1 / 255)], "rescale_factor", wrong, 1)[0])
    mean, std = _normalisation(keys, wrong)
    return _checked(
        Preprocessing(
            resize,
            crop,
            mean,
            std,
            _filter(keys.get("resample", "bilinear"), wrong),
            rescale if keys.get("do_rescale", True) else 1.0,
            source,
        ),
        wrong,
    )


def _normalisation(
    keys: Mapping[str, Any], wrong: Wrong
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    if not keys.get("do_normalize", True):
        return (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    mean = _numbers(keys.get("image_mean", IMAGENET.mean), "image_mean", wrong)
    std = _numbers(keys.get("image_std", IMAGENET.std), "image_std", wrong)
    if len(mean) != len(std) or len(mean) not in (1, 3):
        raise wrong(
            f"image_mean has {len(mean)} numbers and image_std {len(std)}; both have one (grey) "
            "or three"
        )
    return mean, _positive(std, "image_std", wrong)


def _size(value: Any, key: str, wrong: Wrong) -> int | tuple[int, int]:
    if isinstance(value, Mapping):
        if "shortest_edge" in value:
            value = value["shortest_edge"]
        elif "height" in value and "width" in value:
            value = (value["height"], value["width"])
        else:
            raise wrong(f"{key} has neither shortest_edge nor height and width")
    if isinstance(value, list | tuple):
        height, width = _numbers(value, key, wrong, 2)
        return int(height), int(width)
    return int(_numbers([value], key, wrong, 1)[0])


def _numbers(value: Any, key: str, wrong: Wrong, count: int | None = None) -> tuple[float, ...]:
    values = value if isinstance(value, list | tuple) else [value]
    good = all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)
    if not good or not all(math.isfinite(v) for v in values) or (count and len(values) != count):
        raise wrong(f"{key} is {value!r}, not {count or 'a list of'} finite number(s)")
    return tuple(float(v) for v in values)


def _positive(values: tuple[float, ...], key: str, wrong: Wrong) -> tuple[float, ...]:
    if min(values, default=0) <= 0:
        raise wrong(f"{key} holds {min(values, default=0):g}; what divides is above zero")
    return values


def _filter(value: Any, wrong: Wrong) -> str:
    by_number = {f.value: name for name, f in FILTERS.items()}
    name = by_number.get(value, "") if isinstance(value, int) else str(value).lower()
    if name not in FILTERS:
        raise wrong(f"no filter is called {value!r}; there are {', '.join(FILTERS)}")
    return name


def _checked(found: Preprocessing, wrong: Wrong) -> Preprocessing:
    sizes = [found.resize] if isinstance(found.resize, int) else list(found.resize or ())
    for size in (*sizes, *(found.crop or ())):
        if not 1 <= size <= 16384:
            raise wrong(f"a size of {size} pixels is none between 1 and 16384")
    return found


def _pairs(text: str) -> Any:
    """``key=value`` pairs; commas inside brackets belong to the value."""
    for pair in re.split(r",(?![^\[{(]*[\]})])", text):
        key, equals, value = pair.strip().partition("=")
        if not equals:
            raise UsageError(f"--preprocess: {pair!r} is no key=value")
        yield key.strip(), _value(value.strip())


def _value(text: str) -> Any:
    by_word = {"true": True, "false": False, "none": None}
    if text.lower() in by_word:
        return by_word[text.lower()]
    sides = re.fullmatch(r"(\d+)x(\d+)", text)
    if sides:
        return [int(side) for side in sides.groups()]
    if "/" in text:
        return [_value(part) for part in text.split("/")]
    try:
        return json.loads(text)
    except ValueError:
        return text
