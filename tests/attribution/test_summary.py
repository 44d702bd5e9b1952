"""Means and their intervals, by SciPy."""

from __future__ import annotations

import pytest
from scipy import stats

from gradscope.attribution.evaluation.summary import student, summarised

from .test_rules import result


@pytest.mark.parametrize("freedom", [1, 2, 3, 4, 5, 6, 9, 30, 400])
def test_students_t_is_scipys(freedom: int) -> None:
    assert student(freedom) == pytest.approx(stats.t.ppf(0.975, freedom), rel=1e-3)


def test_targets_of_one_picture_are_averaged_and_pictures_counted() -> None:
    (one,) = result().explanations

    def of(image: str, road: float) -> object:
        known = one.diagnostics.model_copy(update={"road": road})
        return one.model_copy(update={"image": image, "diagnostics": known})

    made = [of("a", 0.1), of("a", 0.3), of("b", 0.4), of("c", 0.9)]

    rows = {s.metric: s for s in summarised(made)}

    road, insertion = rows["ROAD"], rows["insertion"]
    assert (road.pictures, road.control) == (3, 0)
    assert road.mean == pytest.approx(0.5)
    low, high = stats.t.interval(0.95, 2, 0.5, stats.sem([0.2, 0.4, 0.9]))
    assert (road.low, road.high) == pytest.approx((low, high), rel=1e-3)
    assert insertion.control == 0.5
    assert "infidelity" not in rows
    assert next(s for s in summarised([one]) if s.metric == "insertion").low is None
