"""What classes are called, and which of them is meant."""

from __future__ import annotations

import ast
import json
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from importlib.resources import files
from pathlib import Path
from types import MappingProxyType
from typing import Any

from gradscope.errors import InputError, UsageError

#: Names by class index.
Labels = Mapping[int, str]

_IMAGENET_CLASSES = 1000
_BESIDE = ("labels.txt", "classes.txt", "imagenet_classes.txt", "labels.json", "classes.json")


@dataclass(frozen=True, slots=True)
class Ranked:
    """The ``count`` classes that the model finds likeliest."""

    count: int


@cache
def imagenet() -> Labels:
    """ImageNet's 1000 classes in the order, and the words, of torchvision (BSD-3-Clause)."""
    text = files("gradscope.models").joinpath("imagenet.txt").read_text(encoding="utf-8")
    return MappingProxyType(dict(enumerate(text.splitlines())))


def read_labels(path: str) -> Labels:
    """Names from a file: a line each (with or without its index), a JSON list or a JSON object.

    Also ``imagenet_class_index.json``, the ``id2label`` of a Hugging Face ``config.json`` and a
    dictionary as Python prints it. Raises InputError.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise InputError(path, "missing", "there is no such file") from None
    except OSError as error:
        raise InputError(path, "missing", f"it cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise InputError(
            path, "malformed", "labels are text in UTF-8; save it again as that"
        ) from None
    # A name with a NUL in it.
    except ValueError as error:
        raise InputError(path, "missing", f"no file has this name ({error})") from None
    value = _literal(text)
    if value is None and _OBJECT.match(text):
        message = f"it begins like JSON but cannot be read as such; {_FORMS}"
        raise InputError(path, "malformed", message)
    try:
        found = dict(_from_lines(text)) if value is None else _from_literal(value)
    except ValueError as error:
        raise InputError(path, "malformed", f"{error}; {_FORMS}") from None
    if not found:
        raise InputError(path, "malformed", f"it holds no labels; {_FORMS}")
    return MappingProxyType(found)


#: An object or a list that goes on; ``[CLS]`` on a line of its own is a name.
_OBJECT = re.compile(r"\s*(?:\{|\[(?![^\[\]\"',\n]*\]\s*\n))")
_FORMS = "labels are a line each, or JSON: a list, or an object of index to name"


def beside(model: str) -> Labels | None:
    """The names in a file next to the model, if there is one."""
    folder = Path(model) if Path(model).is_dir() else Path(model).parent
    for name in _BESIDE:
        if (folder / name).is_file():
            return read_labels(str(folder / name))
    try:
        value = _literal((folder / "config.json").read_text(encoding="utf-8-sig"))
    except (OSError, ValueError):
        return None
    named = value.get("id2label") if isinstance(value, dict) else None
    return read_labels(str(folder / "config.json")) if named else None


def of_model(module: object, classes: int) -> Labels | None:
    """The names that a model brings along, or ImageNet's where it has as many classes."""
    named = getattr(getattr(module, "config", None), "id2label", None)
    if isinstance(named, Mapping) and named:
        try:
            return MappingProxyType({_index(i): str(name) for i, name in named.items()})
        # Another library's attribute of this name.
        except ValueError:
            pass
    return imagenet() if classes == _IMAGENET_CLASSES else None


def _literal(text: str) -> Any:
    """What JSON or Python reads from text in brackets; None where neither does."""
    if text.lstrip()[:1] not in ("{", "["):
        return None
    for read in (json.loads, ast.literal_eval):
        try:
            with warnings.catch_warnings():
                # Python's, of backslashes in names.
                warnings.simplefilter("ignore")
                return read(text.strip())
        # Python's parser has its own limits of depth, and says so in several ways.
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
    return None


def _from_literal(value: Any) -> dict[int, str]:
    """Raises ValueError for what is not index and name, either way round."""
    if isinstance(value, dict) and "id2label" in value:
        value = value["id2label"]
    if isinstance(value, list):
        return {index: _name(name) for index, name in enumerate(value)}
    if not isinstance(value, dict):
        raise ValueError(f"it holds {value!r:.40}")
    # Otherwise label2id: names to indices.
    named = value.items() if all(map(_is_index, value)) else ((i, n) for n, i in value.items())
    return dict(_unique(sorted((_index(index), _name(name)) for index, name in named)))


def _is_index(value: Any) -> bool:
    return re.fullmatch(r"[0-9]{1,9}", str(value).strip()) is not None


def _index(value: Any) -> int:
    if not _is_index(value):
        raise ValueError(f"{value!r:.40} is no index of a class")
    return int(value)


