"""Files that are written whole or not at all, and the folder they go to."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import BinaryIO

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from gradscope.attribution.drawing.colour import Pixels
from gradscope.errors import UsageError


def output_folder(output: str | Path) -> Path:
    """The folder, made where it does not exist. Raises UsageError where that fails."""
    path = Path(output)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--output {path}: {error.strerror or error}") from error
    return path


def save_png(path: str | Path, image: Pixels, metadata: Mapping[str, str]) -> None:
    """Write a PNG whole or not at all. Raises UsageError where it cannot be written."""
    info = PngInfo()
    for key, value in metadata.items():
        info.add_itxt(key, value.encode("utf-8", "replace").decode())
    write_whole(path, lambda stream: Image.fromarray(image).save(stream, "PNG", pnginfo=info))


def write_whole(path: str | Path, write: Callable[[BinaryIO], object]) -> None:
    """Write a temporary file beside ``path`` and rename it. Raises UsageError naming the file."""
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
