"""CRC-32C against its standard and its definition."""

from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gradscope.containers.crc import crc32c


@pytest.mark.parametrize(
    ("data", "crc"),
    [
        (b"123456789", 0xE3069283),
        (b"", 0),
        # RFC 3720, B.4
        (bytes(32), 0x8A9136AA),
        (b"\xff" * 32, 0x62A8AB43),
        (bytes(range(32)), 0x46DD794E),
        (bytes(reversed(range(32))), 0x113FDB5C),
    ],
)
def test_the_checksum_is_that_of_the_standard(data: bytes, crc: int) -> None:
    assert crc32c(data) == crc


@settings(deadline=None)  # the first long one compiles
@given(st.binary(max_size=100) | st.binary(min_size=65, max_size=300))
def test_the_checksum_is_the_definition_bit_by_bit(data: bytes) -> None:
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = (crc >> 1) ^ (0x82F63B78 * (crc & 1))
    assert crc32c(data) == crc ^ 0xFFFFFFFF


def test_a_header_is_checked_without_a_compiler() -> None:
    code = (
        "import sys; from gradscope.containers.crc import crc32c; crc32c(bytes(12))\n"
        "assert 'numba' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
