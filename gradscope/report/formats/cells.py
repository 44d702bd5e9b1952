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
        wraps = heading in ("tensor", "layer", "target")
        # Half a number would read as another one.
        cut = "fold" if wraps else "ellipsis"
        made.add_column(heading, justify=justify, no_wrap=not wraps, overflow=cut)  # type: ignore[arg-type]
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
        count = len(self.headings)
        titles = [heading for heading, _ in self.headings]
        rows = [titles, *([str(cell) for cell in row[:count]] for row in self.rows)]
        columns = list(zip(*rows, strict=True))
        # Measuring a cell costs as much as reading its row: once for each character does as well.
        narrow = all(cell_len(c) == 1 for c in set().union(*map("".join, columns)))
        widths = [max(map(len if narrow else cell_len, column)) for column in columns]
        left = [justify == "left" for _, justify in self.headings]
        signs = ["<" if at else ">" for at in left]
        row_format = "  ".join(f"{{:{s}{w}}}" for s, w in zip(signs, widths, strict=True)).format
        for row in rows:
            if narrow:
                yield row_format(*row).rstrip()
            else:
                cells = zip(row, widths, left, strict=True)
                yield "  ".join(_padded(*cell) for cell in cells).rstrip()


def _padded(cell: str, width: int, left: bool) -> str:
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
