"""Files that are there whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from gradscope.errors import OutputError
from gradscope.files import write_whole


def test_a_write_that_fails_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("old")

    def failing(stream: object) -> None:
        stream.write(b"new")  # type: ignore[attr-defined]
        raise OSError(28, "No space left on device")

    with pytest.raises(OutputError, match=r"a\.csv cannot be written: No space"):
        write_whole(tmp_path / "a.csv", failing)

    assert (tmp_path / "a.csv").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["a.csv"]
