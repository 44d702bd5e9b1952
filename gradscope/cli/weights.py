"""``gradscope weights``."""

from __future__ import annotations

from typing import Annotated

import typer

from gradscope.cli import options as o


def weights(
    checkpoints: Annotated[
        list[str],
        typer.Argument(
            metavar="CKPT...",
            help="A .safetensors, .pt, .pth, .bin, .ckpt, .pt2, .npz, an index or a folder.",
            show_default=False,
        ),
    ],
    format_: o.Format = "table",
    report: o.Reports = None,
    fail_on: o.FailOnOption = o.FailOn("high"),
    select: o.Select = None,
    ignore: o.Ignore = None,
    include: Annotated[
        list[str] | None,
        typer.Option(metavar="GLOB", help="Only tensors with such names (repeatable)."),
    ] = None,
    exclude: Annotated[
        list[str] | None,
        typer.Option(metavar="GLOB", help="No tensors with such names (repeatable)."),
    ] = None,
    key: Annotated[
        str | None,
        typer.Option(
            metavar="PATH", help="Which nested dict is the state dict, e.g. model.state_dict."
        ),
    ] = None,
    headers_only: Annotated[
        bool,
        typer.Option(
            "--headers-only", help="Read no data: names, shapes and consistency, in milliseconds."
        ),
    ] = False,
    allow_empty: o.AllowEmpty = False,
    keep_going: o.KeepGoing = False,
    device: o.Device = "cpu",
    jobs: o.Jobs = None,
    seed: o.Seed = 0,
    quiet: o.Quiet = False,
    verbose: o.Verbose = False,
    color: o.ColorOption = o.Color.AUTO,
    no_progress: o.NoProgress = False,
    debug: o.Debug = False,
) -> int:
    """Statistics, outliers, dead units, numerics and health of checkpoints of any size."""
    selected, ignored = o.split_commas(select), o.split_commas(ignore)
    o.check_request(format_, selected, ignored)
    reports = o.parse_reports(report)
    from gradscope.cli.terminal import load_compiler, progress_bar

    if not headers_only:
        load_compiler()
    from gradscope.weights.analysis import analyze_weights

    with progress_bar("reading", wanted=not (no_progress or quiet)) as tick:
        result = analyze_weights(
            *checkpoints,
            key=key,
            include=include or (),
            exclude=exclude or (),
            headers_only=headers_only,
            select=selected,
            ignore=ignored,
            fail_on=fail_on.value,
            allow_empty=allow_empty,
            keep_going=keep_going,
            device=device,
            jobs=jobs,
            progress=tick,
        )
    if "table" in (format_, *(name for name, _ in reports)):
        from gradscope.weights import table as _table  # noqa: F401  registers what it shows

    o.publish(result, format_, reports, color.value, detail=2 if verbose else 0 if quiet else 1)
    return result.gate.exit_code
