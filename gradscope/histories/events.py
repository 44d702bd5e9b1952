"""TensorBoard event files: their records and the few protobuf fields that gradients are in.

TFRecord framing (length, CRC, data, CRC) around Event messages; scalars and histograms are all
that is read. torch's histograms carry ``num`` and ``sum_squares``, so the L2 norm is exact. The
tensorboard package is not needed; its accumulator keeps a sample of each series.
"""

from __future__ import annotations

import math
import os
import re
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from gradscope.errors import InputError
from gradscope.histories.history import History, Layer, Status
from gradscope.histories.names import guessed_kind

_GRADIENT = re.compile(
    r"(^|[/_.])(grads?|gradients?|grad_norms?|gradient_norms?|l2_norm/grad)([/_.]|$)", re.I
)
_PREFIX = re.compile(
    r"^(?:grad_2(?:\.0)?_norm|l2_norm/grad|grad_norms?|gradient_norms?|gradients?|grads?)[/_.]|[/_.](?:grad_norm|gradient_norm|grads?|gradients?)$",
    re.I,
)
_LOSS = re.compile(r"(^|[/_])loss$", re.I)
_RATE = re.compile(r"^(lr|learning_rate|train/learning_rate|lr-.*)$", re.I)
_TOTAL = re.compile(
    r"^(train/)?(grad_norm|total_grad_norm|total_norm|grad_norm_total|grad_2(\.0)?_norm_total)$",
    re.I,
)
_MOST_RECORD = 1 << 28


def is_events(start: bytes) -> bool:
    """Whether a file begins with a TFRecord whose length checks out and holds an Event."""
    if len(start) < 16:
        return False
    length, crc = struct.unpack_from("<QI", start)
    return bool(length < 1 << 20 and crc == _masked(start[:8]))


def event_files(folder: str) -> list[str]:
    """The event files below a folder, in the order they were begun (their names carry the time)."""
    found = [
        os.path.join(where, name)
        for where, _, names in os.walk(folder)
        for name in names
        if "tfevents" in name
    ]
    return sorted(found, key=lambda path: (_began(path), path))


def _began(path: str) -> float:
    match = re.search(r"tfevents\.(\d+)", path)
    return float(match[1]) if match else 0.0


def read_events(path: str, files: Sequence[str]) -> History:
    """A history from event files; where several have a step, the later file's value stays.

    Raises InputError when a file is damaged or nothing in them is about gradients. A last record
    that was not written to its end is left out, with a note.
    """
    found = _Found()
    for file in files:
        for step, tag, value in _values(file, found.notes):
            found.add(step, tag, value)
    return found.history(path, files)


@dataclass(slots=True)
class _Histogram:
    numel: float
    l2: float
    max_abs: float


