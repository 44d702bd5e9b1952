"""Rows that lie elsewhere and were cast, put into codes or trained as well."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from pairs import State, drawn, drift, found, only

from gradscope.drift.result import TensorDrift

NAME = "layers.0.q_proj.weight"


def weight(rows: int = 64, columns: int = 48) -> torch.Tensor:
    return drawn(rows, columns) * columns**-0.5


def interleaved(w: torch.Tensor, heads: int) -> torch.Tensor:
    """The rows of each head as conversions between rotary layouts lay them."""
    rows = len(w)
    return w.reshape(heads, 2, rows // heads // 2, -1).transpose(1, 2).reshape(w.shape)


def changed(folder: Path, base: torch.Tensor, new: torch.Tensor | State) -> TensorDrift:
    state = new if isinstance(new, dict) else {NAME: new}
    return only(drift(folder, {NAME: base}, state), NAME)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("heads", [4, 8])
def test_rotary_halves_that_were_cast_are_told_with_the_cast(
    tmp_path: Path, heads: int, dtype: torch.dtype
) -> None:
    told = changed(tmp_path, weight(), interleaved(weight(), heads).to(dtype)).explanation

    assert told is not None
    assert (told.kind, told.residual) == ("permuted", 0.0)
    name = {torch.bfloat16: "BF16", torch.float16: "F16"}[dtype]
    assert f"in heads of {64 // heads}: the halves of rotary positions" in told.text
    assert told.text.endswith(f"and rounded to {name} to nearest")


def test_a_wider_type_that_was_permuted_is_told(tmp_path: Path) -> None:
    narrow = weight().bfloat16()

    told = changed(tmp_path, narrow, interleaved(narrow, 4).float()).explanation

    assert told is not None
    assert (told.kind, told.residual) == ("permuted", 0.0)
    assert "rounded" not in told.text


def test_heads_and_columns_that_were_cast_are_told(tmp_path: Path) -> None:
    order = torch.randperm(48, generator=torch.Generator().manual_seed(1))
    heads = weight().reshape(4, 16, 48)[[2, 0, 3, 1]].reshape(64, 48).half()

    rows, columns = (
        changed(tmp_path, weight(), t).explanation for t in (heads, weight()[:, order].half())
    )

    assert rows is not None
    assert columns is not None
    assert rows.text.startswith("the rows are permuted in blocks of 16 (heads)")
    assert "columns are permuted, and rounded to F16 to nearest" in columns.text


def test_rows_in_codes_are_told_with_their_noise(tmp_path: Path) -> None:
    moved = interleaved(weight(), 4)
    scale = moved.abs().amax(1, keepdim=True) / 127
    codes = {NAME: (moved / scale).round().to(torch.int8), f"{NAME}_scale": scale}

    told = changed(tmp_path, weight(), codes).explanation

    assert told is not None
    assert told.kind == "quantised"
    assert "rotary" in told.text
    values = codes[NAME].float() * scale
    ratio = 20 * torch.log10(moved.norm() / (values - moved).norm()).item()
    assert told.facts["snr_db"] == pytest.approx(ratio, abs=0.01)


def test_rows_that_moved_on_are_no_mere_conversion(tmp_path: Path) -> None:
    moved = interleaved(weight(), 4)
    trained = moved * (1 + 0.05 * drawn(64, 48, seed=3))
    base = {NAME: weight()}

    told = changed(tmp_path, weight(), trained)

    assert told.explanation is not None
    left = (trained - moved).norm() / trained.norm()
    assert told.explanation.text.endswith(f"and moved by {left:.2g} of their norm")
    assert told.severity == "medium"
    exact = drift(tmp_path, base, {NAME: moved.bfloat16()}, expect="converted")
    assert found(exact) == {}
    off = drift(tmp_path, base, {NAME: trained}, expect="converted")
    assert found(off)["unexpected-change"] == ["high"]


def test_unrelated_rows_and_rows_in_place_are_not_permuted(tmp_path: Path) -> None:
    noisy = weight() + 0.3 * weight().std() * drawn(64, 48, seed=5)

    for new in (drawn(64, 48, seed=4), noisy, torch.cat([weight()[:32], drawn(32, 48, seed=6)])):
        told = changed(tmp_path, weight(), new).explanation
        assert told is None or told.kind != "permuted"


def test_rows_that_stand_twice_are_not_permuted(tmp_path: Path) -> None:
    new = interleaved(weight(), 4).half()
    new[5] = new[6]

    told = changed(tmp_path, weight(), new).explanation

    assert told is None or told.kind != "permuted"


def test_rows_of_zeros_lie_anywhere(tmp_path: Path) -> None:
    base = weight()
    base[[3, 40]] = 0

    told = changed(tmp_path, base, interleaved(base, 4).half()).explanation

    assert told is not None
    assert told.kind == "permuted"


def test_a_bias_in_another_order_is_permuted(tmp_path: Path) -> None:
    base = {"q_proj.bias": drawn(64)}

    told = only(drift(tmp_path, base, {"q_proj.bias": base["q_proj.bias"].flip(0)}), "q_proj.bias")

    assert told.explanation is not None
    assert told.explanation.text == "all 64 elements are permuted"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [8, 32])
def test_biases_of_permuted_heads_are_told_after_a_cast(
    tmp_path: Path, size: int, dtype: torch.dtype
) -> None:
    bias = drawn(128)
    turned = bias.reshape(-1, 2, size // 2).swapaxes(1, 2).reshape(-1).to(dtype)

    report = drift(tmp_path, {"k_proj.bias": bias}, {"k_proj.bias": turned}, expect="converted")

    told = only(report, "k_proj.bias").explanation
    assert told is not None
    assert told.kind == "permuted"
    assert f"heads of {size}: the halves of rotary" in told.text
    assert found(report) == {}
    trained = {"k_proj.bias": (turned.float() + 0.02 * drawn(128, seed=1)).to(dtype)}
    assert found(drift(tmp_path, {"k_proj.bias": bias}, trained, expect="converted"))


@pytest.mark.parametrize("size", [1e200, 1.0])
def test_values_whose_squares_are_beyond_the_numbers_are_compared(
    tmp_path: Path, size: float
) -> None:
    base = weight().double() * size
    moved = base[torch.randperm(64, generator=torch.Generator().manual_seed(1))]

    permuted, trained = (
        changed(tmp_path, base, t) for t in (moved, base + 0.1 * size * drawn(64, 48, seed=2))
    )

    assert (permuted.explanation and permuted.explanation.kind) == "permuted"
    assert trained.status == "changed"
    assert (trained.relative_drift is None) == (size != 1.0)
