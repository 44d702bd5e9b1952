"""What commands have in common: their signature, their beginning, and how they end.

``command`` turns a body into what typer takes. ``analysis`` does so for a body that returns a
report: the request is checked before anything heavy is imported, the report is published after.
"""

from __future__ import annotations

import functools
import inspect
import os
import re
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import fields, is_dataclass, replace
from fnmatch import fnmatchcase
from functools import partial
from glob import glob
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Protocol

import typer

from gradscope.cli.options import Gate, Output
from gradscope.cli.terminal import emit, leave, say, screen
from gradscope.errors import GradscopeError, OutputError, UsageError
from gradscope.files import write_whole
from gradscope.formats import suffixes
from gradscope.report.formats import TRACKERS, Display, renderer
from gradscope.report.formats.sections import placed
from gradscope.report.palettes import palette
from gradscope.report.trackers import tracker
from gradscope.text import quoted

ISSUES = "https://github.com/gradscope/gradscope/issues"
#: Which exit code counts when several apply.
PRECEDENCE = (70, 2, 3, 4, 1, 0)


class Reported(Protocol):
    """A report, described without importing pydantic."""

    @property
    def gate(self) -> Any:
        """Holds the exit code and notes."""
        ...

    @property
    def errors(self) -> Any:
        """What could not be read."""
        ...


_Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an internal error.")]


def command(body: Callable[..., int]) -> Callable[..., None]:
    """A body with every option in its signature, whose end is an exit code; a bug is 70, never 1.

    A parameter whose type is a dataclass becomes the dataclass's fields; ``--debug`` is added.
    """
    own = inspect.signature(body, eval_str=True).parameters.values()
    records: dict[str, Any] = {p.name: p.annotation for p in own if is_dataclass(p.annotation)}

    def run(**given: Any) -> None:
        debug = given.pop("debug")
        for name, record in records.items():
            given[name] = record(**{f.name: given.pop(f.name) for f in fields(record)})
        leave(_guarded(partial(body, **given), debug))

    flat = [*_flat(own), _keyword("debug", _Debug, False)]
    flat.sort(key=lambda p: p.default is not p.empty)
    functools.update_wrapper(run, body)
    run.__signature__ = inspect.Signature(flat)  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in flat}
    return run


def _flat(parameters: Iterable[inspect.Parameter]) -> Iterator[inspect.Parameter]:
    for p in parameters:
        if isinstance(p.annotation, type) and is_dataclass(p.annotation):
            yield from _flat(inspect.signature(p.annotation, eval_str=True).parameters.values())
        else:
            yield _keyword(p.name, p.annotation, p.default)


def _keyword(name: str, annotation: object, default: object) -> inspect.Parameter:
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, annotation=annotation, default=default
    )


def _guarded(body: Callable[[], int], debug: bool) -> int:
    try:
        return body()
    except KeyboardInterrupt:
        say("interrupted")
        return 130
    except GradscopeError as error:
        say(f"error: {error}")
        return error.exit_code
    except MemoryError:
        say("error: out of memory; use fewer --jobs")
        return 70
    except Exception as error:
        return _bug(error, debug)


