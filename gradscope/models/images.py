"""Pictures: found, read, turned upright, in three channels."""

from __future__ import annotations

import hashlib
import io
import re
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError

from gradscope.errors import InputError
from gradscope.models.picture_files import decodable, split_frame
from gradscope.text import plural

Array = npt.NDArray[np.generic]
#: What Pillow keeps in more than eight bits a pixel.
_DEEP = ("I", "I;16", "I;16B", "I;16L", "I;16N", "F")
_NPY = b"\x93NUMPY"
#: Above the size of any picture within Pillow's limit of pixels.
_LARGEST = 2**30


@dataclass(frozen=True, eq=False, slots=True)
class Picture:
    """An upright picture: uint8, or float32 in 0..1 for more than 8 bits.

    It has three channels, or the bands of the file where a model takes four or more.
    """

    path: str
    format: str
    #: Pillow's mode of the file, before the conversion to RGB.
    mode: str
    bytes: int
    sha256: str
    #: [H, W, C]
    pixels: Array
    #: What was read of it, where that was a choice.
    notes: tuple[str, ...] = ()

    @property
    def height(self) -> int:
        """Pixels down."""
        return int(self.pixels.shape[0])

    @property
    def width(self) -> int:
        """Pixels across."""
        return int(self.pixels.shape[1])

    def rgb(self) -> npt.NDArray[np.uint8]:
        """The picture for display, uint8 [H, W, 3]; of more bands the first three."""
        shown = self.pixels[:, :, :3]
        if shown.dtype == np.uint8:
            return shown.astype(np.uint8, copy=False)
        return np.clip(np.rint(shown.astype(np.float64) * 255), 0, 255).astype(np.uint8)


def open_image(path: str, channels: int = 3) -> Picture:
    """A picture of any format that Pillow reads, or an array [H, W, C] or [C, H, W] in an ``.npy``.

    ``photo.gif#3`` is a frame of an animation, or a page; otherwise the first is read, and noted.
    EXIF orientation is applied; colour profiles are not. Transparent pixels lie over white. Grey
    pictures get three equal channels; 16 bits keep their depth, 65535 becoming 1, or 4095 where no
    value is above (12-bit sensors). 32-bit integers are read as 16-bit where they fit, floats as
    0..1 or 0..255; anything else is scaled by its own range. NaN becomes black. For four and more
    ``channels`` the bands of the file are read as they are.

    Raises InputError for files that are missing, damaged, too large or not pictures, for a frame
    that does not exist, and where there are fewer bands than channels.
    """
    file, frame = split_frame(path)
    data = _bytes(path, file)
    try:
        with warnings.catch_warnings():
            # Pillow warns from half of the size that it refuses; large photographs are that big.
            warnings.simplefilter("ignore")
            if data.startswith(_NPY):
                array = np.load(io.BytesIO(data), allow_pickle=False)
                kind, mode, pixels, notes = "NPY", str(array.dtype), *_bands(array, channels)
            else:
                with Image.open(io.BytesIO(data), formats=decodable()) as image:
                    kind, mode = image.format or "?", image.mode
                    which = _at_frame(image, path, frame)
                    pixels, notes = _pixels(_upright(image), channels)
                    notes = (*which, *notes)
    except InputError:
        raise
    except Image.DecompressionBombError as error:
        raise InputError(
            path, "unsupported", f"it is too large for a model's input ({error}); shrink it"
        ) from None
    except UnidentifiedImageError:
        raise InputError(path, "malformed", _unknown(data)) from None
    # Pillow's plugins raise any exception that their parsing meets.
    except Exception as error:
        cause = str(error) or type(error).__name__
        raise InputError(
            path,
            "truncated" if "truncated" in cause.lower() else "malformed",
            f"it cannot be decoded ({cause}); download or save it again",
        ) from None
    if pixels.shape[2] < channels:
        raise InputError(
            path,
            "unsupported",
            f"it has {plural(pixels.shape[2], 'band')}, the model takes {channels}; an .npy holds "
            "any number, [H, W, C]",
        )
    digest = hashlib.sha256(data).hexdigest()
    return Picture(path, kind, mode, len(data), digest, pixels, notes)


def _at_frame(image: Image.Image, path: str, frame: int | None) -> tuple[str, ...]:
    """Go to a frame; a note where there was a choice. Raises InputError."""
    count = getattr(image, "n_frames", 1)
    if frame is not None and frame >= count:
        there = f"#0 to #{count - 1}" if count > 1 else "#0"
        raise InputError(
            path, "missing", f"no such frame; it has {plural(count, 'frame')}, {there}"
        )
    if frame is not None:
        image.seek(frame)
    # A phone's second picture is a map of depth or brightness.
    if frame is not None or count == 1 or image.format == "MPO":
        return ()
    return (f"the first of {count} frames is read; {path}#{count - 1} names the last",)


