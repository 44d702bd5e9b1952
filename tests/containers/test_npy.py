"""Headers and elements of .npy files against NumPy."""

from __future__ import annotations

import contextlib
import io

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from gradscope.containers import npy

DTYPES = (
    arrays.integer_dtypes(endianness="?")
    | arrays.floating_dtypes(endianness="?")
    | arrays.boolean_dtypes()
    | arrays.unicode_string_dtypes(endianness="?")
)


def saved(array: np.ndarray, version: tuple[int, int] = (1, 0)) -> bytes:
    stream = io.BytesIO()
    np.lib.format.write_array(stream, array, version=version)
    return stream.getvalue()


@given(
    arrays.arrays(DTYPES, arrays.array_shapes(min_dims=0, max_dims=3, min_side=0)),
    st.booleans(),
    st.sampled_from([(1, 0), (2, 0), (3, 0)]),
)
def test_arrays_are_those_that_numpy_loads(array, fortran, version):
    data = saved(np.asfortranarray(array) if fortran else array, version)
    header = npy.read_header(data)
    expected = np.load(io.BytesIO(data))
    assert (header.dtype, header.shape, header.size) == (expected.dtype, expected.shape, len(data))
    read = npy.elements(header, data)
    np.testing.assert_array_equal(read, expected)
    assert read.dtype.isnative
    assert not header.is_pickled


def test_strides_are_those_of_a_column_major_array():
    array = np.asfortranarray(np.zeros((2, 3, 4)))
    header = npy.read_header(saved(array))
    assert header.strides == tuple(stride // array.itemsize for stride in array.strides)
    assert npy.read_header(saved(np.zeros((2, 3)))).strides is None


def test_pickled_objects_are_marked():
    assert npy.read_header(saved(np.array([{}], object))).is_pickled


@pytest.mark.parametrize("change", [b"more", -3])
def test_too_many_or_too_few_bytes_are_refused(change):
    data = saved(np.arange(4.0))
    data = data + change if isinstance(change, bytes) else data[:change]
    with pytest.raises(npy.HeaderError, match="do not fill"):
        npy.elements(npy.read_header(data), data)


def test_a_file_that_ends_in_its_header_is_told_from_one_that_is_damaged():
    data = saved(np.arange(4.0))
    length = npy.read_header(data).length
    assert all(npy.ends_inside_header(data[:cut]) for cut in range(length))
    assert not npy.ends_inside_header(data)


@given(st.binary(max_size=100), st.integers(1, 3))
def test_any_bytes_get_a_header_or_an_error(data, version):
    with contextlib.suppress(npy.HeaderError):
        npy.read_header(npy.MAGIC + bytes([version, 0]) + data)
