"""Who may import whom, read from the source."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import gradscope

ROOT = Path(gradscope.__file__).parent

#: What each part may import of the others; ``cli`` may import anything.
ALLOWED = {
    "containers": set(),
    "checkpoints": {"containers"},
    "statistics": {"checkpoints"},
    "quantization": {"containers", "checkpoints", "statistics"},
    "report": set(),
    "casts": {"checkpoints", "statistics"},
    "spectra": {"checkpoints", "statistics"},
    "weights": {"casts", "spectra", "checkpoints", "statistics", "quantization", "report"},
    # What tensors are for, and where they stand, is known there.
    "drift": {"checkpoints", "statistics", "quantization", "report", "weights"},
    "fingerprints": {"containers", "checkpoints", "statistics", "report", "weights"},
    "histories": {"containers", "checkpoints", "statistics"},
    "flow": {"histories", "report"},
    "recording": {"histories"},
    "models": {"containers", "checkpoints"},
    "attribution": {"models", "report"},
}


#: What everything stands on.
FLOOR = {
    *(
        "compiled",
        "device",
        "docstrings",
        "errors",
        "files",
        "formats",
        "notebook",
        "plugins",
        "text",
        "version",
    )
}


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def test_data_flows_from_sources_to_the_report_and_never_back() -> None:
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for part, allowed in ALLOWED.items()
        for path in (ROOT / part).rglob("*.py")
        for name in imports(path)
        if name.startswith("gradscope.") and name.split(".")[1] not in allowed | {part, *FLOOR}
    ]

    assert wrong == []


def test_only_the_command_line_prints_reads_the_environment_or_exits() -> None:
    forbidden = {"print", "input", "exit"}
    wrong = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in ROOT.rglob("*.py")
        if path.relative_to(ROOT).parts[0] not in ("cli", "__main__.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if (isinstance(node, ast.Call) and getattr(node.func, "id", "") in forbidden)
        or (isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv", "_exit"))
    ]

    assert wrong == []


def test_nothing_but_the_command_line_imports_the_root_package() -> None:
    wrong = [
        str(path.relative_to(ROOT))
        for path in ROOT.rglob("*.py")
        if path.parent != ROOT and "gradscope" in imports(path)
    ]

    assert wrong == []