def _bug(error: Exception, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    first = str(error).split("\n", 1)[0]
    say(
        f"internal error: {type(error).__name__}: {first}. This is a bug in gradscope; please "
        f"report it at {ISSUES}" + ("" if debug else " with the output of --debug")
    )
    return 70


def analysis(body: Callable[..., Reported]) -> Callable[..., None]:
    """A command whose body takes ``output: Output`` (and ``gate: Gate``) and returns a report."""

    @functools.wraps(body)
    def run(**given: Any) -> int:
        output: Output = given["output"]
        gate: Gate | None = given.get("gate")
        read = [] if gate is None else _check_gate(gate)
        files = checked(output, (*_texts(given), *read))
        report = body(**given)
        codes = (report.gate.exit_code, *published(report, output, files))
        for failure in report.errors:
            say(f"error: {failure.input}: {failure.message}")
        for note in report.gate.notes if output.format_ != "table" else ():
            say(f"note: {note}")
        return worst(codes)

    return command(run)


def worst(codes: Iterable[int]) -> int:
    """The exit code that counts; 0 of none."""
    return min(codes, key=PRECEDENCE.index, default=0)


# --- before the work ------------------------------------------------------------------------------

#: What reports are written as; every other name of what is read belongs to data.
_REPORTS = (".json", ".jsonl", ".csv", ".tsv")
#: Names of files that hold what gradscope reads; no report is written over one.
_DATA = (
    *(f"*{s}" for s in suffixes("tensors", "program", "history") if s not in _REPORTS),
    *(f"*{s}" for s in (".jit", ".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif")),
)


def _check_gate(gate: Gate) -> list[str]:
    """The files of a gate that can be what it says. Raises UsageError."""
    from gradscope.report.baseline import read_baseline
    from gradscope.report.rules import load_rules, select

    wanted = gate.wanted
    if wanted["select"] or wanted["ignore"]:
        select(load_rules().values(), wanted["select"], wanted["ignore"])
    if accepted := wanted["baseline"] or wanted["config"].baseline:
        read_baseline(accepted)
    return list(gate.files)


def checked(output: Output, inputs: Iterable[str]) -> list[tuple[str, Path]]:
    """The files to write, in which format each. Raises UsageError before anything heavy is done."""
    renderer(output.format_)
    palette(output.colors)
    reports = [_report_path(value) for value in output.report or ()]
    # Of photo.gif#3 the file is what must stay.
    files = (path if os.path.exists(path) else re.sub(r"#\d+$", "", path) for path in inputs)
    _spare(reports, [path for path in files if os.path.exists(path)])
    return reports


def _report_path(value: str) -> tuple[str, Path]:
    """``FORMAT=PATH`` as a format and a path that can be written."""
    name, equals, path = value.partition("=")
    if not equals or not path:
        raise UsageError(f"--report takes FORMAT=PATH, e.g. json=report.json, not {value!r}")
    if name in TRACKERS:
        tracker(name)
        if os.path.isfile(path):
            raise UsageError(f"--report {value}: {path} is a file; name a folder")
        return name, Path(path)
    renderer(name, pictures=True)
    if not os.path.isdir(os.path.dirname(path) or "."):
        raise UsageError(f"--report {value}: folder not found: {Path(path).parent}")
    if os.path.isdir(path):
        raise UsageError(f"--report {value}: {path} is a folder; name a file")
    return name, Path(path)


def _spare(reports: Iterable[tuple[str, Path]], inputs: list[str]) -> None:
    """Refuse to write a report over an input, over a file beside one, or over another report."""
    written: set[str] = set()
    for name, path in reports:
        place = os.path.realpath(path)
        if place in written:
            raise UsageError(f"--report {name}={path}: two reports cannot have the same path")
        written.add(place)
        if os.path.isfile(place) and (why := _kept(Path(place), inputs)):
            raise UsageError(f"--report {name}={path} would overwrite {why}; choose another path")


def _kept(path: Path, inputs: list[str]) -> str | None:
    """What an existing file is, if a report must not take its place."""
    if any(path.samefile(given) for given in inputs):
        return "an input"
    if any(fnmatchcase(path.name.lower(), pattern) for pattern in _DATA):
        return f"{quoted(path.name)}, which is not a report"
    places = [Path(os.path.realpath(given)) for given in inputs]
    folders = (place if place.is_dir() else place.parent for place in places)
    beside = path.suffix == ".json" and any(path.is_relative_to(folder) for folder in folders)
    return "a file of the input that is not a report" if beside and not _is_report(path) else None


def _is_report(path: Path) -> bool:
    with open(path, "rb") as file:
        start = file.read(4096)
    return not start.strip() or (b'"schema_version"' in start and b'"tool"' in start)


def _texts(given: Mapping[str, Any]) -> Iterator[str]:
    """Every text that was given and may name an input, alone or in the spelling of an option."""
    for value in given.values():
        if isinstance(value, str):
            yield from (*_spelled(value), *glob(value))
        elif isinstance(value, list):  # patterns among these are of tensors' names
            yield from (path for text in value if isinstance(text, str) for path in _spelled(text))
        elif is_dataclass(value) and not isinstance(value, Output | Gate):
            yield from _texts(vars(value))


def _spelled(text: str) -> tuple[str, ...]:
    """A text, and the file in ``FILE:FACTORY`` and ``NAME=FILE``."""
    return text, text.rpartition(":")[0], text.partition("=")[2]


# --- after the work -------------------------------------------------------------------------------


def published(report: Reported, output: Output, files: Iterable[tuple[str, Path]]) -> Iterator[int]:
    """Print the report and write the files; the codes of what failed."""
    shown = replace(
        screen(output.color, output.detail), anchor=output.sarif_anchor, colors=output.colors
    )
    try:
        emit(renderer(output.format_)(report, shown))
    except OutputError as error:
        say(f"error: {error}")
        yield error.exit_code
    written = Display(detail=2, root=shown.root, anchor=shown.anchor, colors=shown.colors)
    for name, path in files:
        try:
            _publish(report, name, path, written)
        except (OutputError, UsageError) as error:  # one that cannot be costs the others nothing
            say(f"error: {error}")
            yield error.exit_code
        else:
            if output.detail:
                say(f"wrote {path}")


def _publish(report: Any, name: str, path: Path, written: Display) -> None:
    if name in TRACKERS:
        tracker(name)(report, path)
        return
    drawn: str | bytes = renderer(name, pictures=True)(report, written)
    whole = placed(drawn, path) if isinstance(drawn, str) else drawn
    write_whole(path, partial(_write, whole))


def _write(what: str | bytes, file: BinaryIO) -> None:
    file.write(what if isinstance(what, bytes) else what.encode("utf-8", "backslashreplace"))
