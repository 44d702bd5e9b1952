"""The steps from a picture to an input: resize, crop the centre, scale to 0..1, normalise.

Torchvision's, timm's and Hugging Face's pipelines come down to these. They run in Pillow, with
antialiasing and torchvision's rounding, so inputs equal torchvision's to the bit.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from gradscope.errors import InputError
from gradscope.models.geometry import Floats, Geometry
from gradscope.models.images import Picture

#: Pillow's filters by name; Hugging Face writes their numbers.
FILTERS = {f.name.lower(): f for f in Image.Resampling}
#: Beyond it a narrow strip, enlarged until its shorter edge fits, would take gigabytes.
_MOST_PIXELS = 2**27


@dataclass(frozen=True, eq=False, slots=True)
class Prepared:
    """A picture as the model's input, [C, h, w] float32, and where it lies in the picture."""

    inputs: Tensor
    geometry: Geometry


@dataclass(frozen=True, slots=True)
class Preprocessing:
    """The steps from a picture to an input, and where they were specified."""

    #: The shorter edge, or exactly (height, width); None leaves the size.
    resize: int | tuple[int, int] | None
    #: The centre that is cut out (height, width); None leaves all.
    crop: tuple[int, int] | None
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str = "bilinear"
    #: Factor for bytes 0..255.
    rescale: float = 1 / 255
    source: str = ""
    #: Specified nowhere; this is a guess.
    assumed: bool = False

    @property
    def channels(self) -> int:
        """Three, one for grey inputs (ITU-R 601 luma), or as many as the picture has bands."""
        return len(self.mean)

    @property
    def size(self) -> tuple[int, int] | None:
        """The size (height, width) of every input; None where it depends on the picture."""
        if self.crop is not None:
            return self.crop
        return self.resize if isinstance(self.resize, tuple) else None

    def __call__(self, picture: Picture) -> Prepared:
        """The input made from a picture.

        Raises InputError where resizing would leave no pixels, or too many.
        """
        height, width = self._resized((picture.height, picture.width))
        if height < 1 or width < 1:
            raise InputError(
                picture.path, "unsupported", "it would be resized to no pixels; crop it"
            )
        if height * width > _MOST_PIXELS:
            message = f"it would be resized to {height}×{width} pixels; crop it"
            raise InputError(picture.path, "unsupported", message)
        pixels = torch.from_numpy(self._bytes(picture, (width, height)))
        cropped, offset = _centred(pixels, self.crop)
        scale = (height / picture.height, width / picture.width)
        geometry = Geometry(
            (picture.height, picture.width),
            (cropped.shape[1], cropped.shape[2]),
            scale,
            (offset[0] / scale[0], offset[1] / scale[1]),
        )
        # In double, a byte times 1/255 equals the byte divided by 255, as in torchvision.
        return Prepared(self.normalise((cropped.double() * self.rescale).float()), geometry)

    def _bytes(self, picture: Picture, size: tuple[int, int]) -> Floats:
        """The resized picture [C, h, w] in 0..255, fractional for more than 8 bits."""
        planes = (p.resize(size, FILTERS[self.interpolation]) for p in self._planes(picture))
        found = np.stack([np.asarray(plane, np.float32) for plane in planes])
        if picture.pixels.dtype == np.uint8:
            return found
        # Filters that overshoot are clipped at black and white, as for bytes.
        return np.clip(found, 0, 1) * np.float32(255)

    def _planes(self, picture: Picture) -> list[Image.Image]:
        deep = picture.pixels.dtype != np.uint8
        if deep:
            floats = picture.pixels.astype(np.float32)
            return [Image.fromarray(floats[:, :, c]) for c in range(self.channels)]
        if self.channels == 1:
            return [Image.fromarray(picture.rgb()).convert("L")]
        return [Image.fromarray(picture.pixels[:, :, c]) for c in range(self.channels)]

    def _resized(self, size: tuple[int, int]) -> tuple[int, int]:
        if self.resize is None or isinstance(self.resize, tuple):
            return self.resize or size
        short = min(size)
        # Torchvision's rounding: the longer edge is truncated.
        height, width = (
            self.resize if edge == short else int(self.resize * edge / short) for edge in size
        )
        return height, width

    def normalise(self, pixels: Tensor) -> Tensor:
        """Pixels 0..1 [..., C, h, w] in the model's units."""
        return (pixels - self._column(self.mean, pixels)) / self._column(self.std, pixels)

    @staticmethod
    def _column(values: tuple[float, ...], like: Tensor) -> Tensor:
        return torch.tensor(values, dtype=like.dtype, device=like.device).view(-1, 1, 1)

    def steps(self) -> tuple[str, ...]:
        """The steps in words."""
        return tuple(self._steps())

    def _steps(self) -> Iterator[str]:
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
    """The steps for a model that takes images of one size, or with one channel.

    A guess keeps ImageNet's ratio of resize to crop; specified steps only get a size if they had
    none. Grey inputs use the mean of three channels' numbers, and a single number stands for all
    three.
    """
    height, width = size
    if height and width and (preprocessing.assumed or preprocessing.size is None):
        preprocessing = _sized(preprocessing, height, width)
    mean, std = preprocessing.mean, preprocessing.std
    if channels == 1 and preprocessing.channels == 3:
        return replace(preprocessing, mean=(sum(mean) / 3,), std=(sum(std) / 3,))
    if channels == 3 and preprocessing.channels == 1:
        return replace(preprocessing, mean=mean * 3, std=std * 3)
    return preprocessing


def resized(preprocessing: Preprocessing, size: tuple[int, int]) -> Preprocessing:
    """The steps for a model of another size, with the same share of the picture cropped."""
    (height, width), resize, crop = size, preprocessing.resize, preprocessing.crop
    if crop is None or resize is None or height != width:
        return replace(preprocessing, resize=(height, width), crop=None)
    if isinstance(resize, int):
        return replace(
            preprocessing, resize=round(resize * height / min(crop)), crop=(height, width)
        )
    scaled = (round(resize[0] * height / crop[0]), round(resize[1] * width / crop[1]))
    return replace(preprocessing, resize=scaled, crop=(height, width))


def _sized(preprocessing: Preprocessing, height: int, width: int) -> Preprocessing:
    edge: int | tuple[int, int]
    if height != width:
        # Without a crop, a model that is not square sees the whole picture.
        edge = (height, width)
    elif preprocessing.assumed:
        edge = round(height * 256 / 224)
    else:
        written = preprocessing.resize if isinstance(preprocessing.resize, int) else height
        # Far from the model's size it was meant for another model; the crop would be a corner.
        edge = written if height <= written < 2 * height else height
    return replace(preprocessing, resize=edge, crop=(height, width))
