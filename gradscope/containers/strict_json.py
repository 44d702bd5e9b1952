"""JSON that strangers wrote: parsed strictly, so that no two readers understand it differently."""

from __future__ import annotations

import json
from collections.abc import Iterable

from gradscope.text import quoted

#: Deeper documents are refused: the parser of the safetensors library stops here too.
MAX_DEPTH = 128


class MalformedError(Exception):
    """What is wrong with some input, said where its path is not known yet."""


class Repeated(dict[str, object]):
    """A JSON object in which a key occurs more than once; ``pairs`` keeps every occurrence."""

    def __init__(self, pairs: list[tuple[str, object]]) -> None:
        super().__init__(pairs)
        self.pairs = pairs

    def repeated(self) -> list[str]:
        """The keys that occur more than once, in order of their second occurrence."""
        seen: set[str] = set()
        again: dict[str, None] = {}
        for key, _ in self.pairs:
            (again.setdefault(key) if key in seen else seen.add(key))
        return list(again)


def parse(data: bytes, what: str, *, non_finite: bool = False) -> object:
    """Parse strictly: UTF-8 only, and a repeated key yields a `Repeated`.

    ``what`` names the document in messages. NaN and Infinity, which JSON does not have and Python
    writes, are refused unless ``non_finite``. Raises MalformedError.
    """
    refuse = None if non_finite else _refuse_constant
    text = _decoded(data, what)
    try:
        value = json.loads(text, parse_constant=refuse)
        # Every key has a colon, so as many colons as keys that are left leave no room for repeats.
        if text.count(":") == _keys(value):
            return value
        return json.loads(text, object_pairs_hook=_object, parse_constant=refuse)
    except json.JSONDecodeError as error:
        at = len(text[: error.pos].encode())
        raise MalformedError(f"{what} is not valid JSON: {error.msg} at byte {at:,}") from None
    except RecursionError:
        raise MalformedError(f"{what} is nested too deeply") from None
    except ValueError:
        raise MalformedError(f"{what} holds an integer of thousands of digits") from None


def parse_once(data: bytes, what: str, *, non_finite: bool = False) -> object:
    """Like ``parse``, where no key may be repeated in any object. Raises MalformedError."""
    value = parse(data, what, non_finite=non_finite)
    for container in _containers(value):
        if isinstance(container, Repeated):
            key = container.repeated()[0]
            raise MalformedError(f"{what} has the key {quoted(key)} twice in one object")
    return value


def is_text(value: str) -> bool:
    """Whether a string can be written out: JSON escapes can smuggle in half a surrogate pair."""
    if value.isascii():
        return True
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def type_name(value: object) -> str:
    """What a parsed value is, in JSON's words and with an article: ``an object``."""
    kinds: list[tuple[type, str]] = [
        (dict, "an object"),
        (list, "an array"),
        (str, "a string"),
        (bool, "a boolean"),
        (int, "an integer"),
        (float, "a number with a fraction or exponent"),
    ]
    return next((words for kind, words in kinds if isinstance(value, kind)), "null")


def is_too_deep(value: object) -> bool:
    """Whether a value is nested deeper than MAX_DEPTH levels below its own."""
    level: list[object] = [value]
    for _ in range(MAX_DEPTH - 1):
        level = [child for item in level for child in _children(item)]
        if not level:
            return False
    return True


def _containers(value: object) -> Iterable[object]:
    waiting = [value]
    while waiting:
        found = waiting.pop()
        if isinstance(found, (dict, list)):
            yield found
            waiting.extend(_children(found))


def _children(value: object) -> Iterable[object]:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()


def _keys(value: object) -> int:
    """The keys of all objects, those of objects in arrays aside."""
    count, level = 0, [value] if isinstance(value, dict) else []
    while level:
        count += sum(map(len, level))
        level = [child for found in level for child in found.values() if type(child) is dict]
    return count


def _decoded(data: bytes, what: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise MalformedError(f"{what} is not UTF-8 at byte {error.start:,}") from None


def _object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    plain = dict(pairs)
    return plain if len(plain) == len(pairs) else Repeated(pairs)


def _refuse_constant(literal: str) -> object:
    raise MalformedError(f"{literal} is used as a number, which JSON does not have")
