"""What a page shows below the findings: charts, tables and pictures, as data.

A wing says what there is to look at (``page.py`` beside its ``result.py``); how a page is laid out
and themed is the format's. Colours are named, not given: ``@@high`` becomes the palette's own, for
a light page, a dark one or a picture.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gradscope.report.model import AnyReport
from gradscope.report.shown import shown_in
from gradscope.text import escaped

#: A Vega-Lite specification.
Spec = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Chart:
    """A Vega-Lite chart. The first of a page is the one that ``png`` and ``svg`` show."""

    title: str
    #: What a reader who has never seen such a chart must know.
    caption: str
    spec: Spec


@dataclass(frozen=True, slots=True)
class Column:
    """A column of a ``Grid``; numbers are aligned right, and missing ones sorted last."""

    title: str
    number: bool = True
    #: How numbers are written: "g" with four digits, "%" as a share, "," as a count.
    form: str = "g"


@dataclass(frozen=True, slots=True)
class Row:
    """The cells of a row, and what opens below it."""

    cells: Sequence[Any]
    #: Names and values that have no column.
    more: Sequence[tuple[str, Any]] = ()
    #: Counts of a histogram, and what its ends are.
    bars: Sequence[int] = ()
    ends: tuple[float | None, float | None] = (None, None)


@dataclass(frozen=True, slots=True)
class Grid:
    """A table that can be sorted and searched."""

    title: str
    caption: str
    columns: Sequence[Column]
    rows: Sequence[Row]


@dataclass(frozen=True, slots=True)
class Picture:
    """Images of one size, one above the other: ``below`` and, as opaque as wanted, ``above``."""

    title: str
    caption: str
    #: PNG or JPEG files; one that is not there any more is said to be missing.
    below: str
    above: str | None


@dataclass(frozen=True, slots=True)
class Gallery:
    """Pictures side by side, with one slider for what lies above."""

    title: str
    caption: str
    pictures: Sequence[Picture]


Panel = Chart | Grid | Gallery


def inline(rows: Sequence[Mapping[str, Any]]) -> Any:
    """Rows as the data of an Altair chart."""
    from altair import Data

    return Data(values=rows)  # type: ignore[no-untyped-call]


def panels_of(report: AnyReport) -> Iterator[Panel]:
    """What a command shows of its result on a page."""
    section = shown_in(report, "page")
    if section is not None:
        yield from section(report.result)


def plain(value: Any) -> Any:
    """A value as JSON can write it and any reader may be shown it: names without control
    characters, numbers that are not finite as the report spells them.
    """
    if isinstance(value, str):
        return escaped(value)
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value
