"""``merge``: the parts of a run that several jobs shared, joined into its report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from gradscope.saved import read_report
from gradscope.version import __version__

if TYPE_CHECKING:
    from gradscope.report.config import ConfigLike
    from gradscope.report.model import AnyReport

#: Each command whose runs can be shared, and what joins their parts.
MERGERS: Mapping[str, str] = {
    "weights": "gradscope.weights.joining:merged",
    "drift": "gradscope.drift.parts:merged",
}


def merge(
    *parts: str | Path,
    select: Sequence[str] = (),
    ignore: Sequence[str] = (),
    fail_on: str | None = None,
    allow_empty: bool = False,
    config: ConfigLike = None,
    baseline: str | Path | None = None,
) -> AnyReport:
    """The report of one run, of the JSON reports of all its parts (``--shard``), in any order.

    It is the report that one job would have written, to the byte; the checkpoint is not needed.
    What rules find is decided here: ``select`` to ``baseline`` are those of the analyses,
    and the parts' own count for nothing.

    Raises InputError for a part that is missing, there twice, damaged, or of another run, and
    UsageError for what is wrong with the options.
    """
    from gradscope.report.partial import complete

    found = complete([(str(path), read_report(path)) for path in parts], __version__)
    module, _, name = MERGERS[found[0].report.command].partition(":")
    joined: AnyReport = getattr(import_module(module), name)(
        found,
        select=select,
        ignore=ignore,
        fail_on=fail_on,
        allow_empty=allow_empty,
        config=config,
        baseline=baseline,
    )
    return joined
