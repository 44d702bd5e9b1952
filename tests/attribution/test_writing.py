"""Files that are there whole or not at all."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gradscope.attribution.drawing.writing import output_folder, save_png
from gradscope.errors import OutputError, UsageError


def test_a_png_says_what_it_is_and_is_there_whole_or_not_at_all(tmp_path: Path) -> None:
    image = np.random.default_rng(0).integers(0, 255, (5, 6, 3), dtype=np.uint8)

    save_png(tmp_path / "a.png", image, {"Title": "Köter → 5"})

    with Image.open(tmp_path / "a.png") as read:
        assert (np.asarray(read) == image).all()
        assert read.info["Title"] == "Köter → 5"
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]
    with pytest.raises(OutputError, match="cannot be written"):
        save_png(tmp_path / "no" / "a.png", image, {})


def test_an_output_folder_is_made_with_its_parents_or_refused(tmp_path: Path) -> None:
    assert output_folder(tmp_path / "a" / "b").is_dir()
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match=r"--output .*file"):
        output_folder(tmp_path / "file")
