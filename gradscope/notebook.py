"""What notebooks show of an object (``_repr_html_``): headings and tables, escaped, no script."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from gradscope.text import escaped, shortened

_CELL = "text-align:left;vertical-align:top;padding:2px 8px"


def words(text: str) -> str:
    """A message as HTML."""
    return escape(escaped(text, 2000))


def name(text: str) -> str:
    """A name as HTML, in the type of code."""
    return f"<code>{escape(shortened(text))}</code>"


def table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table whose cells are HTML already."""
    top = "".join(f'<th style="{_CELL}">{words(heading)}</th>' for heading in headings)
    body = "".join(
        "<tr>" + "".join(f'<td style="{_CELL}">{cell}</td>' for cell in row) + "</tr>"
        for row in rows
    )
    head = f"<thead><tr>{top}</tr></thead>" if headings else ""
    return f"<table>{head}<tbody>{body}</tbody></table>"


def shown(*parts: str) -> str:
    """HTML parts as one; dollars in names are not typeset as formulas."""
    return f'<div class="tex2jax_ignore mathjax_ignore">{"".join(parts)}</div>'
