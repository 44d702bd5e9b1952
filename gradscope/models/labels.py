"""What classes are called, and which of them is meant."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
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

    Also ``imagenet_class_index.json`` and the ``id2label`` of a Hugging Face ``config.json``.
    Raises InputError.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise InputError(path, "missing", "there is no such file") from None
    except OSError as error:
        raise InputError(path, "missing", f"it cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise InputError(path, "malformed", "labels are text in UTF-8") from None
    found = _from_json(path, text) if text.lstrip()[:1] in ("{", "[") else dict(_from_lines(text))
    if not found:
        raise InputError(path, "malformed", "it holds no labels")
    return MappingProxyType(found)


def beside(model: str) -> Labels | None:
    """The names in a file next to the model, if there is one."""
    folder = Path(model) if Path(model).is_dir() else Path(model).parent
    for name in _BESIDE:
        if (folder / name).is_file():
            return read_labels(str(folder / name))
    config = folder / "config.json"
    if config.is_file() and '"id2label"' in config.read_text(encoding="utf-8", errors="replace"):
        return read_labels(str(config))
    return None


def of_model(module: object, classes: int) -> Labels | None:
    """The names that a model brings along, or ImageNet's where it has as many classes."""
    named = getattr(getattr(module, "config", None), "id2label", None)
    if isinstance(named, Mapping) and named:
        return MappingProxyType({int(index): str(name) for index, name in named.items()})
    return imagenet() if classes == _IMAGENET_CLASSES else None


def _from_json(path: str, text: str) -> dict[int, str]:
    try:
        value: Any = json.loads(text)
    except ValueError as error:
        raise InputError(path, "malformed", f"it is no JSON ({error})") from None
    if isinstance(value, list):
        return {index: str(name) for index, name in enumerate(value)}
    value = value.get("id2label", value)
    try:
        pairs = {int(index): _name(name) for index, name in value.items()}
    except (ValueError, AttributeError, TypeError, IndexError):
        pairs = _reversed(path, value)
    return dict(sorted(pairs.items()))


def _name(value: Any) -> str:
    # ["n01440764", "tench"], as Keras has it.
    return str(value[-1]) if isinstance(value, list) else str(value)


def _reversed(path: str, value: Any) -> dict[int, str]:
    """``label2id``: names to indices."""
    try:
        return {int(index): str(name) for name, index in value.items()}
    except (ValueError, AttributeError, TypeError):
        message = "labels are a list, or an object of index to name"
        raise InputError(path, "malformed", message) from None


_NUMBERED = re.compile(r"(\d+)\s*[:,\t]\s*(.+)")
_SYNSET = re.compile(r"n\d{8}[\s,]+(.+)")


def _from_lines(text: str) -> Iterator[tuple[int, str]]:
    lines = text.splitlines()
    while lines and not lines[-1].strip():
        lines.pop()
    numbered = [_NUMBERED.fullmatch(line.strip()) for line in lines if line.strip()]
    if numbered and all(numbered):
        yield from ((int(m[1]), _plain(m[2])) for m in numbered if m)
        return
    yield from ((index, _plain(line)) for index, line in enumerate(lines))


def _plain(name: str) -> str:
    synset = _SYNSET.fullmatch(name.strip())
    return (synset[1] if synset else name).strip().strip("'\"")


def parse_target(text: str, labels: Labels | None, classes: int) -> int | Ranked:
    """``281``, ``top1``, ``top5``, or a label; a number is always an index.

    A label is matched whole, then whatever its case, then one of its comma-separated synonyms,
    then a part that only one label has. Raises UsageError for what names no class, or several.
    """
    text = text.strip()
    ranked = re.fullmatch(r"top-?(\d+)", text)
    if ranked:
        if not 1 <= int(ranked[1]) <= classes:
            raise UsageError(f"--target {text}: the model has {classes} classes")
        return Ranked(int(ranked[1]))
    if re.fullmatch(r"-?\d+", text):
        if not 0 <= int(text) < classes:
            raise UsageError(f"--target {text}: classes go from 0 to {classes - 1}")
        return int(text)
    if labels is None:
        raise UsageError(
            f"--target {text}: the classes have no names; give an index, top1, or --labels FILE"
        )
    return _named(text, {i: n for i, n in labels.items() if 0 <= i < classes})


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
    close = get_close_matches(text, labels.values(), n=3, cutoff=0.5)
    hint = f"; did you mean {' or '.join(close)}?" if close else ""
    raise UsageError(f"--target {text}: no class has this name{hint}")
