"""``gradscope layers``."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from gradscope.cli.command import command
from gradscope.cli.options import Device, ListFormat, Listing, Model
from gradscope.cli.terminal import emit, without_prints


@command
def layers(
    model: Model,
    all_: Annotated[
        bool, typer.Option("--all", help="Every layer, not only those worth trying.")
    ] = False,
    format_: ListFormat = Listing.TABLE,
    device: Device = "cpu",
) -> int:
    """The layers that --layer accepts, with shapes, and which one auto takes and why."""
    from gradscope.models.layers import shortlist
    from gradscope.models.vision import open_vision

    with without_prints():
        found, choice = open_vision(model.model, device=device, **model.loading).survey()
    shown = [layer for layer in found if all_ or layer.layout is not None]
    chosen = None if choice is None else choice.layer.name
    if format_ is Listing.JSON:
        rows = [_record(layer, chosen) for layer in shown]
        reason = None if choice is None else choice.reason
        emit(json.dumps({"layers": rows, "auto": chosen, "reason": reason}, indent=1) + "\n")
        return 0
    short = found if all_ else shortlist(found, choice)
    emit("".join(_lines(short, chosen)))
    if len(short) < len(found):
        emit(f"  and {len(found) - len(short)} more: --all\n")
    if choice is None:
        emit("\nauto: none; methods that read no layer work on this model\n")
    else:
        emit(f"\nauto: {choice.layer.name}, {choice.reason}\n")
    return 0


def _lines(shown: list[Any], chosen: str | None) -> list[str]:
    names = [layer.name + (f" (×{layer.calls})" if layer.calls > 1 else "") for layer in shown]
    wide = max([len(name) for name in names] + [5])
    shapes = ["×".join(map(str, layer.shape[1:])) for layer in shown]
    tall = max([len(shape) for shape in shapes] + [5])
    lines = [f"  {'layer':<{wide}}  {'shape':<{tall}}  {'gradient':>8}  over the image\n"]
    for layer, name, shape in zip(shown, names, shapes, strict=True):
        mark = "→" if layer.name == chosen else " "
        received = "–" if layer.receives is None else f"{layer.receives:.0%}"
        place = str(layer.layout) if layer.layout else "–"
        lines.append(f"{mark} {name:<{wide}}  {shape:<{tall}}  {received:>8}  {place}\n")
    return lines


def _record(layer: Any, chosen: str | None) -> dict[str, Any]:
    return {
        "name": layer.name,
        "shape": list(layer.shape),
        "layout": None if layer.layout is None else layer.layout.kind,
        "grid": None if layer.layout is None else list(layer.layout.grid),
        "prefix_tokens": None if layer.layout is None else layer.layout.prefix,
        "calls": layer.calls,
        "receives_gradient": layer.receives,
        "auto": layer.name == chosen,
    }
