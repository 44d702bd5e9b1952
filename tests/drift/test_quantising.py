"""Weights in codes, and weights that lie on the grid that codes left, with their noise."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from pairs import drawn, drift, only

from gradscope.drift.result import Explanation

NAME = "layers.0.mlp.weight"


def weight(rows: int = 64, columns: int = 512) -> torch.Tensor:
    return drawn(rows, columns) * 0.02


def why(folder: Path, new: dict[str, torch.Tensor] | torch.Tensor) -> Explanation | None:
    state = new if isinstance(new, dict) else {NAME: new}
    return only(drift(folder, {NAME: weight()}, state), NAME).explanation


def decibels(values: torch.Tensor) -> float:
    w = weight().double()
    return float(20 * torch.log10(w.norm() / (values.double() - w).norm()))


def uniform(bits: int, block: int) -> torch.Tensor:
    """Rounded to nearest on so many bits, with a scale a block."""
    w = weight().reshape(-1, block)
    scale = w.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)
    return ((w / scale).round() * scale).reshape(weight().shape)


E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])


def fp4(block: int) -> torch.Tensor:
    """E2M1 with a scale a block that is a power of two (32) or E4M3 (16)."""
    w = weight().reshape(-1, block)
    scale = w.abs().amax(1, keepdim=True) / 6
    scale = 2 ** scale.log2().ceil() if block == 32 else scale.to(torch.float8_e4m3fn).float()
    nearest = E2M1[((w / scale).abs()[..., None] - E2M1).abs().argmin(-1)]
    return (nearest * w.sign() * scale).reshape(weight().shape)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("bits", "block", "where"),
    [(8, 512, "each row"), (4, 512, "each row"), (4, 128, "each 128 elements"),
     (4, 32, "each 32 elements"), (3, 64, "each 64 elements"), (8, 64 * 512, "the tensor")],
)  # fmt: skip
def test_what_was_quantised_and_stored_as_floats_is_told_by_its_grid(
    tmp_path: Path, bits: int, block: int, where: str, dtype: torch.dtype
) -> None:
    new = uniform(bits, block).to(dtype)

    told = why(tmp_path, new)

    assert told is not None
    assert told.kind == "quantised"
    assert told.text.startswith(f"quantised to {bits} bits and stored as ")
    assert f"values in {where})" in told.text
    assert told.facts["snr_db"] == pytest.approx(decibels(new), abs=1e-3)
    assert told.facts["nmse"] == pytest.approx(10 ** (-decibels(new) / 10), rel=1e-3)
    assert told.text.endswith("each the nearest value of its grid")


@pytest.mark.parametrize("block", [16, 32])
def test_floats_of_four_bits_are_told_by_their_blocks(tmp_path: Path, block: int) -> None:
    told = why(tmp_path, fp4(block))

    assert told is not None
    assert told.text.startswith("quantised to 4 bits and stored as F32 (at most ")
    assert f"in each {block} elements" in told.text


def test_values_that_are_not_the_nearest_of_their_grid_are_told(tmp_path: Path) -> None:
    w = weight()
    scale = w.abs().amax(1, keepdim=True) / 7
    floored = (w / scale).floor() * scale

    told = why(tmp_path, floored)

    assert told is not None
    nearest = uniform(4, 512)
    lost = decibels(nearest) - decibels(floored)
    assert lost > 5
    said = float(told.text.rpartition(": ")[2].split(", ")[1].split(" dB below")[0])
    assert said == pytest.approx(lost, abs=0.2)
    assert told.facts["nearest_db"] == pytest.approx(decibels(nearest), abs=0.2)


def test_codes_are_judged_by_their_own_grid(tmp_path: Path) -> None:
    scale = weight().abs().amax(1, keepdim=True) / 127
    codes = (weight() / scale).round().to(torch.int8)

    right = why(tmp_path, {NAME: codes, f"{NAME}_scale": scale})
    wrong = why(tmp_path, {NAME: codes, f"{NAME}_scale": scale * 1.05})

    assert right is not None
    assert wrong is not None
    assert right.text.endswith("dB signal to noise, each the nearest value of its grid")
    assert "dB below the nearest values of its grid" in wrong.text
    assert math.isclose(float(wrong.facts["snr_db"]), -20 * math.log10(0.05), abs_tol=0.2)


def test_what_repeats_itself_for_other_reasons_is_not_quantised(tmp_path: Path) -> None:
    sparse = weight() * (1 + 0.05 * drawn(64, 512, seed=3)) * (drawn(64, 512, seed=4) > 0)
    trained = weight() + 0.001 * drawn(64, 512, seed=5)

    for new in (sparse, trained, trained.bfloat16(), trained.half(), weight() * 1.5):
        told = why(tmp_path, new)
        assert told is None or told.kind != "quantised"


def test_a_grid_that_the_base_lies_on_already_is_no_news(tmp_path: Path) -> None:
    base = uniform(4, 32)
    new = {NAME: base + 0.001 * torch.sign(base)}

    told = only(drift(tmp_path, {NAME: base}, new), NAME).explanation

    assert told is None or told.kind != "quantised"
