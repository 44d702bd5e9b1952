"""What ``gradscope verify`` shows of its result in a table."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import RenderableType
from rich.text import Text

from gradscope.fingerprints.result import VerifyResult
from gradscope.report.formats import Display
from gradscope.report.formats.cells import table
from gradscope.text import escaped, shortened

_SHOWN = 24


def verify(result: VerifyResult, display: Display) -> Iterator[RenderableType]:
    """How many match, then those that do not."""
    counts = "  ".join(f"{count:,} {status}" for status, count in result.counts.items())
    yield Text.assemble(("\nagainst ", "dim"), escaped(result.manifest), "  ", counts)
    differing = [t for t in result.tensors if t.status != "match"]
    brief = display.width is not None and display.detail < 2
    shown = differing[:_SHOWN] if brief else differing
    if shown:
        made = table(("tensor", "left"), ("status", "left"), ("dtype", "left"), ("shape", "left"))
        for t in shown:
            shape = "×".join(map(str, t.shape or ())) or "scalar"
            made.add_row(shortened(t.name), t.status, t.dtype or "–", shape)
        yield Text("")
        yield made
    if len(differing) > len(shown):
        rest = len(differing) - len(shown)
        yield Text(f"… {rest:,} more tensors differ; -v shows every one", style="dim")
