"""Names of classes, and targets by index, rank or name."""

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
from gradscope.text import escaped, listed

#: Names by class index.
Labels = Mapping[int, str]

#: A target by rank: ``top1``, ``top-5``.
RANKED = re.compile(r"top-?([0-9]+)", re.IGNORECASE)

_IMAGENET_CLASSES = 1000
_BESIDE = ("labels.txt", "classes.txt", "imagenet_classes.txt", "labels.json", "classes.json")


@dataclass(frozen=True, slots=True)
class Ranked:
    """The ``count`` classes with the greatest logits."""

    count: int


@cache
def imagenet() -> Labels:
    """ImageNet's 1000 classes, in torchvision's order and wording (BSD-3-Clause)."""
    text = files("gradscope.models").joinpath("imagenet.txt").read_text(encoding="utf-8")
    return MappingProxyType(dict(enumerate(text.splitlines())))


def read_labels(path: str) -> Labels:
    """Names from a file: one per line (with or without its index), a JSON list or a JSON object.

    Also ``imagenet_class_index.json``, the ``id2label`` of a Hugging Face ``config.json`` and a
    dictionary as Python prints it. Raises InputError.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise InputError(path, "missing", "file not found") from None
    except OSError as error:
        raise InputError(path, "missing", f"it cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise InputError(path, "malformed", "it is not UTF-8 text; save it as UTF-8") from None
    # A name that contains NUL.
    except ValueError as error:
        raise InputError(path, "missing", f"not a valid file name ({error})") from None
    value = _literal(text)
    if value is None and _OBJECT.match(text):
        message = f"it begins like JSON but is not valid; {_FORMS}"
        raise InputError(path, "malformed", message)
    try:
        found = dict(_from_lines(text)) if value is None else _from_literal(value)
    except ValueError as error:
        raise InputError(path, "malformed", f"{error}; {_FORMS}") from None
    if not found:
        raise InputError(path, "malformed", f"no labels found; {_FORMS}")
    return MappingProxyType(found)


#: The start of an object or a list; ``[CLS]`` on a line of its own is a name.
_OBJECT = re.compile(r"\s*(?:\{|\[(?![^\[\]\"',\n]*\]\s*\n))")
_FORMS = "a file of labels has one per line, or is JSON: a list, or an object {index: name}"


def beside(model: str) -> Labels | None:
    """The names in a file next to the model; None without one."""
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
    """The names in the model itself, or ImageNet's where it has as many classes."""
    named = getattr(getattr(module, "config", None), "id2label", None)
    if isinstance(named, Mapping) and named:
        try:
            return MappingProxyType({_index(i): str(name) for i, name in named.items()})
        # Another library's attribute with this name.
        except ValueError:
            pass
    return imagenet() if classes == _IMAGENET_CLASSES else None


def _literal(text: str) -> Any:
    """The JSON or Python literal in a text; None where it is neither."""
    if text.lstrip()[:1] not in ("{", "["):
        return None
    for read in (json.loads, ast.literal_eval):
        try:
            with warnings.catch_warnings():
                # Python warns of backslashes in names.
                warnings.simplefilter("ignore")
                return read(text.strip())
        # Python's parser has limits of depth, and several errors for them.
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
    return None


def _from_literal(value: Any) -> dict[int, str]:
    """Raises ValueError for anything but indices and names, either way round."""
    if isinstance(value, dict) and "id2label" in value:
        value = value["id2label"]
    if isinstance(value, list):
        return {index: _name(name) for index, name in enumerate(value)}
    if not isinstance(value, dict):
        raise ValueError(f"it contains {value!r:.40}")
    # Otherwise label2id: names to indices.
    named = value.items() if all(map(_is_index, value)) else ((i, n) for n, i in value.items())
    return dict(_unique(sorted((_index(index), _name(name)) for index, name in named)))


def _is_index(value: Any) -> bool:
    return re.fullmatch(r"[0-9]{1,9}", str(value).strip()) is not None


def _index(value: Any) -> int:
    if not _is_index(value):
        raise ValueError(f"{value!r:.40} is not a class index")
    return int(value)


def _name(value: Any) -> str:
    # ["n01440764", "tench"], as in Keras.
    name = value[-1] if isinstance(value, list | tuple) and value else value
    if not isinstance(name, str | int) or isinstance(name, bool):
        raise ValueError(f"{value!r:.40} is not a class name")
    return str(name)


def _unique(pairs: Iterable[tuple[int, str]]) -> Iterator[tuple[int, str]]:
    seen: set[int] = set()
    for index, name in pairs:
        if index in seen:
            raise ValueError(f"class {index} has two names")
        seen.add(index)
        yield index, name


_NUMBERED = re.compile(r"([0-9]{1,9})\s*[:;,\t]\s*(.+)")
#: Only a space, as in `0 tench`: names may begin with a number, so these have to be in order.
_SPACED = re.compile(r"([0-9]{1,9})\s+(?:-\s+)?(.+)")
_SYNSET = re.compile(r"n[0-9]{8}[\s,]+(.+)")


def _from_lines(text: str) -> Iterator[tuple[int, str]]:
    """Raises ValueError for an index with two names."""
    lines = text.rstrip().split("\n")
    filled = [line.strip() for line in lines if line.strip()]
    # A table may have a heading, which does not begin with a digit.
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

    A label is matched whole, then ignoring case, then by one of its comma-separated synonyms,
    then by a part that only one label has. Raises UsageError for no match, or several.
    """
    text = text.strip()
    if not text:
        raise UsageError("--target is empty; give an index, top1 or a label")
    ranked = RANKED.fullmatch(text)
    if ranked:
        count = _within(ranked[1], classes + 1)
        if not count:
            raise UsageError(f"--target {text}: the model has {classes} classes")
        return Ranked(count)
    if re.fullmatch(r"[+-]?[0-9]+", text):
        index = None if text.startswith("-") else _within(text.removeprefix("+"), classes)
        if index is None:
            raise UsageError(f"--target {text}: class indices are 0 to {classes - 1}")
        return index
    if labels is None:
        raise UsageError(
            f"--target {text}: the classes have no names; give an index, top1 or --labels FILE"
        )
    return _by_name(text, {i: n for i, n in labels.items() if 0 <= i < classes})


def _within(digits: str, end: int) -> int | None:
    """The number if it is below ``end``; Python refuses to parse thousands of digits."""
    digits = digits.lstrip("0") or "0"
    return int(digits) if len(digits) <= len(str(end)) and int(digits) < end else None


def _by_name(text: str, labels: Labels) -> int:
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
            fitting = (f"{index} ({escaped(labels[index], 60)})" for index in found)
            raise UsageError(
                f"--target {text}: several classes match, give an index: "
                f"{listed(fitting, len(found), 8)}"
            )
    by_case = {name.casefold(): f"{escaped(name, 60)} ({i})" for i, name in labels.items()}
    close = [by_case[name] for name in get_close_matches(wanted, by_case, n=3, cutoff=0.5)]
    hint = f"; did you mean {' or '.join(close)}?" if close else "; give an index"
    raise UsageError(f"--target {text}: no such class{hint}")
