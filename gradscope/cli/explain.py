"""``gradscope explain``."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from enum import StrEnum
from typing import Annotated, Any

import typer

from gradscope.cli import options as o
from gradscope.errors import UsageError


class Trust(StrEnum):
    """What may run code while it is loaded."""

    PICKLE = "pickle"


Arch = Annotated[
    str | None,
    typer.Option(
        metavar="MODULE:FACTORY",
        help="The code of a state dict: package.module:factory or file.py:factory, with options "
        "in brackets: resnet18(num_classes=10).",
    ),
]
Key = Annotated[
    str | None, typer.Option(metavar="PATH", help="Which nested dict is the state dict.")
]
TrustOption = Annotated[
    list[Trust] | None, typer.Option(help="Load a pickled module, which runs code of the file.")
]
Layer = Annotated[
    str, typer.Option(metavar="NAME", help="The layer that CAM methods read (gradscope layers).")
]
Preprocess = Annotated[
    str | None,
    typer.Option(
        metavar="HOW",
        help="imagenet, a preprocessor_config.json, or key=value pairs: "
        "image_mean=0.5/0.5/0.5,image_std=0.5/0.5/0.5,size=224.",
    ),
]
Labels = Annotated[
    str | None, typer.Option(metavar="FILE", help="Class names: text, JSON, or a config.json.")
]


def explain(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="TorchScript, .pt2, a state dict (with --arch), or a pickled module (--trust).",
            show_default=False,
        ),
    ],
    images: Annotated[
        list[str],
        typer.Argument(
            metavar="IMAGE...", help="Pictures and folders of them.", show_default=False
        ),
    ],
    method: Annotated[
        list[str] | None,
        typer.Option(
            "--method", "-m", metavar="M[,M...]", help="See `gradscope methods`. [default: gradcam]"
        ),
    ] = None,
    output: Annotated[
        str,
        typer.Option(
            "--output", "-o", metavar="DIR", help="Where heatmaps, overlays and .npz files go."
        ),
    ] = "explanations",
    arch: Arch = None,
    target: Annotated[
        str, typer.Option(metavar="CLASS", help="An index, a label, top1 or topK.")
    ] = "top1",
    versus: Annotated[
        str | None,
        typer.Option(metavar="CLASS", help="Explain the target rather than this class."),
    ] = None,
    layer: Layer = "auto",
    preprocess: Preprocess = None,
    labels: Labels = None,
    reference: Annotated[
        str | None,
        typer.Option(
            metavar="black|white|mean|blurred|random|FILE",
            help="Where integrated gradients start.",
        ),
    ] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Points on the path of integrated gradients.")
    ] = None,
    tolerance: Annotated[
        float | None,
        typer.Option(help="Refine integrated gradients until they add up this well, e.g. 0.01."),
    ] = None,
    option: Annotated[
        list[str] | None,
        typer.Option(
            "--option",
            "-O",
            metavar="NAME=VALUE",
            help="Any other option of a method (repeatable).",
        ),
    ] = None,
    evaluate: Annotated[
        bool,
        typer.Option("--evaluate", help="Measure what the maps are worth (takes much longer)."),
    ] = False,
    colormap: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="inferno, viridis, jet; coolwarm for signed maps."),
    ] = None,
    key: Key = None,
    trust: TrustOption = None,
    chunk: Annotated[
        int | None, typer.Option(min=1, help="Inputs at a time; by default by memory.")
    ] = None,
    format_: o.Format = "table",
    report: o.Reports = None,
    fail_on: o.FailOnOption = o.FailOn("high"),
    select: o.Select = None,
    ignore: o.Ignore = None,
    allow_empty: o.AllowEmpty = False,
    keep_going: o.KeepGoing = False,
    device: o.Device = "cpu",
    jobs: o.Jobs = None,
    seed: Annotated[int, typer.Option(help="Seed of noise, masks and random references.")] = 0,
    quiet: o.Quiet = False,
    verbose: o.Verbose = False,
    color: o.ColorOption = o.Color.AUTO,
    no_progress: o.NoProgress = False,
    debug: o.Debug = False,
) -> int:
    """Why a vision model answers as it does: heatmaps, and whether to believe them."""
    selected, ignored = o.split_commas(select), o.split_commas(ignore)
    o.check_request(format_, selected, ignored)
    reports = o.parse_reports(report)
    methods = o.split_commas(method) or ["gradcam"]
    given = _options(option, {"reference": reference, "steps": steps, "tolerance": tolerance})
    _check(methods, given)
    from gradscope.cli.terminal import progress_bar, say

    o.use_threads(jobs)
    # A model's own code may print; stdout is the report's.
    bar = progress_bar("explaining", wanted=not (no_progress or quiet), of="share")
    with redirect_stdout(sys.stderr), bar as tick:
        from gradscope.attribution.explain import explain as analyse

        result = analyse(
            model,
            images,
            methods,
            arch=arch,
            key=key,
            trust=[t.value for t in trust or ()],
            target=target,
            versus=versus,
            layer=layer,
            preprocess=preprocess,
            labels=labels,
            output=output,
            colormap=colormap,
            evaluated=evaluate,
            device=device,
            seed=seed,
            chunk=chunk,
            select=selected,
            ignore=ignored,
            fail_on=fail_on.value,
            allow_empty=allow_empty,
            progress=tick,
            **given,
        )
    if "table" in (format_, *(name for name, _ in reports)):
        from gradscope.attribution import table as _table  # noqa: F401  registers what it shows

    o.publish(result, format_, reports, color.value, detail=2 if verbose else 0 if quiet else 1)
    written = [] if result.result is None else [e.files for e in result.result.explanations]
    if written and not quiet:
        say(f"wrote {3 * len(written)} files to {output}")
    return result.gate.exit_code


def _options(pairs: Sequence[str] | None, named: dict[str, Any]) -> dict[str, Any]:
    """Options of methods, values read as JSON where they are."""
    given = {name: value for name, value in named.items() if value is not None}
    for pair in pairs or ():
        name, equals, value = pair.partition("=")
        if not equals:
            raise UsageError(f"--option takes NAME=VALUE, not {pair!r}")
        try:
            given[name.strip().replace("-", "_")] = json.loads(value)
        except ValueError:
            given[name.strip().replace("-", "_")] = value
    return given


def _check(names: Sequence[str], given: dict[str, Any]) -> None:
    """Refuse an unknown method or option before anything heavy is imported."""
    from gradscope.attribution.methods import completed, method_named

    found = [method_named(name) for name in names]
    for option in given:
        if not any(option in method.options for method in found):
            completed(found[0], {option: given[option]})
