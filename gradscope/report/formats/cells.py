"""What the sections of the table format are made of."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from rich.cells import cell_len
from rich.table import Table
from rich.text import Text

_STATUS = {
    "excellent": "green",
    "good": "green",
    "fair": "yellow",
    "poor": "red",
    "critical": "bold red",
}


def table(*columns: str | tuple[str, str]) -> Table:
    """A borderless table; a column is a heading or (heading, "left" or "right")."""
    made = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for column in columns:
        heading, justify = (column, "right") if isinstance(column, str) else column
        wraps = heading in ("tensor", "layer")
        made.add_column(heading, justify=justify, no_wrap=not wraps, overflow="fold")  # type: ignore[arg-type]
    return made


@dataclass(frozen=True, slots=True)
class Grid:
    """A table as lines of plain text, for a file: laid out at once, however many rows it has.

    Rich measures and wraps every cell, which takes a millisecond a row.
    """

    headings: Sequence[tuple[str, str]]
    rows: Sequence[Sequence[str | Text]]

    def lines(self) -> Iterator[str]:
        """The heading and the rows, as Rich would draw them where nothing wraps."""
        columns = len(self.headings)
        rows = [[str(cell) for cell in row[:columns]] for row in self.rows]
        titles = [heading for heading, _ in self.headings]
        widths = [max(map(_width, column)) for column in zip(titles, *rows, strict=True)]
        left = [justify == "left" for _, justify in self.headings]
        for row in (titles, *rows):
            cells = zip(row, widths, left, strict=True)
            yield "  ".join(_padded(cell, width, at) for cell, width, at in cells).rstrip()


def _width(cell: str) -> int:
    return len(cell) if cell.isascii() else cell_len(cell)


def _padded(cell: str, width: int, left: bool) -> str:
    if cell.isascii():
        return cell.ljust(width) if left else cell.rjust(width)
    space = " " * (width - cell_len(cell))
    return cell + space if left else space + cell


def number(value: float | int | None) -> str:
    """Four significant digits, or a dash for what is undefined."""
    return "–" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def sparkline(counts: Sequence[float], unicode: bool = True) -> str:
    """A small drawing of some counts, one character each."""
    if not counts:
        return ""
    blocks = " ▁▂▃▄▅▆▇█" if unicode else " .:-=+*#@"
    top = max(counts) or 1
    return "".join(blocks[0 if c == 0 else max(1, round(c / top * 8))] for c in counts)


def health_text(score: float, status: str) -> Text:
    """A health score in the colour of its band."""
    return Text(f"{score:.0f} {status}", style=_STATUS[status])


def facts(items: Mapping[str, str]) -> Text:
    """Names and values on one line."""
    return Text("  ").join(Text.assemble((f"{k} ", "dim"), v) for k, v in items.items())
