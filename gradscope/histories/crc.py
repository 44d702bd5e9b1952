"""CRC-32C, which event files carry: eight bytes at a time, compiled."""

from __future__ import annotations

import numpy as np

from gradscope.compiled import kernel

_POLYNOMIAL = 0x82F63B78


def crc32c(data: bytes) -> int:
    """The CRC-32C (Castagnoli, RFC 3720) of some bytes."""
    return int(_crc(np.frombuffer(data, np.uint8), _TABLES))  # type: ignore[no-untyped-call]


def _tables() -> np.ndarray[tuple[int, int], np.dtype[np.uint32]]:
    """[8, 256]: row k is the effect of a byte that k others follow."""
    tables = np.zeros((8, 256), np.uint32)
    for byte in range(256):
        value = byte
        for _ in range(8):
            value = (value >> 1) ^ (_POLYNOMIAL if value & 1 else 0)
        tables[0, byte] = value
    for k in range(1, 8):
        tables[k] = (tables[k - 1] >> 8) ^ tables[0][tables[k - 1] & 0xFF]
    return tables


_TABLES = _tables()


@kernel()
def _crc(data, tables):  # type: ignore[no-untyped-def]
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
