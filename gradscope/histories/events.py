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
from numpy.typing import NDArray

from gradscope.checkpoints.tensors import Failure
from gradscope.containers.files import stamp
from gradscope.errors import InputError, UsageError
from gradscope.histories.history import History, Layer, Status
from gradscope.histories.names import (
    clean,
    gradient_of,
    guessed_kind,
    is_loss,
    is_rate,
    is_total,
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

    A last record that was not written to its end is left out, with a note; a damaged file among
    others costs what follows the damage. Raises InputError when nothing in them is about
    gradients, UsageError when a folder holds several runs.
    """
    found, failures = _Found(), []
    for file in files:
        try:
            for step, tag, value in _values(file, found.notes):
                found.add(os.path.dirname(file), step, tag, value)
        except InputError as error:
            if len(files) == 1:
                raise
            failures.append(error)
    if failures and not (found.norms or found.total.values):
        raise failures[0]
    found.refuse_several_runs(path)
    return found.history(path, files, failures)


@dataclass(frozen=True, slots=True)
class _Histogram:
    numel: int
    l2: float
    max_abs: float
    #: Whether the norm is that of the elements, not of the middles of bins.
    exact: bool = True


@dataclass(slots=True)
class _Series:
    """The values of one tag by step, the folders that they are from, and what histograms add."""

    values: dict[int, float] = field(default_factory=dict)
    folders: set[str] = field(default_factory=set)
    tops: dict[int, float] = field(default_factory=dict)
    numel: int | None = None

    def add(self, folder: str, step: int, value: float) -> None:
        self.values[step] = value
        self.folders.add(folder)


@dataclass(slots=True)
class _Found:
    norms: dict[str, _Series] = field(default_factory=dict)
    rates: dict[str, _Series] = field(default_factory=dict)
    loss: _Series = field(default_factory=_Series)
    total: _Series = field(default_factory=_Series)
    notes: list[str] = field(default_factory=list)
    binned: bool = False

    def add(self, folder: str, step: int, tag: str, value: float | _Histogram) -> None:
        if isinstance(value, _Histogram):
            self._add_histogram(folder, step, tag, value)
        elif is_total(tag):
            self.total.add(folder, step, value)
        elif is_rate(tag):
            self.rates.setdefault(tag, _Series()).add(folder, step, value)
        elif is_loss(tag):
            self.loss.add(folder, step, value)
        elif (name := gradient_of(tag)) is not None:
            self.norms.setdefault(name, _Series()).add(folder, step, value)

    def _add_histogram(self, folder: str, step: int, tag: str, value: _Histogram) -> None:
        name = gradient_of(tag)
        if name is not None:
            series = self.norms.setdefault(name, _Series())
            series.add(folder, step, value.l2)
            series.tops[step], series.numel = value.max_abs, value.numel
            self.binned |= not value.exact

    def refuse_several_runs(self, path: str) -> None:
        """Restarts share a folder; one series in two folders is of two runs."""
        if len(self.loss.folders) > 1:  # add_scalars writes loss_train/ and loss_val/
            self.loss = _Series()
            self.notes.append(
                "the loss is in several folders, which may not be of training: left out"
            )
        for name, series in (*self.norms.items(), ("the total norm", self.total)):
            if len(series.folders) > 1:
                first, second = sorted(os.path.relpath(f, path) for f in series.folders)[:2]
                raise UsageError(
                    f"{path} holds several runs: {clean(name)} is in {clean(first)} and in "
                    f"{clean(second)}; give the folder of one run"
                )

    def history(self, path: str, files: Sequence[str], failures: Sequence[InputError]) -> History:
        if not self.norms and not self.total.values:
            message = "has no series of gradients: a tag such as grad/NAME or NAME/grad_norm"
            raise InputError(path, "malformed", message)
        about = list(self.norms.values()) or [self.total]
        steps = np.array(sorted({step for series in about for step in series.values}), np.int64)
        place = {int(step): i for i, step in enumerate(steps)}
        l2, status = _table([series.values for series in self.norms.values()], place)
        tops = [series.tops for series in self.norms.values()]
        low = np.argwhere(l2 < 0)
        if len(low):
            message = f"the norm of {clean(list(self.norms)[low[0][1]])} is below zero"
            raise InputError(path, "malformed", f"{message} at step {steps[low[0][0]]}")
        return History(
            path=path,
            format="tensorboard",
            nbytes=sum(os.path.getsize(file) for file in files),
            steps=steps,
            layers=tuple(Layer(clean(n), guessed_kind(n), s.numel) for n, s in self.norms.items()),
            l2=l2,
            status=status,
            max_abs=_table(tops, place)[0] if tops and all(tops) else None,
            loss=_line(self.loss, place),
            total_l2=_line(self.total, place),
            lr=self._rates(place),
            notes=(*self.notes, *self._said()),
            failures=tuple(
                Failure(e.kind, f"{os.path.relpath(e.path, path)}: {e.message}") for e in failures
            ),
            approximate={"l2": "from histogram bins"} if self.binned else {},
        )

    def _said(self) -> Iterator[str]:
        if self.binned:
            yield "norms are from the middles of histogram bins, which are approximate"
        if not self.norms:
            yield "only the total gradient norm is here: nothing can be said of layers"

    def _rates(self, place: dict[int, int]) -> NDArray[np.float64] | None:
        lines = [_line(series, place) for series in self.rates.values()]
        known = [line for line in lines if line is not None]
        return np.stack(known, axis=1) if known else None


def _table(
    found: Sequence[dict[int, float]], place: dict[int, int]
) -> tuple[NDArray[np.float64], NDArray[np.uint8]]:
    values = np.full((len(place), len(found)), np.nan)
    status = np.full(values.shape, Status.NOT_RECORDED, np.uint8)
    for column, series in enumerate(found):
        for step, value in series.items():
            values[place[step], column], status[place[step], column] = value, Status.RECORDED
    return values, status


def _line(found: _Series, place: dict[int, int]) -> NDArray[np.float64] | None:
    if not found.values:
        return None
    return _table([{s: v for s, v in found.values.items() if s in place}], place)[0][:, 0]


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
    from gradscope.containers.crc import crc32c

    size = stamp(path)[0]
    with open(path, "rb") as file:
        at = 0
        while head := file.read(12):
            if len(head) == 12 and struct.unpack_from("<I", head, 8)[0] != _masked(head[:8]):
                raise _wrong(path, f"the record at byte {at} has a wrong checksum")
            length = struct.unpack_from("<Q", head)[0] if len(head) == 12 else 0
            if len(head) < 12 or at + length + 16 > size:
                notes.append(f"{os.path.basename(path)} ends inside a record, which was left out")
                return
            if length > _MOST_RECORD:
                raise _wrong(path, f"the record at byte {at} has {length} bytes")
            data, check = file.read(length), file.read(4)
            if len(check) < 4 or struct.unpack("<I", check)[0] != _mask(crc32c(data)):
                raise _wrong(path, f"the data of the record at byte {at} have a wrong checksum")
            at += length + 16
            yield data


def _wrong(path: str, message: str) -> InputError:
    return InputError(path, "malformed", f"{message}: copy the file again, or drop it")


def _masked(data: bytes) -> int:
    """TFRecord's masked CRC-32C of a few bytes: what tells the format needs no compiler."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = (crc >> 1) ^ (0x82F63B78 & -(crc & 1))
    return _mask(crc ^ 0xFFFFFFFF)


def _mask(crc: int) -> int:
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
            found = _of_tensor(value)
    if tag and found is not None:
        yield tag, found


def _histogram(data: bytes) -> _Histogram | None:
    """HistogramProto: min 1, max 2, num 3, sum 4, sum_squares 5."""
    facts = {number: value for number, value in _fields(data) if isinstance(value, float)}
    if 3 not in facts or 5 not in facts or not 0 <= facts[3] < 2**62:
        return None
    top = max(abs(facts.get(1, 0.0)), abs(facts.get(2, 0.0)))
    square = facts[5]
    return _Histogram(int(facts[3]), math.sqrt(square) if square >= 0 else math.nan, top)


#: TensorProto's dtypes of real numbers: code -> (NumPy's, the field of unpacked values).
_REAL = {1: ("<f4", 5), 2: ("<f8", 6)}


def _of_tensor(data: bytes) -> float | _Histogram | None:
    """TensorProto: dtype 1, shape 2, content 4, float_val 5, double_val 6.

    A number is a scalar; rows of (low, high, count) are TensorFlow 2's histogram.
    """
    fields: dict[int, list[int | float | bytes]] = {}
    for number, value in _fields(data):
        fields.setdefault(number, []).append(value)
    code = fields.get(1, [0])[0]
    if not isinstance(code, int) or code not in _REAL:
        return None
    dtype, unpacked = _REAL[code]
    parts = fields.get(4) or fields.get(unpacked) or []
    whole = b"".join(_packed(part, dtype) for part in parts)
    if not whole or len(whole) % np.dtype(dtype).itemsize:
        return None
    values = np.frombuffer(whole, dtype)
    if len(values) == 1:
        return float(values[0])
    return _of_bins(values.astype(np.float64)) if len(values) % 3 == 0 else None


def _packed(part: int | float | bytes, dtype: str) -> bytes:
    if isinstance(part, bytes):
        return part
    return np.array(part, dtype).tobytes() if isinstance(part, float) else b""


def _of_bins(values: NDArray[np.float64]) -> _Histogram | None:
    low, high, count = values.reshape(-1, 3).T
    total = float(count.sum())
    if not 0 <= total < 2**62 or bool(np.any(low > high)) or bool(np.any(count < 0)):
        return None
    square = float((count * ((low + high) / 2) ** 2).sum())
    top = float(np.abs(values.reshape(-1, 3)[count > 0, :2]).max(initial=0.0))
    return _Histogram(int(total), math.sqrt(square), top, exact=False)


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
