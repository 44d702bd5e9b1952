"""Sections: reports that take their place in a text that somebody else has written.

A format whose text is a section (``section``) is written into the file that is there. Its marks
stand on lines of their own, which no name in a report can.
"""

from __future__ import annotations

import re
from pathlib import Path

from gradscope.errors import OutputError

_SECTION = re.compile(r"<!-- ([\w-]+):begin -->\n.*<!-- \1:end -->\n", re.DOTALL)


def section(name: str, text: str) -> str:
    """A text between the marks of a section."""
    return f"<!-- {name}:begin -->\n{text}\n<!-- {name}:end -->\n"


def placed(text: str, path: Path) -> str:
    """What to write at a path: the text, or the file that is there with the section in its place.

    The section takes the place of the one of its name, else it stands at the end. Raises
    OutputError for a file that is no text, or whose marks are not one pair.
    """
    found = _SECTION.fullmatch(text)
    if not found or not path.is_file():
        return text
    try:
        old = path.read_bytes().decode()
    except OSError as error:
        raise OutputError(path, error.strerror or str(error)) from error
    except UnicodeDecodeError as error:
        raise OutputError(path, "is not UTF-8 text; a section cannot be put into it") from error
    return _put(text.replace("\n", "\r\n") if "\r\n" in old else text, found[1], old, path)


def _put(text: str, name: str, old: str, path: Path) -> str:
    begins, ends = (
        list(re.finditer(rf"^<!-- {name}:{mark} -->[ \t]*(?:\r?\n|\Z)", old, re.MULTILINE))
        for mark in ("begin", "end")
    )
    if not begins and not ends:
        line = "\r\n" if "\r\n" in old else "\n"
        return f"{old.rstrip()}{line}{line}{text}" if old.strip() else text
    if len(begins) != 1 or len(ends) != 1 or begins[0].start() > ends[0].start():
        raise OutputError(
            path,
            f"has {len(begins)} lines <!-- {name}:begin --> and {len(ends)} <!-- {name}:end -->; "
            "leave one of each, in this order, or none",
        )
    return old[: begins[0].start()] + text + old[ends[0].end() :]
