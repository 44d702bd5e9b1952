"""The baseline: findings that were accepted, and that fail no run unless they become worse.

An entry is known by rule and subject, never by a value, and of a whole input by the rule alone: the
next checkpoint of a run has another name. What was measured is kept beside it, to tell when a
finding became worse. A baseline belongs to one artefact, and to any number of commands about it.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from pydantic import ConfigDict, Field, ValidationError

from gradscope.errors import UsageError
from gradscope.files import write_whole
from gradscope.report.formats.json_ import lined
from gradscope.report.model import (
    Coverage,
    Finding,
    Input,
    InputFailure,
    Number,
    Record,
    as_json,
)
from gradscope.report.severity import Severity
from gradscope.text import escaped, listed, plural, quoted

SCHEMA_VERSION = "1.0"
#: The share by which a measure may be worse.
TOLERANCE = 0.1


class Entry(Record):
    """One accepted finding."""

    command: str
    rule: str
    name: str
    subject: str
    #: The name of the file that it was found in.
    input: str
    fingerprint: str
    severity: Severity
    #: What was measured of it.
    measures: Mapping[str, int | Number]
    #: The share by which it may be worse, where it is not the baseline's.
    tolerance: float | None = Field(default=None, ge=0)


class Scope(Record):
    """What a run looked at."""

    inputs: tuple[str, ...]
    narrowed: tuple[str, ...] = ()


class Baseline(Record):
    """The accepted findings of one artefact, by command, rule and subject."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: str = SCHEMA_VERSION
    tolerance: float = Field(default=TOLERANCE, ge=0)
    #: By command, what the run that it was written from looked at.
    runs: Mapping[str, Scope] = {}
    findings: tuple[Entry, ...] = ()


# --- files ----------------------------------------------------------------------------------------


def read_baseline(path: str | Path) -> Baseline:
    """Raises UsageError for a file that is missing, malformed or of a newer version."""
    try:
        document = json.loads(Path(path).read_bytes())
        _check_version(document, path)
        found = Baseline.model_validate(document)
    except FileNotFoundError as error:
        raise UsageError(
            f"the baseline {path} does not exist; `gradscope baseline create REPORT.json "
            f"--baseline {path}` makes it"
        ) from error
    except OSError as error:
        raise UsageError(f"the baseline {path}: {error.strerror or error}") from error
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        where = f"{quoted(place)}: " if place else ""
        raise UsageError(f"{path} is not a baseline: {where}{first['msg'].lower()}") from error
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path} is not a baseline: {error}") from error
    return found


def _check_version(document: Any, path: str | Path) -> None:
    """Before anything else: what an old version does not know is no mistake of the file's."""
    version = document.get("schema_version") if isinstance(document, dict) else None
    if isinstance(version, str) and version != SCHEMA_VERSION:
        raise UsageError(f"{path} was written by a newer gradscope (schema {escaped(version)})")


def write_baseline(path: str | Path, baseline: Baseline) -> None:
    """An entry is a line, sorted: small in a diff. Raises OutputError."""
    text = lined(as_json(baseline)) + "\n"
    write_whole(path, partial(_write, text))


def _write(text: str, file: BinaryIO) -> None:
    file.write(text.encode("utf-8", "backslashreplace"))


# --- comparing ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Compared:
    """Findings with their state, each with the entry that it is, and what no finding is."""

    pairs: tuple[tuple[Finding, Entry | None], ...]
    gone: tuple[Entry, ...]

    @property
    def findings(self) -> list[Finding]:
        """The findings in their order."""
        return [finding for finding, _ in self.pairs]


def compared(findings: Iterable[Finding], command: str, baseline: Baseline) -> Compared:
    """Which findings the baseline knows, and which became worse. Allowed ones are left alone."""
    entries = [e for e in baseline.findings if e.command == command]
    left: dict[tuple[str, ...], list[Entry]] = defaultdict(list)
    for entry in entries:
        left[(entry.fingerprint,)].append(entry)
        left[entry.rule, entry.subject, entry.input].append(entry)
    pairs, taken = [], set[int]()
    for finding in findings:
        known = None if finding.allowed else _taken(finding, left, taken)
        pairs.append((_with_state(finding, known, baseline), known))
    return Compared(tuple(pairs), tuple(e for e in entries if id(e) not in taken))


