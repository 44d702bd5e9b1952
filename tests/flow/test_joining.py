"""Rows of a history as layers: what joining parameters does to every statistic."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import pytest

from gradscope import analyze_flow
from gradscope.flow.excerpt import between
from gradscope.flow.joining import TOTAL, module_of, series
from gradscope.histories.history import Exact, History, Layer, Sketches, Status

from .made import made, noise

LAYERS = (
    Layer("a.weight", "matrix", 90, "a"),
    Layer("a.bias", "bias", 10, "a"),
    Layer("b.bias", "bias", 5, "b"),
    Layer("b.weight", "conv", 45, "b"),
)


def parameters(records: int = 6, **fields: Any) -> History:
    history = made(noise(records, 4), numel=1, **fields)
    return replace(history, layers=LAYERS)


def test_a_module_is_named_sized_and_classed_by_its_weight() -> None:
    found = series(parameters())

    assert [(x.name, x.kind, x.numel) for x in found.layers] == [
        ("a", "matrix", 100),
        ("b", "conv", 50),
    ]
    assert [x.name for x in series(parameters(), "param").layers] == [x.name for x in LAYERS]


def test_the_norm_of_a_module_is_the_root_of_the_summed_squares() -> None:
    history = parameters()
    l2 = history.l2.astype(np.float64)

    found = series(history)

    np.testing.assert_allclose(found.norm[:, 0], np.hypot(l2[:, 0], l2[:, 1]))
    np.testing.assert_allclose(found.rms[:, 1], np.hypot(l2[:, 2], l2[:, 3]) / np.sqrt(50))


@pytest.mark.parametrize("scale", [1e-300, 1e300])
def test_neither_huge_nor_tiny_norms_overflow_when_joined(scale: float) -> None:
    history = parameters()
    l2 = np.tile([3.0, 4.0, 0.0, 0.0], (6, 1)) * scale

    found = series(replace(history, l2=l2))

    np.testing.assert_allclose(found.norm[:, 0], 5 * scale)
    assert (found.norm[:, 1] == 0).all()


def test_a_parameter_without_a_gradient_leaves_the_rest_of_its_module() -> None:
    history = parameters()
    status = np.full((6, 4), Status.RECORDED, np.uint8)
    status[2, 1], status[3, :2], status[4, 0], status[4, 1] = 0, 2, 2, 3
    status[5, :2] = [0, 3]
    history = replace(history, status=status)

    found = series(history)

    assert found.status[:, 0].tolist() == [1, 1, 1, 2, 2, 3]
    assert found.norm[2, 0] == pytest.approx(history.l2[2, 0])
    assert np.isnan(found.norm[3:, 0]).all()
    assert found.recorded[:, 1].all()


def test_one_parameter_that_is_not_finite_makes_its_module_so() -> None:
    history = parameters()
    history.l2[1, 1], history.l2[2, 2] = np.nan, np.inf

    found = series(history)

    assert np.argwhere(found.nonfinite).tolist() == [[1, 0], [2, 1]]
    assert np.isnan(found.norm[[1, 2], [0, 1]]).all()
    assert np.isfinite(found.norm[1, 1])


def test_a_norm_that_overflowed_is_at_least_its_greatest_element() -> None:
    l2 = np.full((4, 1), np.inf)
    top = np.array([[7.0], [np.inf], [7.0], [np.nan]])
    counts = np.array([[0], [0], [3], [-1]])

    found = series(made(l2, numel=1, max_abs=top, n_inf=counts))

    assert found.nonfinite[:, 0].tolist() == [False, True, True, True]
    assert found.norm[0, 0] == 7.0


ABSENT = None


@pytest.mark.parametrize("norm", [np.nan, np.inf, 1.0])
@pytest.mark.parametrize("top", [ABSENT, np.nan, np.inf, 1.0])
@pytest.mark.parametrize("n_nan", [ABSENT, -1, 0, 17])
@pytest.mark.parametrize("n_inf", [ABSENT, -1, 0, 17])
def test_any_sign_of_nan_or_inf_counts_and_only_an_overflow_is_excused(
    norm: float, top: float | None, n_nan: int | None, n_inf: int | None
) -> None:
    fields = {"max_abs": top, "n_nan": n_nan, "n_inf": n_inf}
    found = series(
        made([[norm]], **{k: np.array([[v]]) for k, v in fields.items() if v is not ABSENT})
    )

    counted = 17 in (n_nan, n_inf)
    overflowed = norm == np.inf and (top == 1.0 or n_inf == 0)
    bad = counted or top == np.inf or (not np.isfinite(norm) and not overflowed)
    assert bool(found.nonfinite[0, 0]) is bad


@pytest.mark.parametrize("records", [1, 2, 40])
@pytest.mark.parametrize("norm", [np.nan, np.inf, 1.0])
@pytest.mark.parametrize("top", [ABSENT, np.nan, np.inf, 1.0])
def test_whatever_the_sign_it_is_critical_and_fails_the_gate(
    top: float | None, norm: float, records: int
) -> None:
    """Whether one of two layers or the only one, at the last of a few records or of many."""
    for n_nan, n_inf in product([ABSENT, -1, 0, 17], repeat=2):
        for layers in (1, 2):
            norms = np.ones((records, layers))
            fields = {"max_abs": (1.0, top), "n_nan": (0, n_nan), "n_inf": (0, n_inf)}
            columns = {
                name: np.full((records, layers), usual)
                for name, (usual, last) in fields.items()
                if last is not ABSENT
            }
            norms[-1, 0] = norm
            for name, column in columns.items():
                column[-1, 0] = fields[name][1]
            history = made(norms, **columns)
            bad = bool(series(history).nonfinite[-1, 0])

            report = analyze_flow(history)

            worst = [str(f.severity) for f in report.findings if f.name == "non-finite-gradient"]
            assert worst == ["critical"] * bad, (norm, top, n_nan, n_inf, layers)
            assert (report.gate.exit_code == 1) is bad


def test_zero_fractions_are_weighted_by_elements_and_leave_out_the_unknown() -> None:
    fraction = np.tile([0.5, 1.0, np.nan, 0.25], (6, 1))

    found = series(parameters(zero_fraction=fraction)).zero_fraction

    np.testing.assert_allclose(found, np.tile([(45 + 10) / 100, 0.25], (6, 1)))
    alone = series(parameters(zero_fraction=fraction), "param").zero_fraction
    np.testing.assert_array_equal(alone, fraction)


def test_an_update_ratio_has_a_floor_for_weights_that_start_at_zero() -> None:
    weights = np.tile([3.0, 4.0, 0.0, 0.0], (6, 1))
    updates = np.tile([0.3, 0.4, 0.06, 0.08], (6, 1))

    found = series(parameters(param_l2=weights, update_l2=updates)).update_ratio

    np.testing.assert_allclose(found, np.tile([0.1, 0.1 / (1e-3 * np.sqrt(50))], (6, 1)))
    assert series(parameters(param_l2=weights)).update_ratio is None
    assert series(parameters(update_l2=weights)).update_ratio is None
    unsized = made(
        np.ones((2, 1)), numel=None, param_l2=np.zeros((2, 1)), update_l2=np.ones((2, 1))
    )
    assert np.isnan(series(unsized).update_ratio).all()


def test_edges_join_modules_each_pair_once_and_loops_are_left_out() -> None:
    edges = np.array([[-1, 0], [0, 1], [0, 3], [1, 2], [3, 4], [2, 4], [1, 3]])

    assert series(parameters(edges=edges)).edges.tolist() == [[-1, 0], [0, 1], [1, 2]]


def test_a_tied_row_is_that_of_its_first() -> None:
    layers = (*LAYERS[:3], Layer("b.weight", "conv", 90, "b", tied_to=0))
    history = replace(parameters(edges=np.array([[0, 2], [2, 3], [3, 4]])), layers=layers)

    found = series(history)

    assert [layer.numel for layer in found.layers] == [100, 5]
    assert found.edges.tolist() == [[0, 1], [1, 0], [0, 2]]
    assert found.numel([0, 1]) == 105


def test_a_sketch_of_a_module_is_that_of_its_joined_gradient() -> None:
    rng = np.random.default_rng(0)
    vectors = [rng.normal(size=(6, n)) * 10.0**-i for i, n in enumerate((8, 3, 2, 5))]
    maps = [rng.normal(size=(16, v.shape[1])) for v in vectors]
    norms = np.stack([np.linalg.norm(v, axis=1) for v in vectors], axis=1)
    values = np.stack(
        [(v / n[:, None]) @ m.T for v, n, m in zip(vectors, norms.T, maps, strict=True)], axis=1
    )
    history = replace(parameters(), l2=norms, sketches=Sketches(values[[1, 4]], np.array([1, 4])))

    found = series(history).sketches

    assert found.index.tolist() == [1, 4]
    for i, t in enumerate((1, 4)):
        joint = maps[0] @ vectors[0][t] + maps[1] @ vectors[1][t]
        size = np.linalg.norm(np.r_[vectors[0][t], vectors[1][t]])
        np.testing.assert_allclose(found.values[i, 0], joint / size, rtol=1e-4)


def test_a_cosine_of_a_module_is_that_of_its_joined_gradient() -> None:
    rng = np.random.default_rng(0)
    vectors = [rng.normal(size=(6, n)) * 10.0**-i for i, n in enumerate((8, 3, 2, 5))]
    norms = np.stack([np.linalg.norm(v, axis=1) for v in vectors], axis=1)
    cosine, lag = np.full((6, 4), np.nan), np.zeros((6, 4), np.int64)
    for row, v in enumerate(vectors):
        for t in range(1, 6):
            cosine[t, row] = v[t] @ v[t - 1] / norms[t, row] / norms[t - 1, row]
            lag[t, row] = 1
    lag[3, 1] = 2
    history = replace(parameters(), l2=norms, exact=Exact(cosine, lag))

    found = series(history).exact

    for t in (1, 2, 4, 5):
        a, b = (np.r_[vectors[0][s], vectors[1][s]] for s in (t, t - 1))
        assert found.cosine[t, 0] == pytest.approx(a @ b / np.linalg.norm(a) / np.linalg.norm(b))
    assert np.isnan(found.cosine[[0, 3], 0]).all()
    np.testing.assert_array_equal(series(history, "param").exact.cosine, cosine)


def test_a_history_of_the_total_norm_is_one_row() -> None:
    history = made(np.empty((5, 0)), total_l2=np.arange(1.0, 6))

    found = series(history)

    assert found.names == (TOTAL,)
    assert found.norm[:, 0].tolist() == [1, 2, 3, 4, 5]
    assert found.numel([0]) is None


@pytest.mark.parametrize(
    ("name", "module"),
    [
        ("conv1.weight", "conv1"),
        ("block.0.norm.gamma", "block.0.norm"),
        ("rnn.weight_ih_l0", "rnn"),
        ("rnn.bias_hh_l1_reverse", "rnn"),
        ("attn.in_proj_weight", "attn"),
        ("pos_embed", "pos_embed"),
        ("encoder.pos_embed", "encoder.pos_embed"),
        ("weight", "weight"),
    ],
)
def test_the_module_of_a_parameter_is_told_by_its_name(name: str, module: str) -> None:
    assert module_of(name) == module


def test_steps_and_optimizers_are_described() -> None:
    s = series(made(noise(50, 2), steps=np.r_[np.arange(30), 30 + np.arange(20) * 5]))
    assert s.gap == 1
    assert s.warm_up == 12
    assert series(made(noise(1, 2))).gap == 1
    assert series(made(noise(1000, 1))).warm_up == 50
    assert series(made(noise(200, 1))).warm_up == 20

    def plain(**optimizer: object) -> bool:
        return series(made(noise(2, 1), meta={"optimizer": optimizer})).plain_descent

    assert plain(**{"class": "sgd"})
    assert plain(**{"class": "SGD", "momentum": 0})
    assert not plain(**{"class": "SGD", "momentum": 0.9})
    assert not plain(**{"class": "Adam"})
    assert not series(made(noise(2, 1))).plain_descent
    assert not series(made(noise(2, 1), meta={"optimizer": "SGD"})).plain_descent


def test_skipped_steps_and_medians_are_those_of_the_file() -> None:
    norms = np.array([[1.0, 2.0, 4.0], [0.0, 3.0, 5.0]])
    s = series(made(norms, numel=1, skipped=np.array([0, 1])))

    assert s.skipped.tolist() == [False, True]
    assert series(made(norms)).skipped.tolist() == [False, False]
    assert s.log_rms[1, 0] == -np.inf
    np.testing.assert_allclose(s.median_log, [np.log(2), (np.log(3) + np.log(5)) / 2])


# --- a part of the records ------------------------------------------------------------------------


def test_a_part_has_both_its_ends_and_every_statistic_of_them() -> None:
    history = made(
        noise(10, 2),
        steps=np.arange(10) * 3,
        loss=np.arange(10.0),
        lr=np.arange(10.0)[:, None],
        sketches=Sketches(np.arange(3.0)[:, None, None] * np.ones((3, 2, 4)), np.array([1, 4, 8])),
        exact=Exact(np.arange(10.0)[:, None] * np.ones((1, 2)), np.ones((10, 2), np.int64)),
    )

    part = between(history, 12, 24)

    assert part.steps.tolist() == [12, 15, 18, 21, 24]
    assert part.loss.tolist() == [4, 5, 6, 7, 8]
    assert part.lr[:, 0].tolist() == [4, 5, 6, 7, 8]
    assert part.exact.cosine[:, 0].tolist() == [4, 5, 6, 7, 8]
    assert part.sketches.index.tolist() == [0, 4]
    assert part.sketches.values[:, 0, 0].tolist() == [1, 2]
    assert part.layers == history.layers


def test_an_open_end_is_the_end_of_the_history() -> None:
    history = made(noise(10, 2), steps=np.arange(10) * 3)

    assert between(history, None, 6).steps.tolist() == [0, 3, 6]
    assert between(history, 22, None).steps.tolist() == [24, 27]
    assert between(history, None, None) is history
    assert between(history, 5, 5).steps.tolist() == []
