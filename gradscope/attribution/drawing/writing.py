"""Pictures as files, and the folder they go to."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from gradscope.attribution.drawing.colour import Pixels
from gradscope.errors import UsageError
from gradscope.files import write_whole


def output_folder(output: str | Path) -> Path:
    """The folder, made where it does not exist. Raises UsageError where that fails."""
    path = Path(output)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--output {path}: {error.strerror or error}") from error
    return path


def save_png(path: str | Path, image: Pixels, metadata: Mapping[str, str]) -> None:
    """Write a PNG whole or not at all. Raises OutputError where it cannot be written."""
    info = PngInfo()
    for key, value in metadata.items():
        info.add_itxt(key, value.encode("utf-8", "replace").decode())
    write_whole(path, lambda stream: Image.fromarray(image).save(stream, "PNG", pnginfo=info))
