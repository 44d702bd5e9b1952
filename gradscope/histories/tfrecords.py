"""Event files as bytes: TFRecord framing around the few protobuf fields that gradients are in.

A record is a length, its CRC, the data and their CRC; the data are an Event message, of which
scalars and histograms are all that is read. torch's histograms carry ``num`` and ``sum_squares``,
so the L2 norm is exact. The tensorboard package is not needed; its accumulator keeps a sample of
each series.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gradscope.containers.crc import crc32c
from gradscope.containers.files import stamp
from gradscope.errors import InputError
from gradscope.text import size

_MOST_RECORD = 1 << 28


def is_events(start: bytes) -> bool:
    """Whether a file begins with a TFRecord whose length checks out and holds an Event."""
    if len(start) < 16:
        return False
    length, crc = struct.unpack_from("<QI", start)
    return bool(length < 1 << 20 and crc == _masked(start[:8]))


@dataclass(frozen=True, slots=True)
class Histogram:
    """What a histogram says of the gradient that it was made of."""

    numel: int
    l2: float
    max_abs: float
    #: Whether the norm is that of the elements, not of the middles of bins.
    exact: bool = True


def logged_values(path: str, notes: list[str]) -> Iterator[tuple[int, str, float | Histogram]]:
    """(step, tag, value) of each scalar and histogram; ``notes`` is told of a cut-off end.

    Raises InputError for a damaged record, after what precedes it.
    """
    for record in _records(path, notes):
        try:
            yield from _event(record)
        except (ValueError, struct.error, IndexError) as error:
            raise InputError(
                path, "malformed", f"has an event that cannot be read: {error}"
            ) from None


def _records(path: str, notes: list[str]) -> Iterator[bytes]:
    end = stamp(path)[0]
    with open(path, "rb") as file:
        at = 0
        while head := file.read(12):
            if len(head) == 12 and struct.unpack_from("<I", head, 8)[0] != _masked(head[:8]):
                raise _wrong(path, f"the record at byte {at} has a wrong checksum")
            length = struct.unpack_from("<Q", head)[0] if len(head) == 12 else 0
            if len(head) < 12 or at + length + 16 > end:
                notes.append(f"{os.path.basename(path)} ends inside a record, which was left out")
                return
            if length > _MOST_RECORD:
                raise _wrong(path, f"the record at byte {at} claims {size(length)}")
            data, check = file.read(length), file.read(4)
            if len(check) < 4 or struct.unpack("<I", check)[0] != _masked(data):
                raise _wrong(path, f"the data of the record at byte {at} have a wrong checksum")
            at += length + 16
            yield data


def _wrong(path: str, message: str) -> InputError:
    return InputError(path, "malformed", f"{message}: copy the file again, or leave it out")


def _masked(data: bytes) -> int:
    """TFRecord's masked CRC-32C."""
    crc = crc32c(data)
    return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF


# --- the messages ---------------------------------------------------------------------------------


def _event(data: bytes) -> Iterator[tuple[int, str, float | Histogram]]:
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


def _value(data: bytes) -> Iterator[tuple[str, float | Histogram]]:
    """Summary.Value: tag 1, simple_value 2, histo 5, tensor 8."""
    tag = ""
    found: float | Histogram | None = None
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


def _histogram(data: bytes) -> Histogram | None:
    """HistogramProto: min 1, max 2, num 3, sum 4, sum_squares 5."""
    facts = {number: value for number, value in _fields(data) if isinstance(value, float)}
    if 3 not in facts or 5 not in facts or not 0 <= facts[3] < 2**62:
        return None
    top = max(abs(facts.get(1, 0.0)), abs(facts.get(2, 0.0)))
    square = facts[5]
    return Histogram(int(facts[3]), math.sqrt(square) if square >= 0 else math.nan, top)


#: TensorProto's dtypes of real numbers: code -> (NumPy's, the field of unpacked values).
_REAL = {1: ("<f4", 5), 2: ("<f8", 6)}


def _of_tensor(data: bytes) -> float | Histogram | None:
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


def _of_bins(values: NDArray[np.float64]) -> Histogram | None:
    low, high, count = values.reshape(-1, 3).T
    total = float(count.sum())
    if not 0 <= total < 2**62 or bool(np.any(low > high)) or bool(np.any(count < 0)):
        return None
    square = float((count * ((low + high) / 2) ** 2).sum())
    top = float(np.abs(values.reshape(-1, 3)[count > 0, :2]).max(initial=0.0))
    return Histogram(int(total), math.sqrt(square), top, exact=False)


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
            width = 8 if wire == 1 else 4
            yield number, struct.unpack_from("<d" if wire == 1 else "<f", data, at)[0]
            at += width
        elif wire == 2:
            length, at = _varint(data, at)
            if at + length > len(data):
                raise ValueError("a field runs past the end of its message")
            yield number, data[at : at + length]
            at += length
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
