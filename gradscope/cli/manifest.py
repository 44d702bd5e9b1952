"""``gradscope manifest`` and ``gradscope verify``."""

from __future__ import annotations

from typing import Annotated

import typer

from gradscope.cli.command import Reported, analysis, command
from gradscope.cli.options import Gate, Jobs, Output
from gradscope.formats import CHECKPOINT, supported

Key = Annotated[
    str | None,
    typer.Option(
        metavar="PATH", help="Which nested dict is the state dict, e.g. model.state_dict."
    ),
]


@command
def manifest(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL", help=f"{supported(*CHECKPOINT)}, or a folder.", show_default=False
        ),
    ],
    *,
    key: Key = None,
    jobs: Jobs = None,
    no_progress: Annotated[bool, typer.Option("--no-progress", help="No progress bar.")] = False,
) -> int:
    """The fingerprint of every tensor as a JSON document: type, shape, hash, histogram."""
    from gradscope.cli.terminal import emit, progress_bar
    from gradscope.fingerprints.analysis import manifest as made
    from gradscope.fingerprints.document import written

    with progress_bar("hashing", wanted=not no_progress) as tick:
        found = made(model, key=key, jobs=jobs, progress=tick)
    emit(written(found))
    return 0


@analysis
def verify(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL",
            help="Checkpoints, or manifests of them: those of the ranks of one run.",
            show_default=False,
        ),
    ],
    *,
    manifest: Annotated[
        str, typer.Option(metavar="FILE", help="What `gradscope manifest` printed.")
    ],
    key: Key = None,
    jobs: Jobs = None,
    output: Output,
    gate: Gate,
) -> Reported:
    """Whether checkpoints are what a manifest recorded; a flipped bit names its tensor."""
    from gradscope.cli.terminal import progress_bar
    from gradscope.fingerprints.analysis import verify as verified

    with progress_bar("hashing", wanted=output.progress) as tick:
        return verified(
            *models, manifest=manifest, key=key, jobs=jobs, progress=tick, **gate.wanted
        )
