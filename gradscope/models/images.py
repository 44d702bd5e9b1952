"""Pictures as people have them: found, read, upright, in three channels."""

from __future__ import annotations

import hashlib
import io
import re
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError

from gradscope.errors import InputError

Array = npt.NDArray[np.generic]
#: What Pillow keeps in more than eight bits a pixel.
_DEEP = ("I", "I;16", "I;16B", "I;16L", "I;16N", "F")


@dataclass(frozen=True, eq=False, slots=True)
class Picture:
    """An upright picture in three channels: uint8, or float32 in 0..1 where it is deeper."""

    path: str
    format: str
    #: As the file has it, before it became RGB.
    mode: str
    bytes: int
    sha256: str
    #: [H, W, 3]
    pixels: Array

    @property
    def height(self) -> int:
        """Pixels down."""
        return int(self.pixels.shape[0])

    @property
    def width(self) -> int:
        """Pixels across."""
        return int(self.pixels.shape[1])

    def rgb(self) -> npt.NDArray[np.uint8]:
        """The picture for display, uint8 [H, W, 3]."""
        if self.pixels.dtype == np.uint8:
            return self.pixels.astype(np.uint8, copy=False)
        return np.clip(np.rint(self.pixels.astype(np.float64) * 255), 0, 255).astype(np.uint8)


def find_images(paths: Sequence[str]) -> Iterator[str]:
    """Files as they are given; of a folder, every picture in it and below, img2 before img10.

    Raises InputError for a folder without any.
    """
    for path in paths:
        if not Path(path).is_dir():
            yield path
            continue
        found = sorted((p for p in _below(Path(path)) if _is_picture(p)), key=_natural)
        if not found:
            raise InputError(path, "missing", "there is no picture in this folder")
        yield from map(str, found)


def _below(folder: Path) -> Iterator[Path]:
    for path in folder.rglob("*"):
        if path.is_file() and not any(p.startswith(".") for p in path.relative_to(folder).parts):
            yield path


@cache
def _suffixes() -> frozenset[str]:
    return frozenset(
        suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN
    ) - {".pdf", ".h5", ".hdf"}


def _is_picture(path: Path) -> bool:
    return path.suffix.lower() in _suffixes()


def _natural(path: Path) -> list[tuple[int, int | str]]:
    parts = re.split(r"(\d+)", str(path))
    return [(0, int(part)) if part.isdigit() else (1, part) for part in parts]


def open_image(path: str) -> Picture:
    """A picture of any format that Pillow reads; of an animated one the first frame.

    EXIF's orientation is applied. What is transparent lies over white. Grey pictures have three
    equal channels; of 16 bits they keep their depth, 65535 becoming 1; integers of 32 bits and
    floats beyond 0..1 are scaled by their range. Raises InputError for everything else.
    """
    data = _bytes(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data)) as image:
                kind, mode = image.format or "?", image.mode
                pixels = _pixels(ImageOps.exif_transpose(image))
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise InputError(
            path, "unsupported", f"it is too large to be a picture for a model ({error}); shrink it"
        ) from None
    except UnidentifiedImageError:
        raise InputError(path, "malformed", _unknown(data)) from None
    # Pillow's plugins raise whatever their parsing meets.
    except Exception as error:
        cause = str(error) or type(error).__name__
        raise InputError(
            path,
            "truncated" if "truncated" in cause.lower() else "malformed",
            f"the picture cannot be decoded ({cause}); it is damaged, save it again",
        ) from None
    digest = hashlib.sha256(data).hexdigest()
    return Picture(path, kind, mode, len(data), digest, pixels)


def _bytes(path: str) -> bytes:
    try:
        data = Path(path).read_bytes()
    except FileNotFoundError:
        raise InputError(path, "missing", "there is no such file") from None
    except OSError as error:
        raise InputError(path, "missing", f"it cannot be read ({error.strerror})") from None
    if not data:
        raise InputError(path, "truncated", "the file is empty")
    return data


def _unknown(data: bytes) -> str:
    start = data[:512].lstrip().lower()
    if b"<svg" in start or start.startswith(b"<?xml"):
        return "it is a drawing (SVG or XML), not pixels; export it as PNG"
    if b"<html" in start or start.startswith(b"<!doctype"):
        return "it is a web page, probably of a failed download"
    if start.startswith(b"version https://git-lfs"):
        return "it is a Git LFS pointer; fetch the file with `git lfs pull`"
    if data[4:12] in (b"ftypheic", b"ftypheix", b"ftypmif1", b"ftypavif"):
        return (
            "it is HEIC or AVIF, which Pillow reads with a plugin only; convert it to PNG or JPEG"
        )
    return "it is no picture that Pillow can read"


def _pixels(image: Image.Image) -> Array:
    if image.mode in _DEEP:
        grey = _deep(np.asarray(image), image.mode)
        return np.repeat(grey[:, :, None], 3, axis=2)
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image)
    return np.asarray(image.convert("RGB"))


def _deep(values: Array, mode: str) -> npt.NDArray[np.float32]:
    grey = values.astype(np.float64)
    if mode.startswith("I;16"):
        return (grey / 65535).astype(np.float32)
    low, high = float(np.nanmin(grey)), float(np.nanmax(grey))
    if mode == "I" and low >= 0 and high <= 65535:
        return (grey / 65535).astype(np.float32)
    if low < 0 or high > 1:
        grey = (grey - low) / (high - low) if high > low else np.zeros_like(grey)
    return np.nan_to_num(grey).astype(np.float32)


# A file that ends early is damaged: the missing part is not grey.
ImageFile.LOAD_TRUNCATED_IMAGES = False
