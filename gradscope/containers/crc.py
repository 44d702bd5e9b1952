"""CRC-32C, which event files carry. (Zip archives carry CRC-32, which is ``zlib.crc32``.)"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np

_POLYNOMIAL = 0x82F63B78
#: A header is checked without compiling anything: that is how a file is recognised.
_FEW = 64


def crc32c(data: bytes) -> int:
    """The CRC-32C (Castagnoli, RFC 3720) of some bytes."""
    if len(data) <= _FEW:
        return _of_few(data)
    return int(_compiled()(np.frombuffer(data, np.uint8), _tables()))


def _of_few(data: bytes) -> int:
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = (crc >> 1) ^ (_POLYNOMIAL & -(crc & 1))
    return crc ^ 0xFFFFFFFF


@cache
def _tables() -> np.ndarray[tuple[int, int], np.dtype[np.uint32]]:
    """[8, 256]: row k is the effect of a byte that k others follow."""
    tables = np.zeros((8, 256), np.uint32)
    tables[0] = np.arange(256)
    for _ in range(8):
        tables[0] = (tables[0] >> 1) ^ (_POLYNOMIAL * (tables[0] & 1))
    for k in range(1, 8):
        tables[k] = (tables[k - 1] >> 8) ^ tables[0][tables[k - 1] & 0xFF]
    return tables


@cache
def _compiled() -> Callable[..., Any]:
    from gradscope.compiled import kernel

    compiled: Callable[..., Any] = kernel()(_eight_at_a_time)
    return compiled


def _eight_at_a_time(data, tables):  # type: ignore[no-untyped-def]
    crc = np.uint32(0xFFFFFFFF)
    whole = len(data) // 8 * 8
    for i in range(0, whole, 8):
        crc = (
            tables[7, data[i] ^ (crc & 0xFF)]
            ^ tables[6, data[i + 1] ^ ((crc >> 8) & 0xFF)]
            ^ tables[5, data[i + 2] ^ ((crc >> 16) & 0xFF)]
            ^ tables[4, data[i + 3] ^ (crc >> 24)]
            ^ tables[3, data[i + 4]]
            ^ tables[2, data[i + 5]]
            ^ tables[1, data[i + 6]]
            ^ tables[0, data[i + 7]]
        )
    for i in range(whole, len(data)):
        crc = (crc >> 8) ^ tables[0, (crc ^ data[i]) & 0xFF]
    return crc ^ np.uint32(0xFFFFFFFF)
