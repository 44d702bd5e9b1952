"""HTML: one file that needs no network: the verdict, findings to filter, charts, tables.

The page is a Jinja2 template with its style and script inside; charts are Vega-Lite, whose
JavaScript comes with vl-convert and is put into the page. Scripts are allowed by their hashes
alone, expressions of charts are interpreted, and every name is text.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, partial
from importlib import resources
from typing import Any

from jinja2 import Environment, StrictUndefined, Template
from markupsafe import Markup
from PIL import Image, ImageOps
from vl_convert import javascript_bundle

from gradscope.report.formats import FILE, Display
from gradscope.report.formats.table_ import counted, grouped
from gradscope.report.model import AnyReport, Fact, Finding
from gradscope.report.palettes import Palette, palette
from gradscope.report.panels import Chart, Gallery, Grid, Panel, Picture, panels_of, plain
from gradscope.report.severity import Severity
from gradscope.text import escaped, listed, shortened, size

#: Longer edge of a picture in the page; screens show no more of several side by side.
_EDGE = 768
#: Kinds of findings, and findings of a kind, that a page holds; nobody reads more.
_FINDINGS = 200
#: Inputs that are named before a reader asks.
_INPUTS = 6


def render(report: AnyReport, display: Display = FILE) -> str:
    """The page; the same bytes for the same report."""
    panels = list(panels_of(report))
    scripts = [_page("page.js")]
    if any(isinstance(panel, Chart) for panel in panels):
        scripts.insert(0, _charts())
    return _template().render(
        report=report,
        gate=report.gate,
        coverage=report.coverage,
        counted=counted(report),
        names=", ".join(shortened(i.path, 60) for i in report.inputs[:3]),
        findings=report.findings,
        groups=grouped(report.findings),
        most=_FINDINGS,
        few=_INPUTS,
        severities=_severities(report.findings),
        rules=sorted({f.name for f in report.findings}),
        inputs=list(dict.fromkeys(f.input for f in report.findings)),
        lines=getattr(report.result, "notes", ()),
        panels=[_shown(panel) for panel in panels],
        skipped=_grouped((s.reason, shortened(s.subject)) for s in report.coverage.skipped),
        absent=_grouped((n.reason, n.rule) for n in report.coverage.not_evaluated),
        style=Markup(_style(palette(display.colors))),
        data=Markup(_data(panels)),
        scripts=[Markup(script) for script in scripts],
        hashes=Markup(" ".join(map(_hash, scripts))),
        shown=partial(shortened, longest=200),
        text=_text,
        fact=_fact,
        size=size,
    )


@cache
def _template() -> Template:
    return Environment(autoescape=True, undefined=StrictUndefined).from_string(_page("page.html"))


def _page(name: str) -> str:
    return resources.files("gradscope.report.formats.page").joinpath(name).read_text("utf-8")


@cache
def _charts() -> str:
    """Vega, Vega-Lite and Vega-Embed as one script."""
    bundle: str = javascript_bundle("window.vegaEmbed = vegaEmbed;")
    return bundle.replace("\r\n", "\n").replace("\r", "\n").replace("</script", "<\\/script")


def _hash(script: str) -> str:
    digest = hashlib.sha256(script.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"


def _style(colours: Palette) -> str:
    light, dark = (
        " ".join(f"--{name}: {value};" for name, value in side.items())
        for side in (colours.light, colours.dark)
    )
    return _page("page.css").replace("{light}", light).replace("{dark}", dark)


def _severities(findings: Iterable[Finding]) -> list[tuple[str, int]]:
    found = [f.severity for f in findings]
    return [(s.value, found.count(s)) for s in reversed(Severity) if s in found]


def _grouped(pairs: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """Reasons, and a few of the names that each is about."""
    names: dict[str, list[str]] = {}
    for reason, name in pairs:
        names.setdefault(reason, []).append(name)
    return [(reason, listed(found, len(found), 6)) for reason, found in names.items()]


def _text(value: object) -> str:
    return escaped(str(value), 4000)


def _fact(value: Fact) -> str:
    return f"{value:.6g}" if isinstance(value, float) else _text(value)


# --- panels ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Shown:
    """A panel as the template reads it."""

    kind: str
    title: str
    caption: str
    rows: int = 0
    pictures: tuple[_Stack, ...] = ()


@dataclass(frozen=True, slots=True)
class _Stack:
    title: str
    caption: str
    below: str | None
    above: str | None
    #: Files that are not there any more.
    missing: str


def _shown(panel: Panel) -> _Shown:
    pictures = panel.pictures if isinstance(panel, Gallery) else ()
    rows = len(panel.rows) if isinstance(panel, Grid) else 0
    kind = type(panel).__name__.lower()
    return _Shown(kind, panel.title, panel.caption, rows, tuple(map(_stack, pictures)))


def _stack(picture: Picture) -> _Stack:
    files = [f for f in (picture.below, picture.above) if f is not None]
    images = {file: _image(file) for file in files}
    return _Stack(
        picture.title,
        picture.caption,
        images[picture.below],
        images[picture.above] if picture.above is not None else None,
        ", ".join(file for file, image in images.items() if image is None),
    )


def _image(path: str) -> str | None:
    """A picture as a data URL, reduced to what a page shows; None where it cannot be read."""
    try:
        with Image.open(path) as opened:
            image = ImageOps.exif_transpose(opened).convert("RGB")
            image.thumbnail((_EDGE, _EDGE))
    except (OSError, ValueError, Image.DecompressionBombError):
        return None
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=88)
    return f"data:image/jpeg;base64,{base64.b64encode(stream.getvalue()).decode()}"


def _data(panels: Iterable[Panel]) -> str:
    """What the script reads. No character of it can end the element that holds it."""
    whole = {"panels": [_given(panel) for panel in panels]}
    text = json.dumps(plain(whole), separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _given(panel: Panel) -> Mapping[str, Any]:
    if isinstance(panel, Chart):
        return {"spec": panel.spec}
    if isinstance(panel, Grid):
        columns = [{"title": c.title, "number": c.number, "form": c.form} for c in panel.columns]
        names = {name: i for i, name in enumerate(dict.fromkeys(_names(panel)))}
        return {"columns": columns, "names": list(names), "rows": list(_rows(panel, names))}
    return {}


def _names(panel: Grid) -> Iterator[str]:
    return (name for row in panel.rows for name, _ in row.more)


def _rows(panel: Grid, names: Mapping[str, int]) -> Iterator[Mapping[str, Any]]:
    """Rows; what opens below one by the numbers of its names, which all rows share."""
    for row in panel.rows:
        yield {
            "cells": [_brief(value) for value in row.cells],
            "more": [(names[name], _brief(value)) for name, value in row.more],
            "bars": row.bars,
            "ends": [_brief(value) for value in row.ends],
        }


def _brief(value: Any) -> Any:
    """Six digits of a number: a page shows four, and the JSON report has all."""
    return float(f"{value:.6g}") if isinstance(value, float) else value
