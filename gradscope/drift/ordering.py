"""In which order the checkpoints of a series were saved, and what each is called, by paths."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence

from gradscope.checkpoints.series import by_number

#: What stands before the number that counts, the surest first; losses and sizes are numbers, too.
_LABELS = ("step", "iter(?:ation)?", "update", "epoch")
_NUMBER = r"(?P<number>\d+(?:\.\d+)?(?:e\d+)?)(?P<unit>[kmb]?)(?![a-z0-9])"
_UNITS = {"": 1.0, "k": 1e3, "m": 1e6, "b": 1e9}
#: What stands for a number that is not told.
_FIRST, _LAST = (
    re.compile(rf"(?<![a-z])({words})(?![a-z])")
    for words in ("init|initial|start|pretrained", "final|last|latest|end")
)


def in_order(paths: Sequence[str]) -> list[str]:
    """More than two by the steps in their names where each has one, else as they were given.

    ``init`` is before every number, ``final`` and ``last`` behind them.
    """
    place = {path: _place(name) for path, name in zip(paths, distinct(paths), strict=True)}
    if len(paths) < 3 or None in place.values():
        return list(paths)
    natural = {path: at for at, path in enumerate(by_number(paths))}
    counted = [path for path in paths if place[path] == 1]
    steps = _steps(dict(zip(paths, distinct(paths), strict=True)), counted)
    return sorted(paths, key=lambda p: (place[p], steps.get(p, 0.0), natural[p]))


def distinct(paths: Sequence[str]) -> list[str]:
    """Each path without the folders that all have, at its start and at its end."""
    parts = [os.path.abspath(path).split(os.sep) for path in paths]
    shortest = min(map(len, parts))
    head = next((n for n in range(shortest) if len({p[n] for p in parts}) > 1), shortest - 1)
    most = shortest - head
    tail = next((n for n in range(1, most) if len({p[-n] for p in parts}) > 1), most) - 1
    return [os.sep.join(p[head : len(p) - tail]) for p in parts]


def _place(name: str) -> int | None:
    """0 of what is before all steps, 1 of a step, 2 of what is behind them."""
    name = name.lower()
    if _LAST.search(name):
        return 2
    return 0 if _FIRST.search(name) else 1 if re.search(r"\d", name) else None


def _steps(names: dict[str, str], counted: Sequence[str]) -> dict[str, float]:
    """The number of each that counts: behind one word in all of them, or the only one in each."""
    for label in (*(f"{word}s?[=_-]?" for word in _LABELS), None):
        pattern = re.compile((label or r"(?<![a-z0-9.])") + _NUMBER)
        found = {path: list(pattern.finditer(names[path].lower())) for path in counted}
        if all(len(f) == 1 or (f and label) for f in found.values()):
            return {p: float(f[-1]["number"]) * _UNITS[f[-1]["unit"]] for p, f in found.items()}
    return {}
