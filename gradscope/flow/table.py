"""What ``gradscope flow`` shows of its result in a table."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from rich.console import RenderableType
from rich.text import Text

from gradscope.flow.records.against import Against
from gradscope.flow.records.layers import LayerFlow
from gradscope.flow.records.network import CriticalPath
from gradscope.flow.result import FlowResult
from gradscope.report.formats import Display
from gradscope.report.formats.cells import facts, number, table
from gradscope.text import escaped, listed, plural, shortened

_SHOWN = 40
_PATHS = 3
#: Characters of a curve of losses.
_LOSSES = 40
_DIFFERING = 12
_NARROW_NAME = 30
#: Perceptually ordered, dark to bright; the glyph says the same without colour.
_HEAT = ("#440154", "#46327e", "#365c8d", "#277f8e", "#1fa187", "#4ac16d", "#a0da39", "#fde725")
_SHADES = " ░▒▓█"
_ASCII_SHADES = " .:*#"


def flow(result: FlowResult, display: Display) -> Iterator[RenderableType]:
    """Notes, the network, its layers, layers over time, the critical paths."""
    for note in result.notes:
        yield Text.assemble(("note ", "dim"), escaped(note))
    if result.steps:
        yield Text("")
        yield _network(result) if result.layers else _losses(result, display)
    if result.layers and result.steps:
        yield from _layers(result.layers, display)
        yield from _heatmap(result.layers, display)
        yield from _paths(result.critical_paths, display)
    if result.against is not None:
        yield from _against(result.against, display)


def _against(found: Against, display: Display) -> Iterator[RenderableType]:
    """What differs from another run: numbers, findings, and the layers at another level."""
    span = f", steps {found.first_step}–{found.last_step}"
    yield Text(f"\nAgainst {shortened(found.input)}{span}", style="bold")
    yield facts(dict(_pairs(found)))
    for change in found.findings:
        was, now = (severity or "none" for severity in (change.there, change.here))
        yield Text(f"  {change.name} {shortened(change.subject)}: {now}, there {was}")
    for where, names in (("here", found.only_here), ("there", found.only_there)):
        if names:
            yield Text(f"  only {where}: {listed(map(shortened, names), len(names), most=5)}")
    differing = sorted((d for d in found.layers if d.differs), key=lambda d: -abs(d.level or 0))
    if not differing:
        yield Text("  no layer's gradient level differs", style="dim")
        return
    shown = differing if display.width is None or display.detail > 1 else differing[:_DIFFERING]
    made = table(("layer", "left"), "gradient", "spread", "update")
    for layer in shown:
        made.add_row(
            shortened(layer.layer_name),
            *(_factor(value) for value in (layer.level, layer.spread, layer.update)),
        )
    yield made
    if len(differing) > len(shown):
        yield Text(f"… {len(differing) - len(shown):,} more; -v shows every one", style="dim")


def _pairs(found: Against) -> Iterator[tuple[str, str]]:
    for name, pair in (("loss", found.loss), ("efficiency", found.efficiency)):
        if pair.here is not None or pair.there is not None:
            yield name, f"{number(pair.here)}, there {number(pair.there)}"
    for onset in found.onsets:
        yield f"{onset.kind} since", f"{_onset(onset.here)}, there {_onset(onset.there)}"


def _onset(onset: tuple[int | None, int] | None) -> str:
    return "never" if onset is None else f"step {onset[1]}"


def _factor(decades: float | None) -> str:
    return "–" if decades is None else f"×{10**decades:.2g}"


def _span(result: FlowResult) -> str:
    return f"{result.first_step}–{result.last_step} ({plural(result.steps, 'record')})"


def _losses(result: FlowResult, display: Display) -> Text:
    """A run of which nothing but losses is known."""
    shown = {"steps": _span(result)}
    logged = result.curves.loss if result.curves is not None else None
    known = [value for value in logged or () if value is not None]
    if known:
        shown["loss"] = f"{number(known[0])} → {number(known[-1])}"
        shown["over time (log)"] = trace(known, _LOSSES, display.unicode)
    return facts(shown)


def _network(result: FlowResult) -> Text:
    metrics = result.network.metrics
    shown = {
        "steps": _span(result),
        "layers": f"{len(result.layers):,}",
        "topology": result.topology,
    }
    if result.depth is not None:
        shown["per layer"] = f"×{math.exp(-result.depth.nats_per_layer):.2g} towards the input"
    if metrics.overall_flow_efficiency is not None:
        shown["efficiency"] = f"{metrics.overall_flow_efficiency:.2g}"
    if metrics.network_connectivity is not None:
        shown["connectivity"] = f"{metrics.network_connectivity:.0%}"
    if metrics.flow_stability is not None:
        shown["stability"] = f"{metrics.flow_stability:.2f}"
    return facts(shown)


def _layers(layers: Sequence[LayerFlow], display: Display) -> Iterator[RenderableType]:
    """One row a layer from the input to the loss; a long network on a terminal in part."""
    brief = display.width is not None and display.detail < 2
    shown = layers[:_SHOWN] if brief else layers
    wide = display.width is None or display.width >= 110
    made = table(
        ("layer", "left"), "parameters", "norm", "vs loss side", "update", "steady", "direction",
        ("norm over time (log)", "left"),
    )  # fmt: skip
    for flow in shown:
        made.add_row(
            _label(flow.layer_name, narrow=not wide),
            number(flow.numel),
            number(_last(flow)),
            _decades(flow.deficit),
            "–" if flow.update_ratio is None else f"{flow.update_ratio:.1e}",
            "–" if flow.stability_score is None else f"{flow.stability_score:.2f}",
            flow.flow_direction,
            trace(flow.gradient_magnitudes, 24 if wide else 12, display.unicode),
        )
    yield Text("")
    yield made
    if len(layers) > len(shown):
        rest = len(layers) - len(shown)
        yield Text(f"… {rest:,} more layers; -v shows every one", style="dim")


def _label(name: str, narrow: bool) -> str:
    """A layer's name, of a long one its end: that is where names differ."""
    shown = shortened(name) or "(root)"
    return "…" + shown[1 - _NARROW_NAME :] if narrow and len(shown) > _NARROW_NAME else shown