def _bytes(path: str, file: str) -> bytes:
    try:
        with Path(file).open("rb") as stream:
            data = stream.read(_LARGEST + 1)
    except FileNotFoundError:
        raise InputError(path, "missing", "file not found") from None
    except IsADirectoryError:
        raise InputError(path, "missing", "it is a folder; name a picture in it") from None
    except OSError as error:
        raise InputError(path, "missing", f"it cannot be read ({error.strerror})") from None
    # A name that contains NUL.
    except ValueError as error:
        raise InputError(path, "missing", f"not a valid file name ({error})") from None
    if not data:
        raise InputError(path, "truncated", "the file is empty; download or save it again")
    if len(data) > _LARGEST:
        raise InputError(path, "unsupported", "it is larger than 1 GiB: not a picture")
    return data


def _upright(image: Image.Image) -> Image.Image:
    # First of all: some decoders fail only once, and leave black pixels.
    image.load()
    try:
        return ImageOps.exif_transpose(image)
    # Damaged metadata does not make the pixels unreadable; Pillow has many errors for it.
    except Exception:
        return image


_CONVERT = "convert it to PNG or JPEG"
#: Other files that are mistaken for pictures: how they begin, and what to say.
_OTHERS: tuple[tuple[re.Pattern[bytes], str], ...] = (
    (re.compile(rb".*<svg|<\?xml", re.DOTALL), "it is a drawing (SVG or XML); export it as PNG"),
    (
        re.compile(rb"<html|<!doctype|<head"),
        "it is a web page, probably from a failed download; download the picture itself",
    ),
    (
        re.compile(rb"version https://git-lfs"),
        "it is a Git LFS pointer; fetch the file with `git lfs pull`",
    ),
    (
        re.compile(rb".{4}ftyp(hei|hev|mif1|msf1|avi[fs])", re.DOTALL),
        f"it is HEIC or AVIF, which this Pillow does not read; {_CONVERT}",
    ),
    (
        re.compile(rb"%pdf|%!ps|\xc5\xd0\xd3\xc6|\xd7\xcd\xc6\x9a"),
        "it is a document or a drawing (PDF, PostScript or WMF); export it as PNG",
    ),
)


def _unknown(data: bytes) -> str:
    start = data[:512].removeprefix(b"\xef\xbb\xbf").lower()
    for begins, said in _OTHERS:
        if begins.match(start) or begins.match(start.lstrip()):
            return said
    return f"it is not a picture that Pillow can read; {_CONVERT}"


#: How many bands the modes have that do not become colours where more than three are asked for.
_BANDED = ("RGBA", "CMYK", "RGBX")


def _pixels(image: Image.Image, channels: int) -> tuple[Array, tuple[str, ...]]:
    if image.mode in _DEEP:
        grey, notes = _deep(np.asarray(image), image.mode)
        return np.repeat(grey[:, :, None], 3, axis=2), notes
    if channels > 3 and image.mode in _BANDED:
        return np.asarray(image), ()
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image)
    return np.asarray(image.convert("RGB")), ()


def _bands(array: Array, channels: int) -> tuple[Array, tuple[str, ...]]:
    """An array's bands as the last axis: the one that is as long as channels are asked for."""
    if array.ndim == 2:
        array = np.repeat(array[:, :, None], 3, axis=2)
    if array.ndim != 3 or not array.size:
        raise ValueError(f"an array of {list(array.shape)}, not [H, W, C] or [C, H, W]")
    if array.shape[2] != channels and (
        array.shape[0] == channels or array.shape[0] < min(array.shape[1:])
    ):
        array = array.transpose(1, 2, 0)
    if array.dtype == np.uint8:
        return np.ascontiguousarray(array), ()
    if array.dtype.kind not in "iuf":
        raise ValueError(f"an array of {array.dtype}, not of numbers")
    return _deep(
        array, "I;16" if array.dtype == np.uint16 else "I" if array.dtype.kind in "iu" else "F"
    )


#: What 12-bit sensors make of white.
_TWELVE_BITS = 4095.0


def _deep(values: Array, mode: str) -> tuple[npt.NDArray[np.float32], tuple[str, ...]]:
    """More than eight bits as 0..1, and a note where that was a choice."""
    grey = values.astype(np.float64)
    numbers = grey[np.isfinite(grey)]
    if not numbers.size:
        raise ValueError("no pixel is finite")
    low, high = float(numbers.min()), float(numbers.max())
    tops = (65535.0,) if mode.startswith("I") else (1.0, 255.0)
    twelve = mode.startswith("I") and low >= 0 and 255 < high <= _TWELVE_BITS
    fitting = (top for top in tops if low >= 0 and high <= top)
    top = _TWELVE_BITS if twelve else next(fitting, None)
    low, high = (low, high) if top is None else (0.0, top)
    scaled = (grey - low) / (high - low) if high > low else np.zeros_like(grey)
    notes = ("no value is above 4095: 12-bit data in 16 bits, white is 4095",) if twelve else ()
    return np.clip(np.nan_to_num(scaled), 0, 1).astype(np.float32), notes
