"""A history in a notebook: what run it is, and what was recorded of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from typing import TYPE_CHECKING

import numpy as np

from gradscope.notebook import name, shown, table, words
from gradscope.text import listed, plural, size

if TYPE_CHECKING:
    from gradscope.histories.history import History

#: Parts that were not read, of which each is named.
_MOST = 10


def history_html(history: History) -> str:
    """Format, steps, layers, the statistics that are there, and what its reader notes."""
    return shown(
        f"<p><strong>gradient history</strong> {name(history.path)}</p>",
        table((), ((words(what), value) for what, value in _facts(history))),
    )


def _facts(history: History) -> Iterator[tuple[str, str]]:
    records, layers = history.shape
    yield "format", f"{words(history.format)}, {size(history.nbytes)}"
    span = f", {history.steps[0]:,} … {history.steps[-1]:,}" if records else ""
    yield "steps", f"{plural(records, 'record')}{span}"
    yield "layers", f"{layers:,}: {listed((name(layer.name) for layer in history.layers), layers)}"
    yield "recorded", words(", ".join(_arrays(history)))
    yield "topology", words(history.topology)
    if history.loss is not None and np.isfinite(history.loss).any():
        known = history.loss[np.isfinite(history.loss)]
        yield "loss", f"{known[0]:.4g} → {known[-1]:.4g}"
    yield from (("note", words(note)) for note in history.notes)
    for subject, reason in history.skipped_parts[:_MOST]:
        yield "not read", f"{name(subject)}: {words(reason)}"
    if rest := len(history.skipped_parts[_MOST:]):
        yield "not read", f"{plural(rest, 'part')} more, in <code>.skipped_parts</code>"
    for failed in history.failures:
        yield "not read in full", words(failed.message)


def _arrays(history: History) -> Iterator[str]:
    """The statistics that this history has, by the names of its fields."""
    for each in fields(history):
        value = getattr(history, each.name)
        if isinstance(value, np.ndarray) and each.name not in ("steps", "status"):
            yield each.name
    yield from (n for n in ("sketches", "exact") if getattr(history, n) is not None)
