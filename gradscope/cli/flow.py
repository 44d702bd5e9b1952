"""``gradscope flow``."""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

from gradscope.cli.command import Reported, analysis
from gradscope.cli.following import followed, shown_on_stdout
from gradscope.cli.options import Gate, Output
from gradscope.formats import supported

if TYPE_CHECKING:
    from gradscope.flow.result import FlowReport


class By(StrEnum):
    """What one row is."""

    LAYER = "layer"
    PARAM = "param"


class As(StrEnum):
    """What plain arrays hold."""

    NORMS = "norms"
    VECTORS = "vectors"


class Rows(StrEnum):
    """How much of the series the report holds."""

    RECENT = "recent"
    ALL = "all"


@analysis
def flow(
    history: Annotated[
        str,
        typer.Argument(
            metavar="HISTORY",
            help=f"{supported('history')}, or a folder of them; recognised by content.",
            show_default=False,
        ),
    ],
    *,
    as_: Annotated[
        As | None, typer.Option("--as", help="What plain arrays are, when that cannot be seen.")
    ] = None,
    by: Annotated[By, typer.Option(help="One row a module, or one a parameter.")] = By.LAYER,
    window: Annotated[
        int, typer.Option(min=8, metavar="N", help="Records that a windowed statistic rests on.")
    ] = 32,
    from_step: Annotated[
        int | None, typer.Option("--from", metavar="STEP", help="Only records from this step on.")
    ] = None,
    to_step: Annotated[
        int | None, typer.Option("--to", metavar="STEP", help="Only records up to this step.")
    ] = None,
    threshold: Annotated[
        float | None,
        typer.Option(
            metavar="X",
            help="Also list layers whose norm exceeds this, beside the scale-free tests.",
        ),
    ] = None,
    series: Annotated[
        Rows, typer.Option(help="Every record in the report, or the last 100,000 rows.")
    ] = Rows.RECENT,
    against: Annotated[
        str | None,
        typer.Option(metavar="HISTORY", help="Another run: also tell what differs from it."),
    ] = None,
    follow: Annotated[
        bool, typer.Option("--follow", help="Go on as the run is recorded, until Ctrl-C.")
    ] = False,
    output: Output,
    gate: Gate,
) -> Reported:
    """Where gradients vanish, explode, die or oscillate in a recorded run, and since when."""
    from gradscope.cli.terminal import working
    from gradscope.flow.analysis import analyze_flow

    def analysed() -> FlowReport:
        return analyze_flow(
            history,
            as_=as_.value if as_ is not None else None,
            by=by.value,
            window=window,
            from_step=from_step,
            to_step=to_step,
            all_series=series is Rows.ALL,
            threshold=threshold,
            against=against,
            **gate.wanted,
        )

    if follow:
        return followed(history, analysed, shown_on_stdout(output))
    with working("analysing", wanted=output.progress):
        return analysed()
