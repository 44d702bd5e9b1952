"""``gradscope flow``."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

from gradscope.cli import options as o


class By(StrEnum):
    """What one row is."""

    LAYER = "layer"
    PARAM = "param"


class As(StrEnum):
    """What plain arrays hold."""

    NORMS = "norms"
    VECTORS = "vectors"


class Series(StrEnum):
    """How much of the series the report holds."""

    RECENT = "recent"
    ALL = "all"


def flow(
    history: Annotated[
        str,
        typer.Argument(
            metavar="HISTORY",
            help="A recording (.npz or its folder), arrays of norms or gradients (.npz, "
            ".safetensors, .pt), CSV, JSON lines, Parquet, TensorBoard events, trainer_state.json.",
            show_default=False,
        ),
    ],
    format_: o.Format = "table",
    report: o.Reports = None,
    fail_on: o.FailOnOption = o.FailOn("high"),
    select: o.Select = None,
    ignore: o.Ignore = None,
    as_: Annotated[
        As | None, typer.Option("--as", help="What plain arrays are, when that cannot be seen.")
    ] = None,
    by: Annotated[By, typer.Option(help="One row a module, or one a parameter.")] = By.LAYER,
    window: Annotated[
        int, typer.Option(min=8, help="Records that a windowed statistic rests on.")
    ] = 32,
    from_step: Annotated[
        int | None, typer.Option("--from", metavar="STEP", help="Only records from this step on.")
    ] = None,
    to_step: Annotated[
        int | None, typer.Option("--to", metavar="STEP", help="Only records up to this step.")
    ] = None,
    threshold: Annotated[
        float | None,
        typer.Option(help="Also list layers whose norm exceeds this, beside the scale-free tests."),
    ] = None,
    series: Annotated[
        Series, typer.Option(help="Every record in the report, or the last 100,000 rows.")
    ] = Series.RECENT,
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
    """Where gradients vanish, explode, die or oscillate in a recorded run, and since when."""
    selected, ignored = o.split_commas(select), o.split_commas(ignore)
    o.check_request(format_, selected, ignored)
    reports = o.parse_reports(report)
    from gradscope.cli.terminal import load_compiler, working

    if device != "cpu":
        from gradscope.statistics.device import resolve

        resolve(device)
    load_compiler()
    from gradscope.flow.analysis import analyze_flow

    with working("analysing", wanted=not (no_progress or quiet)):
        result = analyze_flow(
            history,
            as_=as_.value if as_ is not None else None,
            by=by.value,
            window=window,
            from_step=from_step,
            to_step=to_step,
            all_series=series is Series.ALL,
            threshold=threshold,
            select=selected,
            ignore=ignored,
            fail_on=fail_on.value,
            allow_empty=allow_empty,
        )
    if "table" in (format_, *(name for name, _ in reports)):
        from gradscope.flow import table as _table  # noqa: F401  registers what it shows

    o.publish(result, format_, reports, color.value, detail=2 if verbose else 0 if quiet else 1)
    return result.gate.exit_code
