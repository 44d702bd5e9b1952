"""What training loops print: the lines of a log that say step, loss, gradient norm, learning rate.

Known are the dictionaries of Hugging Face's Trainer and of JSON, fairseq's and torchtitan's
``key=value`` and ``key: value``, Megatron's ``key: value |``, plain ``step 10 loss 2.3``, loops
that count within epochs (PyTorch's examples, timm, OpenMMLab, Keras) or draw a progress bar, and
those that print one line an epoch, with anything before, between and behind. Only the run as a
whole is logged so, never a layer.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import IntEnum
from itertools import islice
from typing import Any

from gradscope.containers.beginning import Beginning, is_plain_text
from gradscope.errors import InputError
from gradscope.histories.columns import Row, Table
from gradscope.histories.history import History
from gradscope.histories.names import Role, is_known, role_of, step_column
from gradscope.histories.places import Clock, Place, epoch_of, heading, place_below, place_of
from gradscope.histories.tabled import history_of

#: How much of a file may come before the first line that says something.
_SEARCHED = 1 << 22
#: Longer lines (a dumped configuration, a progress bar redrawn) are cut.
_LONGEST = 1 << 14
#: How many lines tell of which kind those of a log are, and how many make a log of epochs.
_TELLING, _EPOCHS = 2000, 3

_ANSI = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
_NUMBER = r"[-+]?(?:\d+\.?\d*(?:e[-+]?\d+)?|\.\d+(?:e[-+]?\d+)?|nan|inf(?:inity)?)"
#: A word is no key that is a number itself.
_NO_VALUE = r"(?!(?:nan|inf|infinity)\b)"
#: A quoted key and its number, perhaps quoted too, or as NumPy and torch print theirs.
_QUOTED = re.compile(
    rf"""(["'])(?P<key>[^"'{{}}]{{1,100}})\1\s*:\s*(?:[\w.]+\()?["']?(?P<value>{_NUMBER})(?![\w.])""",
    re.IGNORECASE,
)
#: A number behind words and one separator, perhaps the first of a list or out of so many.
_PLAIN = re.compile(
    rf"(?P<key>{_NO_VALUE}[a-z_][\w./-]{{0,80}}(?: {_NO_VALUE}[a-z(][\w()./]{{0,40}}){{0,4}})"
    r"(?:\s*[:=]\s*|\s+)(?:\[\s*)?"
    rf"(?P<value>\d{{1,3}}(?:,\d{{3}})+|{_NUMBER})(?!\w|\.\d|:\d|\s?%)",
    re.IGNORECASE,
)
#: Lines about other data than that of training.
_OTHER_DATA = re.compile(r"\b(?:val(?:id\w*)?|eval\w*|test(?:ing)?)\b(?![/.\\])", re.IGNORECASE)
_RANK = re.compile(r"\[(?:rank|default) ?(\d+)\]")
#: The total norm where a line has nothing else that can be called so.
_SHORT = frozenset(("norm", "gn", "grad"))
_ROLES: dict[Role, str] = {
    "loss": "loss",
    "total": "grad_norm",
    "rate": "lr",
    "scale": "loss_scale",
    "skipped": "skipped",
}
_COLUMNS = ("step", *_ROLES.values())


def recognises(file: Beginning) -> bool:
    """Text that is not JSON or a table, with a line that a training loop printed."""
    # Keras goes back to the beginning of its bar by as many backspaces.
    start = file.start.replace(b"\b", b"")
    if not is_plain_text(start) or _is_json(start) or _is_table(start):
        return False
    return _kind_of(file.path) is not None


def _is_json(start: bytes) -> bool:
    """Whether a file begins as JSON does; ``{'loss':`` and ``[2024-`` do not."""
    text = start.removeprefix(b"\xef\xbb\xbf").lstrip()
    if text[:1] not in (b"{", b"["):
        return False
    inside = text[1:].lstrip()[:1]
    if inside in (b'"', b"{", b"[", b"]", b"}", b""):
        return True
    try:
        json.loads(text.split(b"\n", 1)[0])
    except ValueError:
        return False
    return True


def _is_table(start: bytes) -> bool:
    """Whether the first line names columns."""
    first = start.removeprefix(b"\xef\xbb\xbf").lstrip().split(b"\n", 1)[0]
    names = re.split(r"[,;\t]", first.decode("utf-8", "replace").replace('"', "").strip())
    known = step_column(names) is not None or any(map(is_known, names))
    return len(names) > 1 and known and not any(map(_PLAIN.search, names))


def read_log(path: str) -> History:
    """The losses, gradient norms and rates in a training log. Raises InputError."""
    table, kind = Table(path), _kind_of(path)
    if kind is None:
        raise InputError(path, "malformed", "has no line with a loss or a gradient norm")
    if kind is Kind.EPOCH:
        table.notes.append("the log has a line for each epoch, so steps are epochs")
    with open(path, encoding="utf-8", errors="replace") as lines:
        said = (row for row in _said(_lines(lines)) if row[2].kind == kind)
        return history_of(table, "log", _rows(_counted(_of_one_rank(said))))


def _lines(lines: Iterable[str], most: int | None = None) -> Iterator[tuple[int, str]]:
    read = 0
    for number, line in enumerate(lines, 1):
        read += len(line)
        if most is not None and read > most:
            return
        yield number, _ANSI.sub("", line[:_LONGEST])


class Kind(IntEnum):
    """Lines that tell of a training step, the surest first."""

    STEP = 0
    #: The loss of training beside that of validation.
    BOTH = 1
    #: That of a whole epoch.
    EPOCH = 2


@dataclass(frozen=True, slots=True)
class Said:
    """What one line says of a training step: values by column, and its place unless among them."""

    kind: Kind
    values: dict[str, float]
    place: Place | None = None


def _said(lines: Iterable[tuple[int, str]]) -> Iterator[tuple[int, str | None, Said]]:
    """The number, the rank and the values of every line that tells of a training step."""
    epoch = None
    for number, line in lines:
        # The commonest lines have neither; regular expressions are for the rest.
        lowered = line.lower()
        if "loss" not in lowered and "norm" not in lowered:
            if "epoch" in lowered and (begun := heading(line)) is not None:
                epoch = begun
            continue
        found = said_by(line, epoch)
        if found is not None and ("loss" in found.values or "grad_norm" in found.values):
            rank = _RANK.search(line)
            yield number, rank[1] if rank else None, found


def said_by(line: str, epoch: int | None = None) -> Said | None:
    """What one line says, below the heading of an ``epoch`` if there is one."""
    quoted = list(_QUOTED.finditer(line)) if "{" in line else []
    # Openmmlab's loops say which data a count is of.
    found = quoted or _PLAIN.finditer(line.replace("(train)", ""))
    pairs = [(m["key"].strip(), float(m["value"].replace(",", ""))) for m in found]
    keys = {key.lower() for key, _ in pairs}
    other = not quoted and _OTHER_DATA.search(line) is not None
    # The Trainer's last words are of the whole run.
    if "train_runtime" in keys or (other and not any(map(_of_training, keys))):
        return None
    step = step_column(key for key, _ in pairs)
    values, kind = _by_column(pairs, step), Kind.BOTH if other else Kind.STEP
    if quoted:
        return Said(kind, values)
    place = place_of(line, step is None)
    if place is None and step is None and epoch is not None:
        place = place_below(line, epoch)
    if isinstance(place, Place):
        return Said(kind, values, place)
    if place is not None or step is not None:
        return Said(kind, values if place is None else values | {"step": float(place)})
    named = epoch_of(line)
    whole = epoch if named is None else named
    return None if whole is None else Said(Kind.EPOCH, values | {"step": float(whole)})


def _of_training(key: str) -> bool:
    return "train" in key and role_of(key) == "loss"


def _kind_of(path: str) -> Kind | None:
    """Of which kind most lines are that tell of a step, the surest of as many; None of none.

    Others say the same at another pace: the loss of an epoch is no record among those of steps.
    """
    with open(path, encoding="utf-8", errors="replace") as lines:
        said = islice(_said(_lines(lines, _SEARCHED)), _TELLING)
        counts = Counter(found.kind for _, _, found in said)
    if counts[Kind.EPOCH] < _EPOCHS:
        del counts[Kind.EPOCH]
    return max(sorted(counts), key=counts.__getitem__, default=None)


def _by_column(pairs: list[tuple[str, float]], step: str | None) -> dict[str, float]:
    found: dict[str, float] = {}
    for key, value in pairs:
        role = role_of(key)
        if key == step and value.is_integer():
            found.setdefault("step", value)
        elif role is not None:
            found.setdefault(_ROLES[role], value)
        elif key.lower() == "number of skipped iterations":
            found.setdefault("skipped", value)
    for key, value in pairs:
        if key.lower() in _SHORT:
            found.setdefault("grad_norm", value)
    if "skipped" in found and abs(found.get("grad_norm", float("nan"))) < float("inf"):
        # Some steps of the interval were skipped, but not the one that was logged.
        found["skipped"] = 0.0
    return found


_Line = tuple[int, str | None, Said]


def _of_one_rank(rows: Iterable[_Line]) -> Iterator[_Line]:
    """Where several ranks print into one file: the first that does."""
    first: str | None = None
    for row in rows:
        first = first or row[1]
        if row[1] == first or row[1] is None:
            yield row


def _counted(rows: Iterable[_Line]) -> Iterator[tuple[int, dict[str, float]]]:
    """The values of lines, with steps from their places."""
    clock = Clock()
    for number, _, said in rows:
        place = said.place
        yield number, said.values if place is None else said.values | {"step": clock.step(place)}


def _rows(rows: Iterable[tuple[int, dict[str, float]]]) -> Iterator[Row]:
    """The rows of a table; without steps if the first has none."""
    columns: tuple[str, ...] | None = None
    for number, found in rows:
        if columns is None:
            columns = _COLUMNS if "step" in found else _COLUMNS[1:]
        if columns[0] != "step" or "step" in found:
            yield number, columns, _cells(columns, found)


def _cells(columns: tuple[str, ...], found: dict[str, float]) -> tuple[Any, ...]:
    return tuple(found.get(column) for column in columns)
