"""The tables of ``--spectral``: what the singular values of each matrix and each attention say."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.console import RenderableType
from rich.text import Text

from gradscope.report.formats import Display
from gradscope.report.formats.cells import number, table
from gradscope.text import shortened
from gradscope.weights.names import pattern
from gradscope.weights.result import AttentionResult, SpectrumResult, TensorResult

_SHOWN = 24


def spectra(
    tensors: Sequence[TensorResult], display: Display, rest: str = "-v shows every matrix"
) -> Iterator[RenderableType]:
    """A row for each matrix; on a terminal one for those of one place of different layers.

    ``rest`` says where the rows are that are left out.
    """
    brief = display.width is not None and display.detail < 2
    groups: dict[object, list[tuple[TensorResult, SpectrumResult]]] = {}
    for t in tensors:
        if t.spectrum is not None:
            key = (pattern(t.name), t.shape) if brief else t.name
            groups.setdefault(key, []).append((t, t.spectrum))
    shown = list(groups.values())[: _SHOWN if brief else None]
    yield Text("\nSpectra")
    made = table(
        ("tensor", "left"), ("shape", "left"), "norm", "as map", "stable rank", "effective rank",
        "alpha", "tail", "edge", "spikes",
    )  # fmt: skip
    for group in shown:
        made.add_row(*_row(group))
    yield made
    if any(s.alpha is not None and not s.alpha_reliable for group in shown for _, s in group):
        yield Text("? alpha of fewer than 50 values in the tail, or ruled out", style="dim")
    if more := len(groups) - len(shown):
        yield Text(f"… {more:,} more rows; {rest}", style="dim")


def _row(group: Sequence[tuple[TensorResult, SpectrumResult]]) -> Iterator[str]:
    """Of several the ranges."""
    tensor, _ = group[0]
    found = [s for _, s in group]
    many = f"  ×{len(group)}" if len(group) > 1 else ""
    yield shortened(pattern(tensor.name) if many else tensor.name) + many
    yield "×".join(map(str, tensor.shape))
    for name in ("spectral_norm", "operator_norm", "stable_rank", "effective_rank"):
        yield _range([getattr(s, name) for s in found])
    yield _range([s.alpha for s in found]) + ("?" if _doubtful(found) else "")
    for name in ("alpha_tail_count", "mp_edge", "spikes"):
        yield _range([getattr(s, name) for s in found])


def _doubtful(found: Sequence[SpectrumResult]) -> bool:
    return any(s.alpha is not None and not s.alpha_reliable for s in found)


def _range(values: Sequence[float | int | None]) -> str:
    known = [v for v in values if v is not None]
    if not known:
        return "–"
    low, high = (_short(f(known)) for f in (min, max))
    return low if low == high else f"{low} … {high}"


def _short(value: float | int) -> str:
    return number(value) if isinstance(value, int) else f"{value:.3g}"


def attentions(
    found: Sequence[AttentionResult], display: Display, rest: str = "-v shows each"
) -> Iterator[RenderableType]:
    """A row for each attention whose heads are known; on a terminal one for those of all layers."""
    brief = display.width is not None and display.detail < 2
    groups: dict[object, list[AttentionResult]] = {}
    for a in found:
        key = (pattern(a.module), a.heads, a.head_size) if brief else a.module
        groups.setdefault(key, []).append(a)
    yield Text("\nAttention")
    made = table(
        ("attention", "left"), "heads", "size", "norm", "compares in", "query rank", "key rank",
        "value rank", "logit rms", "logit bound",
    )  # fmt: skip
    shown = list(groups.values())[: _SHOWN if brief else None]
    for group in shown:
        made.add_row(*_attention_row(group))
    yield made
    if more := len(groups) - len(shown):
        yield Text(f"… {more:,} more rows; {rest}", style="dim")


def _attention_row(group: Sequence[AttentionResult]) -> Iterator[str]:
    """The ranges over the heads of all of them."""
    first = group[0]
    many = f"  ×{len(group)}" if len(group) > 1 else ""
    yield shortened(pattern(first.module) if many else first.module) + many
    shared = f" ({first.key_heads} shared)" if first.key_heads < first.heads else ""
    yield f"{first.heads}{shared}"
    yield str(first.head_size)
    for name in ("qk_norms", "effective_ranks", "query_ranks", "key_ranks", "value_ranks",
                 "logit_rms", "logit_bounds"):  # fmt: skip
        yield _range([value for a in group for value in getattr(a, name) or ()])