@dataclass(slots=True)
class _Found:
    norms: dict[str, dict[int, float]] = field(default_factory=dict)
    tops: dict[str, dict[int, float]] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)
    loss: dict[int, float] = field(default_factory=dict)
    rate: dict[int, float] = field(default_factory=dict)
    total: dict[int, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def add(self, step: int, tag: str, value: float | _Histogram) -> None:
        if isinstance(value, _Histogram):
            if _GRADIENT.search(tag):
                name = _PREFIX.sub("", tag)
                self.norms.setdefault(name, {})[step] = value.l2
                self.tops.setdefault(name, {})[step] = value.max_abs
                self.sizes[name] = int(value.numel)
        elif _TOTAL.match(tag):
            self.total[step] = value
        elif _RATE.match(tag):
            self.rate[step] = value
        elif _GRADIENT.search(tag):
            self.norms.setdefault(_PREFIX.sub("", tag), {})[step] = value
        elif _LOSS.search(tag):
            self.loss[step] = value

    def history(self, path: str, files: Sequence[str]) -> History:
        if not self.norms and not self.total:
            raise InputError(
                path, "malformed", "has no series of gradients: a tag with grad or gradient in it"
            )
        about = [*self.norms.values(), self.total] if self.norms else [self.total]
        steps = np.array(sorted({step for series in about for step in series}), dtype=np.int64)
        place = {int(step): i for i, step in enumerate(steps)}
        l2 = _table(self.norms, place)
        tops = {name: self.tops.get(name, {}) for name in self.norms}
        lr = _line(self.rate, place)
        return History(
            path=path,
            format="tensorboard",
            nbytes=sum(os.path.getsize(file) for file in files),
            steps=steps,
            layers=tuple(Layer(n, guessed_kind(n), self.sizes.get(n)) for n in self.norms),
            l2=l2[0],
            status=l2[1],
            max_abs=_table(tops, place)[0] if len(self.tops) == len(self.norms) and tops else None,
            loss=_line(self.loss, place),
            total_l2=_line(self.total, place),
            lr=None if lr is None else lr[:, None],
            notes=tuple(self.notes),
        )


def _table(
    found: dict[str, dict[int, float]], place: dict[int, int]
) -> tuple[np.ndarray, np.ndarray]:
    values = np.full((len(place), len(found)), np.nan)
    status = np.zeros(values.shape, np.uint8)
    for column, series in enumerate(found.values()):
        for step, value in series.items():
            values[place[step], column], status[place[step], column] = value, Status.RECORDED
    return values, status


def _line(found: dict[int, float], place: dict[int, int]) -> np.ndarray | None:  # fmt: skip
    if not found:
        return None
    out = np.full(len(place), np.nan)
    for step, value in found.items():
        if step in place:
            out[place[step]] = value
    return out


# --- the container --------------------------------------------------------------------------------


def _values(path: str, notes: list[str]) -> Iterator[tuple[int, str, float | _Histogram]]:
    for record in _records(path, notes):
        try:
            yield from _event(record)
        except (ValueError, struct.error, IndexError) as error:
            raise InputError(
                path, "malformed", f"holds an event that cannot be read: {error}"
            ) from None


def _records(path: str, notes: list[str]) -> Iterator[bytes]:
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        at = 0
        while head := file.read(12):
            length = struct.unpack_from("<Q", head)[0] if len(head) == 12 else 0
            if len(head) < 12 or at + length + 16 > size:
                if len(head) == 12 and struct.unpack_from("<I", head, 8)[0] != _masked(head[:8]):
                    raise InputError(
                        path, "malformed", f"the record at byte {at} has a wrong checksum"
                    )
                notes.append(f"{os.path.basename(path)} ends inside a record, which was left out")
                return
            if struct.unpack_from("<I", head, 8)[0] != _masked(head[:8]) or length > _MOST_RECORD:
                raise InputError(path, "malformed", f"the record at byte {at} has a wrong checksum")
            data = file.read(length)
            if struct.unpack("<I", file.read(4))[0] != _masked(data):
                raise InputError(
                    path, "malformed", f"the data of the record at byte {at} have a wrong checksum"
                )
            at += length + 16
            yield data


_POLYNOMIAL = 0x82F63B78


def _crc_table() -> list[int]:
    table = []
    for value in range(256):
        for _ in range(8):
            value = (value >> 1) ^ (_POLYNOMIAL if value & 1 else 0)
        table.append(value)
    return table


_CRC = _crc_table()


def _masked(data: bytes) -> int:
    """TFRecord's masked CRC-32C."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = _CRC[(crc ^ byte) & 0xFF] ^ (crc >> 8)
    crc ^= 0xFFFFFFFF
    return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF


# --- the messages ---------------------------------------------------------------------------------


def _event(data: bytes) -> Iterator[tuple[int, str, float | _Histogram]]:
    """Event: step is field 2, summary field 5; Summary: value field 1."""
    step, summaries = 0, []
    for number, value in _fields(data):
        if number == 2 and isinstance(value, int):
            step = value - (1 << 64) if value >= 1 << 63 else value
        elif number == 5 and isinstance(value, bytes):
            summaries.append(value)
    for summary in summaries:
        for number, value in _fields(summary):
            if number == 1 and isinstance(value, bytes):
                yield from ((step, tag, found) for tag, found in _value(value))


def _value(data: bytes) -> Iterator[tuple[str, float | _Histogram]]:
    """Summary.Value: tag 1, simple_value 2, histo 5, tensor 8."""
    tag = ""
    found: float | _Histogram | None = None
    for number, value in _fields(data):
        if number == 1 and isinstance(value, bytes):
            tag = value.decode("utf-8", "replace")
        elif number == 2 and isinstance(value, float):
            found = value
        elif number == 5 and isinstance(value, bytes):
            found = _histogram(value)
        elif number == 8 and isinstance(value, bytes):
            found = _scalar_tensor(value)
    if tag and found is not None:
        yield tag, found


def _histogram(data: bytes) -> _Histogram | None:
    """HistogramProto: min 1, max 2, num 3, sum 4, sum_squares 5."""
    facts = {number: value for number, value in _fields(data) if isinstance(value, float)}
    if 3 not in facts or 5 not in facts:
        return None
    top = max(abs(facts.get(1, 0.0)), abs(facts.get(2, 0.0)))
    square = facts[5]
    return _Histogram(facts[3], math.sqrt(square) if square >= 0 else math.nan, top)


def _scalar_tensor(data: bytes) -> float | None:
    """TensorProto of one number: content 4, float_val 5, double_val 6."""
    for number, value in _fields(data):
        if number == 4 and isinstance(value, bytes) and len(value) in (4, 8):
            return float(struct.unpack("<f" if len(value) == 4 else "<d", value)[0])
        if number in (5, 6):
            if isinstance(value, float):
                return value
            if isinstance(value, bytes) and len(value) == (4 if number == 5 else 8):
                return float(struct.unpack("<f" if number == 5 else "<d", value)[0])
    return None


def _fields(data: bytes) -> Iterator[tuple[int, int | float | bytes]]:
    """The fields of a protobuf message: (number, value) in wire form."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        number, wire = key >> 3, key & 7
        if wire == 0:
            value, at = _varint(data, at)
            yield number, value
        elif wire in (1, 5):
            size = 8 if wire == 1 else 4
            yield number, struct.unpack_from("<d" if wire == 1 else "<f", data, at)[0]
            at += size
        elif wire == 2:
            size, at = _varint(data, at)
            if at + size > len(data):
                raise ValueError("a field runs past its message")
            yield number, data[at : at + size]
            at += size
        else:
            raise ValueError(f"wire type {wire}")


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at += 1
        if byte < 0x80:
            return value, at
        shift += 7
        if shift > 63:
            raise ValueError("a number is too long")