def _last(flow: LayerFlow) -> float | None:
    return flow.gradient_magnitudes[-1] if flow.gradient_magnitudes else None


def _decades(deficit: float | None) -> str:
    return "–" if deficit is None else f"10^{-deficit:+.1f}"


def _logs(values: Sequence[float | None], bins: int) -> list[float]:
    """Mean log10 by bin of time; minus infinity where all is zero, NaN where nothing is known."""
    count = min(bins, len(values))
    out = []
    for i in range(count):
        part = values[i * len(values) // count : (i + 1) * len(values) // count]
        positive = [math.log10(v) for v in part if v is not None and math.isfinite(v) and v > 0]
        lost = any(v is not None and not math.isfinite(v) for v in part)
        zero = any(v == 0 for v in part)
        out.append(
            math.inf if lost
            else sum(positive) / len(positive) if positive
            else -math.inf if zero
            else math.nan
        )  # fmt: skip
    return out


def trace(values: Sequence[float | None], bins: int, unicode: bool = True) -> str:
    """A logarithmic sparkline: ``!`` not finite, ``_`` zero, a blank unknown.

    A layer whose norm stays within a factor of two is drawn flat.
    """
    logs = _logs(values, bins)
    finite = [v for v in logs if math.isfinite(v)]
    blocks = "▁▂▃▄▅▆▇█" if unicode else ".,:-=+*#"
    low, high = min(finite, default=0.0), max(finite, default=0.0)
    span = max(high - low, math.log10(2))
    return "".join(_mark(v) or blocks[min(7, int((v - low) / span * 7.99))] for v in logs)


def _mark(value: float) -> str:
    if math.isnan(value):
        return " "
    return "!" if value == math.inf else "_" if value == -math.inf else ""


def _heatmap(layers: Sequence[LayerFlow], display: Display) -> Iterator[RenderableType]:
    """Layers by time, each cell the RMS gradient on one scale for all: where and when it fades."""
    if display.width is None or len(layers) < 2:
        return
    bins = max(10, min(64, display.width - _NARROW_NAME - 4))
    rows = [(flow.layer_name, _logs(_rms(flow), bins)) for flow in layers]
    rows = _thinned(rows, _SHOWN)
    finite = [v for _, logs in rows for v in logs if math.isfinite(v)]
    if not finite:
        return
    low, high = min(finite), max(finite)
    yield Text("\nRMS gradient, layers from input (top) to loss × time", style="bold")
    for name, logs in rows:
        line = Text(f"{_label(name, narrow=True):<{_NARROW_NAME}}  ")
        for value in logs:
            line.append_text(_cell(value, low, high, display))
        yield line
    yield _legend(low, high, display)


def _rms(flow: LayerFlow) -> list[float | None]:
    root = math.sqrt(flow.numel or 1)
    return [None if v is None else v / root for v in flow.gradient_magnitudes]


def _thinned(rows: list[tuple[str, list[float]]], most: int) -> list[tuple[str, list[float]]]:
    """Every n-th layer, so that the picture keeps its shape."""
    step = -(-len(rows) // most)
    return rows[::step] if step > 1 else rows


def _cell(value: float, low: float, high: float, display: Display) -> Text:
    if mark := _mark(value):
        return Text(mark, style="bold red" if mark == "!" else "dim")
    share = (value - low) / (high - low) if high > low else 1.0
    if display.colour and display.unicode:
        return Text("█", style=_HEAT[min(7, int(share * 7.99))])
    shades = _SHADES if display.unicode else _ASCII_SHADES
    return Text(shades[1 + min(3, int(share * 3.99))])


def _legend(low: float, high: float, display: Display) -> Text:
    line = Text(" " * (_NARROW_NAME + 2) + f"1e{low:.0f} ", style="dim")
    for i in range(8):
        line.append_text(_cell(low + (high - low) * i / 7, low, high, display))
    return line.append(f" 1e{high:.0f}   _ zero  ! not finite", style="dim")


def _paths(paths: Sequence[CriticalPath], display: Display) -> Iterator[RenderableType]:
    known = [path for path in paths if path.criticality_score is not None]
    shown = known if display.width is None or display.detail > 1 else known[:_PATHS]
    if shown:
        yield Text("\nWidest paths from the loss", style="bold")
    for path in shown:
        names = [shortened(name) for name in path.layers]
        way = names if len(names) <= 6 else [*names[:3], "…", *names[-2:]]
        weak = (
            ""
            if path.weakest_link is None
            else f"weakest link {' → '.join(map(shortened, path.weakest_link))}, "
        )
        yield Text.assemble(
            f"  {' ← '.join(way)}",
            (f"  {weak}criticality {path.criticality_score:.2f}", "dim"),
        )
