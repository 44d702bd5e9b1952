"""The options that commands share, as records: a command's parameter of such a type becomes the
record's options (``cli.command``).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from typing import Annotated, Any

import typer

from gradscope.cli import completion
from gradscope.errors import UsageError
from gradscope.report.formats import BUILT_IN
from gradscope.report.palettes import PALETTES
from gradscope.report.severity import Severity
from gradscope.text import quoted

FailOn = StrEnum("FailOn", [*((s.name, s.value) for s in Severity), ("NEVER", "never")])  # type: ignore[misc]


class Color(StrEnum):
    """When to colour."""

    AUTO = "auto"
    ALWAYS = "always"
    NEVER = "never"


class Listing(StrEnum):
    """How commands that only list something show it."""

    TABLE = "table"
    JSON = "json"


class Trust(StrEnum):
    """What may run code while it is loaded."""

    PICKLE = "pickle"


ListFormat = Annotated[Listing, typer.Option("--format", "-f", help="How to show it.")]
Device = Annotated[
    str,
    typer.Option(
        metavar="DEVICE",
        help="cpu, cuda, cuda:1 or auto. A device that is absent is an error.",
        autocompletion=completion.devices,
    ),
]
Jobs = Annotated[
    int | None,
    typer.Option(
        "--jobs",
        "-j",
        min=1,
        metavar="N",
        help="Threads; by default one per core. Results do not depend on it.",
    ),
]
Shard = Annotated[
    str | None,
    typer.Option(
        "--shard",
        metavar="I/N",
        help="Measure one share of N, I from 0 on, for a partial report that `gradscope merge` "
        "joins with the others.",
    ),
]


class EngineName(StrEnum):
    """What spreads the work."""

    LOCAL = "local"
    RAY = "ray"


Engine = Annotated[
    EngineName,
    typer.Option("--engine", help="Threads of this machine, or the Ray cluster it belongs to."),
]
KeepGoing = Annotated[
    bool,
    typer.Option(
        "--keep-going",
        help="When a file fails while it is read, analyse the rest of its checkpoint.",
    ),
]

AcceptedIn = Annotated[
    str | None,
    typer.Option(
        "--baseline", metavar="FILE", help="Accepted findings, which fail nothing until worse."
    ),
]
ConfigFrom = Annotated[
    list[str] | None,
    typer.Option(
        "--config",
        metavar="FILE|KEY=VALUE",
        help="A configuration file in the place of gradscope.toml, or one value (repeatable).",
    ),
]
Isolated = Annotated[
    bool, typer.Option("--isolated", help="Look for no configuration file.", show_default=False)
]


@dataclass(frozen=True)
class Output:
    """Where the report goes, and how it looks."""

    format_: Annotated[
        str,
        typer.Option(
            "--format",
            "-f",
            metavar="FORMAT",
            help=f"What stdout carries: {', '.join(BUILT_IN)}.",
            autocompletion=completion.formats,
        ),
    ] = "table"
    report: Annotated[
        list[str] | None,
        typer.Option(
            "--report",
            metavar="FORMAT=PATH",
            help="Also write a report to a file, its main chart (svg=PATH, png=PATH), or into a "
            "tracker's folder: tensorboard=DIR, wandb=DIR (repeatable).",
            autocompletion=completion.reports,
        ),
    ] = None
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Findings and verdict only.")] = False
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Every tensor and every finding.")
    ] = False
    color: Annotated[Color, typer.Option("--color", help="Colour the table.")] = Color.AUTO
    colors: Annotated[
        str,
        typer.Option(
            metavar="SCHEME",
            help=f"Colours of pages and charts: {', '.join(PALETTES)}.",
            autocompletion=completion.palettes,
        ),
    ] = "default"
    no_progress: Annotated[bool, typer.Option("--no-progress", help="No progress bar.")] = False
    sarif_anchor: Annotated[
        str | None,
        typer.Option(
            "--sarif-anchor",
            metavar="FILE",
            help="Where SARIF and annotations stand: a text file of the repository, such as the "
            "pointer or the configuration of a model that is not in it.",
        ),
    ] = None

    @property
    def detail(self) -> int:
        """0 findings and verdict, 1 the usual, 2 everything."""
        return 2 if self.verbose else 0 if self.quiet else 1

    @property
    def progress(self) -> bool:
        """Whether progress may be shown."""
        return not (self.no_progress or self.quiet)


@dataclass(frozen=True)
class Gate:
    """Which rules are evaluated, and when the run fails."""

    fail_on: Annotated[
        FailOn | None,
        typer.Option(
            "--fail-on",
            help="Exit 1 when a finding is at least this severe. [default: high]",
            show_default=False,
        ),
    ] = None
    select: Annotated[
        list[str] | None,
        typer.Option(
            metavar="RULE",
            help="Only these rules: codes, prefixes or names (repeatable, commas).",
            autocompletion=completion.rules,
        ),
    ] = None
    ignore: Annotated[
        list[str] | None,
        typer.Option(
            metavar="RULE",
            help="Not these rules (repeatable, commas).",
            autocompletion=completion.rules,
        ),
    ] = None
    allow_empty: Annotated[
        bool, typer.Option("--allow-empty", help="Exit 0, not 4, when there is nothing to analyse.")
    ] = False
    baseline: AcceptedIn = None
    config: ConfigFrom = None
    isolated: Isolated = False

    @cached_property
    def wanted(self) -> dict[str, Any]:
        """As the functions of the Python API take it. Raises UsageError for the configuration."""
        return {
            "fail_on": None if self.fail_on is None else self.fail_on.value,
            "select": split_commas(self.select),
            "ignore": split_commas(self.ignore),
            "allow_empty": self.allow_empty,
            "baseline": self.baseline,
            "config": self._configuration[0],
        }

    @property
    def files(self) -> Iterator[str]:
        """The files that it reads, over which nothing may be written."""
        config, origins = self._configuration
        yield from filter(None, (self.baseline, config.baseline))
        yield from set(origins.values())

    @cached_property
    def _configuration(self) -> tuple[Any, Mapping[tuple[str, ...], str]]:
        from gradscope.cli.configuration import in_force

        return in_force(self.config or (), self.isolated)


@dataclass(frozen=True)
class Tensors:
    """Which tensors of a checkpoint are looked at, and how far."""

    include: Annotated[
        list[str] | None,
        typer.Option(metavar="GLOB", help="Only tensors with such names (repeatable)."),
    ] = None
    exclude: Annotated[
        list[str] | None,
        typer.Option(metavar="GLOB", help="No tensors with such names (repeatable)."),
    ] = None
    key: Annotated[
        str | None,
        typer.Option(
            metavar="PATH", help="Which nested dict is the state dict, e.g. model.state_dict."
        ),
    ] = None
    headers_only: Annotated[
        bool,
        typer.Option(
            "--headers-only", help="Read no data: names, shapes and consistency, in milliseconds."
        ),
    ] = False

    @property
    def wanted(self) -> dict[str, Any]:
        """As the functions of the Python API take it."""
        return {
            "include": self.include or (),
            "exclude": self.exclude or (),
            "key": self.key,
            "headers_only": self.headers_only,
        }


@dataclass(frozen=True)
class Model:
    """A saved vision model, and how it is loaded."""

    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="TorchScript, .pt2, a state dict (with --arch), or a pickled module (--trust).",
            show_default=False,
        ),
    ]
    arch: Annotated[
        str | None,
        typer.Option(
            metavar="MODULE:FACTORY",
            help="The code of a state dict: package.module:factory or file.py:factory, with "
            "options in brackets: resnet18(num_classes=10); timm:NAME, torchvision:NAME, "
            "transformers:AUTO.",
        ),
    ] = None
    key: Annotated[
        str | None,
        typer.Option(
            metavar="PATH",
            help="Which nested dict is the state dict, or what its tensors' names begin with.",
        ),
    ] = None
    trust: Annotated[
        list[Trust] | None,
        typer.Option(metavar="pickle", help="Load a pickled module, which runs code of the file."),
    ] = None
    preprocess: Annotated[
        str | None,
        typer.Option(
            metavar="HOW",
            help="imagenet, a preprocessor_config.json, or key=value pairs: "
            "image_mean=0.5/0.5/0.5,image_std=0.5/0.5/0.5,size=224.",
        ),
    ] = None

    @property
    def loading(self) -> dict[str, Any]:
        """How it is loaded, as the functions of the Python API take it."""
        return {
            "arch": self.arch,
            "key": self.key,
            "trust": [t.value for t in self.trust or ()],
            "preprocess": self.preprocess,
        }


Labels = Annotated[
    str | None, typer.Option(metavar="FILE", help="Class names: text, JSON, or a config.json.")
]
Folder = Annotated[
    str, typer.Option("--output", "-o", metavar="DIR", help="Where pictures and arrays go.")
]


def split_commas(values: Sequence[str] | None) -> list[str]:
    """``--select A,B --select C`` as one list."""
    return [part.strip() for value in values or () for part in value.split(",") if part.strip()]


_UNITS = {"": 1, "s": 1, "m": 60, "h": 3600}


def seconds(option: str, text: str) -> float:
    """``60``, ``60s``, ``1.5m``, ``1h`` in seconds. Raises UsageError for anything else."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?|\.\d+)\s*([smh]?)", text.strip().lower())
    if found is None or float(found[1]) == 0:
        raise UsageError(f"{option} takes a time above 0, as 60s or 5m, not {quoted(text)}")
    return float(found[1]) * _UNITS[found[2]]