def _taken(
    finding: Finding, left: Mapping[tuple[str, ...], list[Entry]], taken: set[int]
) -> Entry | None:
    """The entry of a finding, which is no other's.

    One of several inputs that share rule and subject has a fingerprint of its own; alone it has
    not, and is told by the name of its input.
    """
    name = Path(finding.input).name
    for key in ((finding.fingerprint,), (finding.rule, finding.subject, name)):
        for entry in left.get(key, ()):
            if id(entry) not in taken:
                taken.add(id(entry))
                return entry
    return None


def _with_state(finding: Finding, entry: Entry | None, baseline: Baseline) -> Finding:
    if entry is None:
        return finding
    tolerance = baseline.tolerance if entry.tolerance is None else entry.tolerance
    state = "worsened" if is_worse(finding, entry, tolerance) else "unchanged"
    return finding.model_copy(update={"state": state})


def measures(finding: Finding) -> dict[str, int | float]:
    """What tells whether a finding became worse: the first number of its evidence, and its share.

    See ``Observation``: rules put what they judge first.
    """
    numbers = {
        name: n for name, fact in finding.evidence.items() if (n := _number(fact)) is not None
    }
    first = next(iter(numbers), None)
    return {name: n for name, n in numbers.items() if name in (first, "affected_fraction")}


def _number(fact: object) -> int | float | None:
    """A number, or one that a saved report spells."""
    if isinstance(fact, str):
        return float(fact) if fact in ("NaN", "Infinity", "-Infinity") else None
    return fact if isinstance(fact, int | float) else None


def is_worse(finding: Finding, entry: Entry, tolerance: float) -> bool:
    """Whether a finding is more severe than it was, or measures worse by more than this share."""
    if finding.severity.rank > entry.severity.rank:
        return True
    return any(
        _beyond(now, entry.measures[name], finding.threshold, tolerance)
        for name, now in measures(finding).items()
        if name in entry.measures
    )


def _beyond(now: float, then: float, threshold: float | None, tolerance: float) -> bool:
    """Whether a measure moved away from what is healthy by more than it may.

    A number is worse the farther it lies from the threshold, on its side of it; a count, and what
    has no threshold, the greater it is.
    """
    if math.isnan(now) or math.isnan(then):
        return math.isnan(now) and not math.isnan(then)
    falls = isinstance(now, float) and threshold is not None and now < threshold
    worse = then - now if falls else now - then
    return worse > 0 and worse > tolerance * abs(then) * (1 + 1e-9)


def partial_run(
    command: str,
    inputs: Sequence[Input],
    coverage: Coverage,
    errors: Sequence[InputFailure],
    baseline: Baseline,
) -> str | None:
    """Why a run says nothing of entries that it did not find; None if it does."""
    then = baseline.runs.get(command, Scope(inputs=()))
    names = input_names(inputs)
    if errors or not coverage.analyzed:
        return "not everything could be read"
    if coverage.narrowed and sorted(coverage.narrowed) != sorted(then.narrowed):
        return f"it looked at a part only ({', '.join(coverage.narrowed)})"
    # Pictures are what findings are about; a checkpoint may have another name than the one before.
    lost = set(then.inputs) - set(names) if coverage.unit == "images" else ()
    if lost or len(names) < len(then.inputs):
        return f"it looked at {plural(len(names), 'input')} of {len(then.inputs)}"
    return None


def stale(gone: Iterable[Entry], coverage: Coverage) -> list[Entry]:
    """Entries that would have been found: those of rules that were evaluated."""
    names = evaluated(coverage)
    return [entry for entry in gone if entry.name in names]


def stale_remark(entries: Sequence[Entry], path: str) -> Iterator[str]:
    """What is to be said of entries that no finding is any more."""
    if entries:
        what = listed((f"{e.rule} {quoted(e.subject)}" for e in entries), len(entries))
        are = "is" if len(entries) == 1 else "are"
        yield (
            f"{plural(len(entries), 'accepted finding')} of {path} {are} gone ({what}); "
            "`gradscope baseline prune` removes them"
        )


def evaluated(coverage: Coverage) -> set[str]:
    """The names of the rules that a run could ask."""
    return set(coverage.rules) - {n.rule for n in coverage.not_evaluated}


def input_names(inputs: Iterable[Input]) -> tuple[str, ...]:
    """Names of files, for folders differ between machines."""
    return tuple(Path(i.path).name for i in inputs)
