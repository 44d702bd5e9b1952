"""What ``gradscope weights`` shows of its result in a pull request: what was asked for beside the
statistics, which a reader of findings has no use for.
"""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import RenderableType

from gradscope.report.formats import Display
from gradscope.weights.cast_table import casts
from gradscope.weights.result import WeightsResult
from gradscope.weights.spectral_table import attentions, spectra

#: As brief as on a terminal.
_BRIEF = Display(width=100)


def weights(result: WeightsResult) -> Iterator[RenderableType]:
    """The tables of casts, of spectra and of attentions."""
    if result.casting is not None:
        yield from casts(result.casting, result.tensors, _BRIEF)
    if any(t.spectrum is not None for t in result.tensors):
        yield from spectra(result.tensors, _BRIEF, rest="the JSON report has every matrix")
    if result.attention:
        yield from attentions(result.attention, _BRIEF, rest="the JSON report has each")
