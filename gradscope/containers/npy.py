"""NumPy's .npy files: the header that says how an array's bytes are to be read.

NumPy is imported when a header is parsed: telling formats apart needs its magic number alone.
Pickled objects are never loaded: a header that asks for them is marked by ``is_pickled``.
"""

from __future__ import annotations

import io
import math
import struct
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, BinaryIO

from gradscope.text import escaped

if TYPE_CHECKING:
    import numpy as np

MAGIC = b"\x93NUMPY"
#: A header is at most 10,000 characters to NumPy; this leaves room for its magic and padding.
HEADER_ROOM = 32 << 10

_MAX_DIMS = 64


class HeaderError(Exception):
    """The start of a file is not a valid .npy header; says why, where its path is not known yet."""


@dataclass(frozen=True, slots=True)
class Header:
    """The header of an .npy file; ``length`` is where the elements start."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    fortran: bool
    length: int

    @property
    def size(self) -> int:
        """Bytes of the header and of the elements."""
        return self.length + math.prod(self.shape) * self.dtype.itemsize

    @property
    def is_pickled(self) -> bool:
        """Whether the elements are pickled Python objects, which only executing could build."""
        return bool(self.dtype.hasobject)

    @property
    def strides(self) -> tuple[int, ...] | None:
        """Strides, in elements, of a column-major array that is not also row-major."""
        longer = [size for size in self.shape if size != 1]
        if not self.fortran or len(longer) < 2 or 0 in longer:
            return None
        return tuple(math.prod(self.shape[:axis]) for axis in range(len(self.shape)))


def read_header(start: bytes) -> Header:
    """Parse the header that a file's first HEADER_ROOM bytes hold. Raises HeaderError.

    NumPy's own parser evaluates literals only.
    """
    stream = io.BytesIO(start)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # headers that Python 2 wrote
            shape, fortran, dtype = _parsed(stream)
    # What literal_eval and np.dtype raise on hostile text is not documented.
    except Exception as error:
        raise HeaderError(escaped(str(error), 120) or type(error).__name__) from None
    if any(type(n) is not int or not 0 <= n < 1 << 63 for n in shape) or len(shape) > _MAX_DIMS:
        raise HeaderError("its shape is impossible")
    return Header(dtype, shape, fortran, stream.tell())


def ends_inside_header(start: bytes) -> bool:
    """Whether a file whose first bytes cannot be parsed ends before its header does."""
    if len(start) < 12:
        return True
    layout = "<H" if start[6] == 1 else "<I"
    (length,) = struct.unpack_from(layout, start, 8)
    return len(start) < 8 + struct.calcsize(layout) + int(length) <= HEADER_ROOM


def elements(header: Header, data: bytes) -> np.ndarray[Any, Any]:
    """The array of a whole .npy file, read-only; bytes in the machine's order are not copied.

    ``data`` starts with the header, whose elements must not be pickled. Raises HeaderError when
    there are too few or too many bytes for its shape.
    """
    if header.size != len(data):
        said = f"{list(header.shape)} of {header.dtype}"
        raise HeaderError(f"{said} do not fill the {len(data) - header.length:,} bytes it has")
    import numpy as np

    count = math.prod(header.shape)
    raw = memoryview(data)[header.length :]
    flat = np.frombuffer(raw, header.dtype) if count else np.empty(0, header.dtype)
    flat = flat.astype(flat.dtype.newbyteorder("="), copy=False)
    return flat.reshape(header.shape, order="F" if header.fortran else "C")


def _parsed(stream: BinaryIO) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    from numpy.lib import format as npy

    version = npy.read_magic(stream)
    if version == (1, 0):
        return npy.read_array_header_1_0(stream)
    if version in ((2, 0), (3, 0)):
        # Version 3 only differs in the encoding of field names, and records are not analysed.
        return npy.read_array_header_2_0(stream)
    raise ValueError(f"version {version} of the format is not known")
