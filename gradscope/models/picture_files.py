"""Which files are pictures, in which order, and which frame of one is meant."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path

from PIL import Image

from gradscope.errors import InputError

#: Formats that Pillow recognises but does not decode by itself: EPS would start Ghostscript, the
#: others need a handler from the caller.
_NOT_DECODED = frozenset({"EPS", "WMF", "MPEG", "BUFR", "GRIB", "HDF5"})
#: How the common formats begin, for files without a telling suffix.
_STARTS = re.compile(rb"\x89PNG\r\n\x1a\n|\xff\xd8\xff|GIF8[79]a|RIFF....WEBP", re.DOTALL)


def find_images(paths: Sequence[str]) -> Iterator[str]:
    """Files as given; for a folder, every picture in it and below, img2 before img10.

    A picture has a suffix that Pillow knows, or begins like a PNG, JPEG, GIF or WebP. Hidden
    files and folders are left out. Raises InputError for a folder without pictures.
    """
    for path in paths:
        if not os.path.isdir(path):
            yield path
            continue
        found = sorted((p for p in _below(Path(path)) if _is_picture(p)), key=_natural)
        if not found:
            raise InputError(
                path,
                "missing",
                "no pictures found in this folder; name a file, or another folder",
            )
        yield from map(str, found)


def _below(folder: Path) -> Iterator[Path]:
    for path in folder.rglob("*"):
        if path.is_file() and not any(p.startswith(".") for p in path.relative_to(folder).parts):
            yield path


@cache
def _suffixes() -> frozenset[str]:
    return frozenset(
        suffix for suffix, kind in Image.registered_extensions().items() if kind in decodable()
    )


@cache
def decodable() -> tuple[str, ...]:
    """The formats that Pillow decodes by itself."""
    Image.init()
    return tuple(kind for kind in Image.ID if kind not in _NOT_DECODED)


def _is_picture(path: Path) -> bool:
    if path.suffix.lower() in _suffixes():
        return True
    try:
        with path.open("rb") as file:
            return _STARTS.match(file.read(16)) is not None
    except OSError:
        return False


def _natural(path: Path) -> list[tuple[int, str]]:
    """A sort key: runs of digits compare as numbers, of any length, letters ignoring case."""
    runs = re.findall(r"([0-9]+)|([^0-9]+)", str(path))
    key = [(len(d.lstrip("0")), d.lstrip("0")) if d else (-1, t.casefold()) for d, t in runs]
    return [*key, (-1, str(path))]


def split_frame(path: str) -> tuple[str, int | None]:
    """The file and the frame in ``photo.gif#3``, counted from 0; None where none is named."""
    found = re.fullmatch(r"(.+)#([0-9]{1,6})", path, re.DOTALL)
    if found is None or os.path.exists(path):
        return path, None
    return found[1], int(found[2])
