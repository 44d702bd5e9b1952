"""Reports that were saved as JSON: which type each command's is, and reading one back."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from gradscope.errors import InputError
from gradscope.text import quoted

if TYPE_CHECKING:
    from pydantic import ValidationError

    from gradscope.report.model import AnyReport

#: Each command that writes reports, and the type of its own.
KINDS: Mapping[str, str] = {
    "weights": "gradscope.weights.result:WeightsReport",
    "drift": "gradscope.drift.result:DriftReport",
    "verify": "gradscope.fingerprints.result:VerifyReport",
    "flow": "gradscope.flow.result:FlowReport",
    "explain": "gradscope.attribution.result:ExplainReport",
    "visualize": "gradscope.attribution.result:VisualizeReport",
}


def kind(command: str) -> Any:
    """The type of a command's report."""
    module, _, name = KINDS[command].partition(":")
    return getattr(import_module(module), name)


def part_kind(command: str) -> Any:
    """The type of the report of one of several jobs."""
    from gradscope.report.partial import PartialReport

    return PartialReport.__class_getitem__(kind(command).__pydantic_generic_metadata__["args"])


def read_report(source: str | Path | IO[bytes]) -> AnyReport:
    """A report that ``--format json`` wrote: the same object, which every format shows the same.

    Raises InputError for a file that is missing, is no report, or was written by a newer version.
    """
    path = str(source) if isinstance(source, str | Path) else "stdin"
    text = _text(path, source)
    try:
        header = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(path, "malformed", f"not JSON: {error}") from error
    command = _command(path, header)
    from pydantic import ValidationError

    try:
        wanted = part_kind(command) if "partial" in header else kind(command)
        report: AnyReport = wanted.model_validate(header)
    except ValidationError as error:
        raise InputError(path, "malformed", _wrong(error)) from error
    return report


def _text(path: str, source: str | Path | IO[bytes]) -> bytes:
    try:
        return Path(path).read_bytes() if isinstance(source, str | Path) else source.read()
    except FileNotFoundError as error:
        raise InputError(path, "missing", "file not found") from error
    except OSError as error:
        raise InputError(path, "missing", error.strerror or str(error)) from error


def _command(path: str, header: object) -> str:
    from gradscope.report.model import SCHEMA_VERSION

    if not isinstance(header, dict) or not isinstance(header.get("tool"), dict):
        raise InputError(
            path, "malformed", "not a report of gradscope; write one with --report json=FILE"
        )
    version = str(header.get("schema_version"))
    if _parts(version) > _parts(SCHEMA_VERSION):
        raise InputError(
            path,
            "unsupported",
            f"written by gradscope {header['tool'].get('version')} (schema {version}); this is "
            f"older (schema {SCHEMA_VERSION}): upgrade it",
        )
    command = header.get("command")
    if command not in KINDS:
        raise InputError(
            path, "malformed", f"a report of the command {quoted(str(command))}, which there is not"
        )
    return str(command)


def _parts(version: str) -> tuple[int, ...]:
    """(1, 0) of "1.0"; what is no version counts as the first."""
    parts = version.split(".")
    return tuple(map(int, parts)) if all(p.isdecimal() for p in parts) else (1, 0)


def _wrong(error: ValidationError) -> str:
    first = error.errors()[0]
    place = ".".join(map(str, first["loc"]))
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    return f"{quoted(place)} is not what a report has there: {first['msg'].lower()}{more}"
