"""What a stored code means, against torch's conversions and the OCP MX tables."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from gradscope.statistics import codings

from .oracle import CODED, INTEGERS, NATIVE, TABLES, TORCH, decode


def all_codes(dtype: str) -> np.ndarray:
    bits = {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "BF16": 16, "F16": 16}.get(dtype, 8)
    return np.arange(1 << bits, dtype=np.uint16 if bits == 16 else np.uint8)


@pytest.mark.parametrize("dtype", TORCH)
def test_every_code_has_the_value_torch_gives_it(dtype: str) -> None:
    values = codings.code_values(dtype)
    np.testing.assert_array_equal(values, decode(dtype, all_codes(dtype)))
    signs = np.signbit(decode(dtype, all_codes(dtype)))
    numbers = ~np.isnan(values)
    np.testing.assert_array_equal(np.signbit(values)[numbers], signs[numbers])


@pytest.mark.parametrize("dtype", TABLES)
def test_every_code_has_the_value_of_the_mx_specification(dtype: str) -> None:
    np.testing.assert_array_equal(codings.code_values(dtype), TABLES[dtype])
    np.testing.assert_array_equal(np.signbit(codings.code_values(dtype)), np.signbit(TABLES[dtype]))


@pytest.mark.parametrize("dtype", [d for d in INTEGERS if d[1:] in ("8", "16")])
def test_every_code_of_an_integer_is_that_integer(dtype: str) -> None:
    codes = np.arange(1 << int(dtype[1:])).astype(f"u{int(dtype[1:]) // 8}")
    np.testing.assert_array_equal(codings.code_values(dtype), codes.view(NATIVE[dtype]))


def test_any_bool_byte_but_zero_is_true() -> None:
    assert codings.code_values("BOOL").tolist() == [0.0] + [1.0] * 255


@pytest.mark.parametrize("dtype", [*TORCH, "F32", "F64"])
def test_the_greatest_finite_value_is_the_one_torch_knows(dtype: str) -> None:
    known = torch.finfo({"F32": torch.float32, "F64": torch.float64, **TORCH}[dtype]).max
    assert codings.greatest_finite(dtype) == known


@pytest.mark.parametrize(("dtype", "greatest"), [("F4", 6), ("F6_E2M3", 7.5), ("F6_E3M2", 28)])
def test_the_greatest_value_of_the_mx_types(dtype: str, greatest: float) -> None:
    assert codings.greatest_finite(dtype) == greatest


@pytest.mark.parametrize("dtype", [d for d in TORCH if d != "F8_E8M0"])
def test_the_smallest_normal_value_is_the_one_torch_knows(dtype: str) -> None:
    assert codings.FORMATS[dtype].smallest_normal == torch.finfo(TORCH[dtype]).smallest_normal


@pytest.mark.parametrize("dtype", CODED)
def test_the_comparison_sees_a_single_wrong_code(dtype: str) -> None:
    wrong = codings.code_values(dtype).copy()
    wrong[1] *= 1 + 2**-20
    with pytest.raises(AssertionError):
        np.testing.assert_array_equal(wrong, decode(dtype, all_codes(dtype)))
