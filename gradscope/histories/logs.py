"""What training loops print: the lines of a log that say step, loss, gradient norm, learning rate.

Known are the dictionaries of Hugging Face's Trainer and of JSON, fairseq's and torchtitan's
``key=value`` and ``key: value``, Megatron's ``key: value |``, plain ``step 10 loss 2.3``, and
loops that count within epochs (PyTorch's examples, timm, OpenMMLab) or draw a progress bar, with
anything before, between and behind. Only the run as a whole is logged so, never a layer.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from typing import Any

from gradscope.containers.beginning import Beginning, is_plain_text
from gradscope.errors import InputError
from gradscope.histories.columns import Row, Table
from gradscope.histories.history import History
from gradscope.histories.names import Role, is_known, role_of, step_column

#: How much of a file may come before the first line that says something.
_SEARCHED = 1 << 22
#: Longer lines (a dumped configuration, a progress bar redrawn) are cut.
_LONGEST = 1 << 14

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
#: The place within an epoch: ``Epoch: [0][ 10/5005]``, ``Train: 0 [ 50/1251 (4%)]``, ``Epoch [1/5],
#: Step [100/600]``, ``Epoch 0: 10%|# | 10/100 [``.
_WITHIN_EPOCH = re.compile(
    r"(?:epoch|train)\b\D{0,12}?(?P<epoch>\d+)(?!\d)(?:\s*/\s*\d+)?\]?[\s,:|-]*"
    r"(?:\d{1,3}%\|[^|]{0,400}\|\s*|(?P<word>(?:step|batch|iter(?:ation)?)\W{0,3})?\[?\s*)"
    r"(?<!\d)(?P<at>\d+)\s*/\s*(?P<all>\d+)",
    re.IGNORECASE,
)
#: The place of a progress bar of the whole run.
_BAR = re.compile(r"%\|[^|]{0,400}\|\s*(?P<at>\d+)/\d+ \[")
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
    if not is_plain_text(file.start) or _is_json(file.start) or _is_table(file.start):
        return False
    with open(file.path, encoding="utf-8", errors="replace") as lines:
        return next(_said(_lines(lines, _SEARCHED)), None) is not None


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
    table = Table(path)
    with open(path, encoding="utf-8", errors="replace") as lines:
        rows = _of_one_rank(_said(_lines(lines)))
        return table.history("log", _numbered(path, rows))


def _lines(lines: Iterable[str], most: int | None = None) -> Iterator[tuple[int, str]]:
    read = 0
    for number, line in enumerate(lines, 1):
        read += len(line)
        if most is not None and read > most:
            return
        yield number, _ANSI.sub("", line[:_LONGEST])


_Said = tuple[int, str | None, dict[str, float]]


def _said(lines: Iterable[tuple[int, str]]) -> Iterator[_Said]:
    """The number, the rank and the values of every line that tells of a training step."""
    for number, line in lines:
        # The commonest lines have neither; regular expressions are for the rest.
        lowered = line.lower()
        if "loss" not in lowered and "norm" not in lowered:
            continue
        found = values_of(line)
        if "loss" in found or "grad_norm" in found:
            rank = _RANK.search(line)
            yield number, rank[1] if rank else None, found


def values_of(line: str) -> dict[str, float]:
    """What one line says of a training step, by column; nothing for any other line."""
    quoted = list(_QUOTED.finditer(line)) if "{" in line else []
    # Openmmlab's loops say which data a count is of.
    found = quoted or _PLAIN.finditer(line.replace("(train)", ""))
    pairs = [(m["key"].strip(), float(m["value"].replace(",", ""))) for m in found]
    keys = {key.lower() for key, _ in pairs}
    # The Trainer's last words are of the whole run.
    if "train_runtime" in keys or (not quoted and _OTHER_DATA.search(line)):
        return {}
    step = step_column(key for key, _ in pairs)
    place = None if quoted else _place(line, step is None)
    if step is None and place is None and not quoted:
        return {}
    return _by_column(pairs, step) | ({} if place is None else {"step": float(place)})


def _place(line: str, alone: bool) -> int | None:
    """The step of a line that counts within epochs, or of a progress bar.

    Where the line has a step besides (not ``alone``), only if it is that of the epoch.
    """
    if (found := _WITHIN_EPOCH.search(line)) and (alone or found["word"]):
        return int(found["epoch"]) * int(found["all"]) + int(found["at"])
    bar = _BAR.search(line) if alone else None
    return int(bar["at"]) if bar else None


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


def _of_one_rank(rows: Iterable[_Said]) -> Iterator[_Said]:
    """Where several ranks print into one file: the first that does."""
    first: str | None = None
    for number, rank, found in rows:
        first = first or rank
        if rank == first or rank is None:
            yield number, rank, found


def _numbered(path: str, rows: Iterable[_Said]) -> Iterator[Row]:
    """The rows of a table; without steps if the first has none."""
    columns: tuple[str, ...] | None = None
    for number, _, found in rows:
        if columns is None:
            columns = _COLUMNS if "step" in found else _COLUMNS[1:]
        if columns[0] != "step" or "step" in found:
            yield number, columns, _cells(columns, found)
    if columns is None:
        raise InputError(path, "malformed", "has no line with a loss or a gradient norm")


def _cells(columns: tuple[str, ...], found: dict[str, float]) -> tuple[Any, ...]:
    return tuple(found.get(column) for column in columns)
