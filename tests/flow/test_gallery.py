"""Real training bugs and healthy runs of every kind: each fault is named, at any ``every``."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from gradscope import analyze_flow
from gradscope.histories.history import History, Sketches
from gradscope.histories.open import open_history
from gradscope.report.severity import Severity

pytest.importorskip("torch")

from faults import FAULTS, deep_transformer
from healthy import HEALTHY
from recipes import RECIPES
from runs import recorded, recorded_fault, recorded_healthy
from slips import SLIPS

from .made import RECORDED

BUGS = FAULTS | SLIPS
EVERY = (1, 2, 5, 10, 50)
#: What happens at a single step, begins too late, or is over between two looks of a recorder.
UNSEEN = {
    ("early-spike", 5), ("early-spike", 10), ("early-spike", 50), ("wrong-sign", 50),
    ("grows-then-nan", 50), ("negated-loss", 50), ("boundless-critic", 50), ("average-loaded", 50),
    ("initialised-again", 50), ("left-in-evaluation", 50),
}  # fmt: skip


def thinned(history: History, every: int) -> History:
    """What a recorder with ``every`` would have kept: those steps, and the ones after them."""
    steps = np.asarray(history.steps)
    if every == 1:
        return history
    kept = np.flatnonzero((steps % every == 0) | (steps % every == 1))
    cells = {
        name: np.array(values[kept])
        for name in RECORDED
        if (values := getattr(history, name)) is not None
    }
    if "update_l2" in cells:
        cells["update_l2"][steps[kept] % every == 1] = np.nan
    if history.sketches is None:
        return replace(history, steps=steps[kept], exact=None, **cells)
    place = {int(record): at for at, record in enumerate(kept)}
    rows = [i for i, record in enumerate(history.sketches.index) if int(record) in place]
    index = np.array([place[int(history.sketches.index[i])] for i in rows])
    sketches = Sketches(history.sketches.values[rows], index)
    return replace(history, steps=steps[kept], exact=None, sketches=sketches, **cells)


@pytest.fixture(scope="session", params=sorted(BUGS))
def fault(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, History]:
    folder = tmp_path_factory.mktemp("faults") / request.param
    recorded_fault(request.param, folder)
    return request.param, open_history(str(folder))


@pytest.mark.filterwarnings("ignore:capture.. was called")
def test_a_bug_is_named_by_its_rule_whatever_is_recorded(fault: tuple[str, History]) -> None:
    name, history = fault
    wanted = BUGS[name]

    for every in EVERY:
        if (name, every) in UNSEEN:
            continue
        report = analyze_flow(thinned(history, every))
        found = [f for f in report.findings if f.name == wanted.rule]
        assert found, (every, [f.name for f in report.findings])
        worst = max(found, key=lambda f: f.severity.rank)
        assert worst.severity.rank >= Severity(wanted.severity).rank, every
        assert wanted.said in worst.message + worst.recommendation, every


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("name", sorted(HEALTHY | RECIPES))
def test_a_healthy_run_of_any_kind_is_not_alarming(name: str, seed: int, tmp_path: Path) -> None:
    recorded_healthy(name, tmp_path / "run", seed=seed)
    history = open_history(str(tmp_path / "run"))

    for every in (1, 10):
        report = analyze_flow(thinned(history, every))
        assert [f for f in report.findings if f.severity.rank >= Severity.HIGH.rank] == []
        medium = [f.name for f in report.findings if f.severity is Severity.MEDIUM]
        print(f"medium: {name}, seed {seed}, every {every}: {', '.join(medium) or 'none'}")


def test_a_deep_transformer_with_pre_norm_is_not_starved(tmp_path: Path) -> None:
    import torch

    torch.manual_seed(0)
    recorded(*deep_transformer(norm_first=True, rate=1e-4), tmp_path / "run", 60)

    report = analyze_flow(str(tmp_path / "run"))

    assert [f for f in report.findings if f.name == "vanishing-gradient"] == []
    assert [f for f in report.findings if f.severity.rank >= Severity.HIGH.rank] == []
