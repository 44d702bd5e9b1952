"""Formats: one module each, a function ``render(report, display) -> str``.

A third party adds one through the entry point group ``gradscope.formats``; its name is the
format's, its object the function.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from gradscope.errors import UsageError
from gradscope.plugins import load, plugins

#: The built-in formats and the modules they live in, imported when one is asked for.
BUILT_IN: Mapping[str, str] = {
    name: f"gradscope.report.formats.{name.replace('-', '_')}_"
    for name in (
        *("table", "json", "jsonl", "csv", "markdown", "github", "sarif", "junit", "html"),
        "model-card",
    )
}


#: What the pages and pictures of the extra ``html`` are made with.
_EXTRA = ("altair", "jinja2", "markupsafe", "vl_convert")
#: Pictures of the main chart, for ``--report`` alone.
PICTURES: Mapping[str, str] = {name: f"gradscope.report.formats.{name}_" for name in ("svg", "png")}
#: Experiment trackers that a report can be added to, for ``--report`` alone, and their libraries.
TRACKERS: Mapping[str, str] = {"tensorboard": "tensorboardX", "wandb": "wandb"}


@dataclass(frozen=True, slots=True)
class Display:
    """Where a report will be shown. The default is a file: no colour, nothing cut off."""

    #: Columns of a terminal; None off a terminal.
    width: int | None = None
    colour: bool = False
    unicode: bool = True
    #: 0 findings and verdict, 1 the usual, 2 every tensor.
    detail: int = 1
    #: The folder that paths in annotations are relative to.
    root: str = ""
    #: The text file that annotations are shown at; by default the input itself.
    anchor: str | None = None
    #: Of a page and its charts: a name of ``palettes``.
    colors: str = "default"


FILE = Display()

#: A report, and where it will be shown (by default in a file), as text; a PNG as bytes.
Render = Callable[..., str]


def format_names() -> list[str]:
    """Every format, built-in first."""
    return [*BUILT_IN, *(point.name for point in plugins("formats"))]


def renderer(name: str, pictures: bool = False) -> Render:
    """The function of a format, or of a picture. Raises UsageError when there is none."""
    built_in = {**BUILT_IN, **PICTURES} if pictures else BUILT_IN
    if name in built_in:
        try:
            render: Render = import_module(built_in[name]).render
        except ModuleNotFoundError as error:
            if error.name not in _EXTRA:
                raise
            raise UsageError(
                f"{name} needs {error.name}: pip install 'gradscope-diagnostics[html]'"
            ) from None
        return render
    if name in PICTURES:
        raise UsageError(f"a picture goes into a file: --report {name}=chart.{name}")
    if name in TRACKERS:
        raise UsageError(f"a run of {name} goes into a folder: --report {name}=DIR")
    found = {point.name: point for point in plugins("formats")}
    if name not in found:
        known = (*format_names(), *((*PICTURES, *TRACKERS) if pictures else ()))
        raise UsageError(f"unknown format {name!r}; choose from {', '.join(known)}")
    render_plugin: Any = load("formats", found[name])
    return lambda report, display=FILE: render_plugin(report, display)
