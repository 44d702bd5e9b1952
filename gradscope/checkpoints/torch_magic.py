"""The first bytes of torch's legacy files: the pickle of a number."""

from __future__ import annotations

MAGIC = 0x1950A86A20F9469CFC6C
LEGACY_START = b"\x8a\x0a" + MAGIC.to_bytes(10, "little") + b"."


def is_legacy(start: bytes) -> bool:
    """Whether a file's first bytes are those of a legacy file."""
    # Protocol 4 and up put a frame in front; 0 and 1 spell the number in decimal.
    return LEGACY_START in start[:32] or start.startswith(b"L%dL" % MAGIC)
