"""The command line: one module per command; the only code that prints, reads the environment
or exits. This module imports typer and nothing heavier, so that ``--help`` costs nothing.
"""

from __future__ import annotations

import gc
from pathlib import Path

import typer

from gradscope.cli import (
    baseline,
    config,
    doctor,
    drift,
    explain,
    flow,
    layers,
    manifest,
    merge,
    methods,
    render,
    rules,
    schema,
    visualize,
    weights,
)
from gradscope.cli.terminal import end_process, hold_streams, say
from gradscope.docstrings import docstring
from gradscope.environment import NAMESAKE, installed
from gradscope.errors import OutputError
from gradscope.version import DISTRIBUTION, __version__

app = typer.Typer(
    name="gradscope",
    help="Diagnostics for neural networks: checkpoints, gradient histories, attributions.",
    epilog=(
        "Exit codes: 0 nothing at or above --fail-on, 1 the gate failed, 2 wrong request, "
        "3 an input is missing, malformed or unsafe, 4 nothing was analysed, 70 a bug, "
        "130 interrupted."
    ),
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for run in (
    weights.weights,
    merge.merge,
    drift.drift,
    manifest.manifest,
    manifest.verify,
    flow.flow,
    explain.explain,
    visualize.visualize,
    layers.layers,
    methods.methods,
    rules.rules,
    schema.schema,
    render.render,
    baseline.baseline,
    config.config,
    doctor.doctor,
):
    said = docstring(run)
    app.command(run.__name__, help=said, short_help=said.split("\n", 1)[0])(run)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"gradscope {__version__}")
        if other := installed(NAMESAKE):
            typer.echo(
                f"(from {DISTRIBUTION}, in {Path(__file__).parents[1]}; the distribution "
                f"{NAMESAKE} {other} is installed too, and either may own the command)"
            )
        raise typer.Exit


@app.callback()
def gradscope(
    _: bool = typer.Option(
        False, "--version", callback=_version, is_eager=True, help="Print the version and exit."
    ),
) -> None:
    """Diagnostics for neural networks: checkpoints, gradient histories, attributions."""


def main() -> None:
    """Run the program and exit with the codes of contract.md §2."""
    # A short run makes little cyclic garbage, and looking for it costs a fifth of a second.
    gc.disable()
    hold_streams()
    code = 0
    try:
        app()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except OSError as error:  # what typer prints itself, such as --help on a full disk
        say(f"error: stdout cannot be written: {error.strerror or error}")
        code = OutputError.exit_code
    end_process(code)