def _name(value: Any) -> str:
    # ["n01440764", "tench"], as Keras has it.
    name = value[-1] if isinstance(value, list | tuple) and value else value
    if not isinstance(name, str | int) or isinstance(name, bool):
        raise ValueError(f"{value!r:.40} is no name of a class")
    return str(name)


def _unique(pairs: Iterable[tuple[int, str]]) -> Iterator[tuple[int, str]]:
    seen: set[int] = set()
    for index, name in pairs:
        if index in seen:
            raise ValueError(f"class {index} has two names")
        seen.add(index)
        yield index, name


_NUMBERED = re.compile(r"([0-9]{1,9})\s*[:;,\t]\s*(.+)")
#: With a space alone, as in `0 tench`: a name may begin with a number, so all have to be in order.
_SPACED = re.compile(r"([0-9]{1,9})\s+(?:-\s+)?(.+)")
_SYNSET = re.compile(r"n[0-9]{8}[\s,]+(.+)")


def _from_lines(text: str) -> Iterator[tuple[int, str]]:
    """Raises ValueError for an index with two names."""
    lines = text.rstrip().split("\n")
    filled = [line.strip() for line in lines if line.strip()]
    # A table may have a heading, which is no number.
    headed = bool(filled) and not filled[0][0].isdigit()
    for rows in (filled, filled[headed:]):
        numbered = [_NUMBERED.fullmatch(row) for row in rows]
        if numbered and all(numbered):
            return _unique((int(m[1]), _plain(m[2])) for m in numbered if m)
    spaced = [m for m in map(_SPACED.fullmatch, filled) if m]
    if [int(m[1]) for m in spaced] == list(range(len(filled))):
        return ((int(m[1]), _plain(m[2])) for m in spaced)
    return ((index, _plain(line)) for index, line in enumerate(lines) if filled)


def _plain(name: str) -> str:
    synset = _SYNSET.fullmatch(name.strip())
    found = (synset[1] if synset else name).strip()
    quoted = re.fullmatch(r"'([^']*)',?|\"([^\"]*)\",?", found)
    return next(part for part in quoted.groups() if part is not None) if quoted else found


def parse_target(text: str, labels: Labels | None, classes: int) -> int | Ranked:
    """``281``, ``top1``, ``top5``, or a label; a number is always an index.

    A label is matched whole, then whatever its case, then one of its comma-separated synonyms,
    then a part that only one label has. Raises UsageError for what names no class, or several.
    """
    text = text.strip()
    if not text:
        raise UsageError("--target is empty; give an index, top1, or a label")
    ranked = re.fullmatch(r"top-?([0-9]+)", text, re.IGNORECASE)
    if ranked:
        count = _within(ranked[1], classes + 1)
        if not count:
            raise UsageError(f"--target {text}: the model has {classes} classes")
        return Ranked(count)
    if re.fullmatch(r"[+-]?[0-9]+", text):
        index = None if text.startswith("-") else _within(text.removeprefix("+"), classes)
        if index is None:
            raise UsageError(f"--target {text}: classes go from 0 to {classes - 1}")
        return index
    if labels is None:
        raise UsageError(
            f"--target {text}: the classes have no names; give an index, top1, or --labels FILE"
        )
    return _named(text, {i: n for i, n in labels.items() if 0 <= i < classes})


def _within(digits: str, end: int) -> int | None:
    """The number if it is below ``end``; Python refuses to read thousands of digits."""
    digits = digits.lstrip("0") or "0"
    return int(digits) if len(digits) <= len(str(end)) and int(digits) < end else None


def _named(text: str, labels: Labels) -> int:
    wanted = text.casefold()
    ways = (
        lambda name: name == text,
        lambda name: name.casefold() == wanted,
        lambda name: wanted in (part.strip().casefold() for part in name.split(",")),
        lambda name: wanted in name.casefold(),
    )
    for matches in ways:
        found = [index for index, name in labels.items() if matches(name)]
        if len(found) == 1:
            return found[0]
        if found:
            listed = ", ".join(f"{index} ({labels[index]})" for index in found[:8])
            more = f" and {len(found) - 8} more" if len(found) > 8 else ""
            raise UsageError(f"--target {text}: several classes fit, give an index: {listed}{more}")
    by_case = {name.casefold(): f"{name} ({index})" for index, name in labels.items()}
    close = [by_case[name] for name in get_close_matches(wanted, by_case, n=3, cutoff=0.5)]
    hint = f"; did you mean {' or '.join(close)}?" if close else "; give an index"
    raise UsageError(f"--target {text}: no class has this name{hint}")
