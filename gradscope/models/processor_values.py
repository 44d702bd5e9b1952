"""The values in a specification of preprocessing: sizes, numbers, filters.

Each raises what ``wrong`` makes of a message where the value is none.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

from gradscope.models.preprocessing import FILTERS
from gradscope.text import plural

#: The error for a message: that of an option, or of a file.
Wrong = Callable[[str], Exception]


def size_of(value: Any, key: str, wrong: Wrong) -> int | tuple[int, int]:
    """The shorter edge, or height and width."""
    if isinstance(value, Mapping):
        if "shortest_edge" in value:
            value = value["shortest_edge"]
        elif "height" in value and "width" in value:
            value = (value["height"], value["width"])
        else:
            raise wrong(f"{key} has neither shortest_edge nor height and width")
    if isinstance(value, list | tuple):
        height, width = whole(value, key, wrong, 2)
        return height, width
    return whole(value, key, wrong, 1)[0]


def whole(value: Any, key: str, wrong: Wrong, count: int) -> tuple[int, ...]:
    """So many whole numbers."""
    found = numbers(value, key, wrong, count)
    if any(n != int(n) for n in found):
        raise wrong(f"{key} is {value!r}; pixels are whole numbers")
    return tuple(int(n) for n in found)


def numbers(value: Any, key: str, wrong: Wrong, count: int | None = None) -> tuple[float, ...]:
    """Finite numbers, ``count`` of them where it is given; one may stand alone."""
    values = value if isinstance(value, list | tuple) else [value]
    if not values or not all(map(_is_finite, values)) or (count and len(values) != count):
        wanted = plural(count, "finite number") if count else "a list of finite numbers"
        raise wrong(f"{key} is {value!r}, not {wanted}")
    return tuple(float(v) for v in values)


def _is_finite(value: Any) -> bool:
    try:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        return number and math.isfinite(value)
    # An integer beyond every float.
    except OverflowError:
        return False


def positive(values: tuple[float, ...], key: str, wrong: Wrong) -> tuple[float, ...]:
    """The same numbers, all above zero."""
    if min(values) <= 0:
        raise wrong(f"{key} contains {min(values):g}; it has to be above zero")
    return values


def filter_named(value: Any, wrong: Wrong) -> str:
    """The filter of a name or of Pillow's number. Raises what ``wrong`` makes of a message."""
    by_number = {f.value: name for name, f in FILTERS.items()}
    number = isinstance(value, int) and not isinstance(value, bool)
    name = by_number.get(value, "") if number else str(value).lower()
    if name not in FILTERS:
        raise wrong(f"unknown filter {value!r}; the filters are {', '.join(FILTERS)}")
    return name


def value_of(text: str) -> Any:
    """What a value is as it is typed: 224, 224x160, 0.5/0.5/0.5, true, or JSON."""
    by_word = {"true": True, "false": False, "none": None, "null": None}
    if text.lower() in by_word:
        return by_word[text.lower()]
    sides = re.fullmatch(r"([0-9]{1,9})x([0-9]{1,9})", text)
    if sides:
        return [int(side) for side in sides.groups()]
    if "/" in text:
        return [value_of(part) for part in text.split("/")]
    try:
        return json.loads(re.sub(r"^\((.*)\)$", r"[\1]", text))
    except (ValueError, RecursionError):
        return text
