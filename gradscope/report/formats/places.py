"""Where a finding is shown by what knows only files and lines: code scanning, annotations."""

from __future__ import annotations

import re
from pathlib import PurePosixPath
from posixpath import join, normpath

from gradscope.report.formats import Display
from gradscope.report.severity import Severity

#: GitHub's three levels.
LEVELS = {
    Severity.CRITICAL: "error",
    Severity.HIGH: "error",
    Severity.MEDIUM: "warning",
    Severity.LOW: "note",
    Severity.INFO: "note",
}


def place(input_: str, display: Display) -> str:
    """The file of a finding: the anchor or the input, as a relative path with slashes.

    Below the root where it lies there; else its own path without what makes it absolute or leads
    out, for GitHub rejects a whole upload over one absolute path.
    """
    path = (display.anchor or input_).replace("\\", "/")
    root = display.root.replace("\\", "/")
    whole = PurePosixPath(normpath(join(root, path)))
    if root and whole.is_relative_to(normpath(root)):
        return str(whole.relative_to(normpath(root)))
    return re.sub(r"^([A-Za-z]:)?/+|^(\.\./)+", "", normpath(path)) or "."
