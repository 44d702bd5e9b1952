"""Infinities that are meant, by pattern: each beside a twin that differs in an element or two."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from gradscope.statistics.infinity import design_of_infinity

Array = npt.NDArray[Any]
INF = np.inf


def design(values: Array, piece: int = 1 << 20) -> str | None:
    flat = np.asarray(values, np.float64).ravel()

    def read(start: int, stop: int) -> Array:
        assert stop - start <= piece
        return flat[start:stop]

    return design_of_infinity(values.shape, read, piece)


def positions(rows: int, columns: int) -> Array:
    """How far each key lies behind its query; negative for keys to come."""
    return np.arange(rows)[:, None] + columns - rows - np.arange(columns)


def hidden(base: Array, where: Array, value: float = -INF) -> Array:
    return np.where(where, value, base)


RNG = np.random.default_rng(0)
BIAS = RNG.standard_normal((24, 24))
BEHIND = positions(24, 24)
SLOPES = 2.0 ** -np.arange(1, 5)[:, None, None]
CHUNK = np.arange(24) // 6

TRIANGLES = {
    "causal": hidden(BIAS, BEHIND < 0),
    "causal, +Inf": hidden(BIAS, BEHIND < 0, INF),
    "the other half": hidden(BIAS, BEHIND > 0),
    "keys reversed": hidden(BIAS, BEHIND < 0)[:, ::-1],
    "ALiBi": hidden(-SLOPES * BEHIND, np.broadcast_to(BEHIND < 0, (4, 24, 24))),
    "sliding window": hidden(BIAS, (BEHIND < 0) | (BEHIND > 4)),
    "chunks": hidden(BIAS, CHUNK[:, None] != CHUNK),
    "with a cache": hidden(RNG.standard_normal((8, 30)), positions(8, 30) < 0),
    "four-dimensional": hidden(BIAS, BEHIND < 0)[None, None],
    "of two": hidden(np.array([[1.0, 0], [2, 3]]), positions(2, 2) < 0),
    "rows that see nothing": np.concatenate([np.full((3, 24), -INF), hidden(BIAS, BEHIND < 0)]),
}


@pytest.mark.parametrize("name", TRIANGLES)
@pytest.mark.parametrize("piece", [1 << 20, 50])
def test_a_mask_of_positions_is_one_run_a_row_that_moves(name: str, piece: int) -> None:
    assert design(TRIANGLES[name], piece) == "triangle"


@pytest.mark.parametrize(
    "values",
    [
        hidden(BIAS, BEHIND < 0)[RNG.permutation(24)],
        hidden(BIAS, (BEHIND < 0) | (BEHIND == 3)),
        hidden(BIAS, RNG.random((24, 24)) < 0.5),
        hidden(BIAS, BEHIND == -23),
        hidden(BIAS, BEHIND < -20),
        hidden(hidden(BIAS, BEHIND < 0), BEHIND > 4, INF),
        np.full((24, 24), -INF),
        hidden(BIAS, np.broadcast_to(np.arange(24) > 9, (24, 24))),
    ],
    ids=[
        "shuffled",
        "a hole",
        "scattered",
        "a corner",
        "a small corner",
        "both signs",
        "all",
        "columns",
    ],
)
def test_other_infinities_of_a_matrix_are_not_meant(values: Array) -> None:
    assert design(values) is None


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_infinities_beside_a_single_other_value_are_a_mask(value: float) -> None:
    mask = hidden(np.full((20, 30), value), RNG.random((20, 30)) < 0.3)
    assert design(mask) == "mask"
    assert design(mask[3]) == "mask"
    mask[3, 4] = 0.5
    assert design(mask) is None


@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (7,), (1, 7)])
@pytest.mark.parametrize("value", [INF, -INF])
def test_a_state_that_has_seen_nothing_is_all_one_infinity(
    shape: tuple[int, ...], value: float
) -> None:
    assert design(np.full(shape, value)) == "state"


RATIO = np.linspace(10, -10, 40)
LOOKING_BACK = np.concatenate([np.linspace(5, 1, 20), np.exp(np.linspace(0, 9, 30))])


@pytest.mark.parametrize(
    "series",
    [
        [*RATIO, -INF],
        [INF, *np.exp(RATIO)],
        [INF, *RATIO, -INF],
        [-INF, -1.0, 0.0, 1.0, INF],
        [1.0, 2.0, 3.0, INF],
        [*LOOKING_BACK, INF, INF],
        [*np.repeat(RATIO, 2), -INF],
    ],
)
def test_a_series_that_runs_into_its_infinities_is_a_ramp(series: list[float]) -> None:
    assert design(np.array(series)) == "ramp"
    assert design(np.array(series)[:, None, None]) == "ramp"


@pytest.mark.parametrize(
    "series",
    [
        [*RATIO[:20], -INF, *RATIO[20:]],
        [*RATIO, INF],
        [-INF, *RATIO],
        [*RNG.standard_normal(40), INF],
        [1.0, 2.0, INF],
        [3.0, 1.0, 2.0, INF],
        [2.0, 2.0, 1.0, 2.0, 2.0, 2.0, INF],
        [*RATIO, -INF, INF],
    ],
)
def test_a_series_with_an_infinity_elsewhere_is_damaged(series: list[float]) -> None:
    assert design(np.array(series)) is None
