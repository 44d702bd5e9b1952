"""Targets that are no class of the whole picture, as they are written."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from gradscope.errors import UsageError

#: How each kind is written, after its name and a colon.
FORMS = {
    "pixel": "pixel:Y,X or pixel:Y,X:CLASS, in the picture's pixels from its top left, 0,0",
    "mask": "mask:CLASS, an index or a label",
    "box": "box:N, the detections from the surest, 0",
    "similar": "similar:IMAGE, another picture",
    "channel": "channel:K, one number of an embedding",
    "text": "text:FILE, an .npy, .npz or .safetensors of text features",
}
_CLASS = r"(?::(?P<of>.+))?"
_WRITTEN = {
    "pixel": re.compile(rf"(?P<place>\d{{1,9}}\s*,\s*\d{{1,9}}){_CLASS}"),
    "mask": re.compile(r"(?P<of>.+)(?P<place>)"),
    "box": re.compile(rf"(?P<place>\d{{1,9}}){_CLASS}"),
    "similar": re.compile(r"(?P<place>.+)(?P<of>)"),
    "channel": re.compile(r"(?P<place>)(?P<of>\d{1,9})"),
    "text": re.compile(r"(?P<place>.+)(?P<of>)"),
}


@dataclass(frozen=True, slots=True)
class Aim:
    """One of the kinds in ``FORMS``: where it is, and which class is meant there."""

    kind: str
    place: str
    of: str = "top1"

    @property
    def numbers(self) -> tuple[int, ...]:
        """The numbers of a place."""
        return tuple(map(int, self.place.split(",")))

    def __str__(self) -> str:
        """As it was written, without the folder of a file."""
        if self.kind in ("similar", "text"):
            return f"{self.kind}:{Path(self.place).name}"
        return f"{self.kind}:{self.place.replace(' ', '') or self.of}"


def parse_aim(target: str) -> Aim | None:
    """The aim of a target; None for a class. Raises UsageError for one that is written wrongly."""
    kind, colon, rest = target.strip().partition(":")
    if not colon or kind not in FORMS:
        return None
    found = _WRITTEN[kind].fullmatch(rest.strip())
    if found is None:
        raise UsageError(f"--target {target}: it is written {FORMS[kind]}")
    place, of = found["place"], found["of"] or "top1"
    if kind == "text" and not Path(place).is_file() and Path(place.rpartition(":")[0]).is_file():
        place, _, of = place.rpartition(":")
    return Aim(kind, place, of)
