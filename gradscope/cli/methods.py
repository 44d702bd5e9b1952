"""``gradscope methods``."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from gradscope.cli import completion
from gradscope.cli.command import command
from gradscope.cli.options import ListFormat, Listing
from gradscope.cli.terminal import emit


@command
def methods(
    method: Annotated[
        str | None,
        typer.Argument(
            metavar="[NAME]",
            help="One method.",
            show_default=False,
            autocompletion=completion.methods,
        ),
    ] = None,
    format_: ListFormat = Listing.TABLE,
) -> int:
    """Every attribution method with its reference and its options."""
    from gradscope.attribution import methods as known

    chosen = [known.method_named(method)] if method else list(known.methods().values())
    if format_ is Listing.JSON:
        emit(json.dumps([_record(m) for m in chosen], indent=1) + "\n")
    elif method:
        emit(_described(chosen[0]))
    else:
        emit("".join(f"{m.name:<21} {m.family:<13} {m.summary}\n" for m in chosen))
        emit("\n`gradscope methods NAME` has the reference and the options.\n")
    return 0


def _described(m: Any) -> str:
    lines = [f"{m.name} ({m.family})", "", m.summary, m.reference]
    if m.reads_layer:
        lines += ["", "Reads one layer: --layer NAME (see `gradscope layers MODEL`)."]
    if m.options:
        lines += ["", "Options (--option NAME=VALUE):"]
    for name, option in m.options.items():
        choices = f" ({', '.join(option.choices)})" if option.choices else ""
        lines.append(f"  {name} = {option.default}  {option.help}{choices}")
    return "\n".join(lines) + "\n"


def _record(m: Any) -> dict[str, Any]:
    return {
        "name": m.name,
        "family": m.family,
        "summary": m.summary,
        "reference": m.reference,
        "reads_layer": m.reads_layer,
        "sign": m.sign,
        "options": {
            name: {"default": option.default, "help": option.help, "choices": list(option.choices)}
            for name, option in m.options.items()
        },
    }
