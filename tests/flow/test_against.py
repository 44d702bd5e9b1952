"""What differs between two runs, against arithmetic on the norms that were planted."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from gradscope.flow.against import common_steps
from gradscope.flow.analysis import analyze_flow
from gradscope.flow.records.against import Against
from gradscope.flow.result import FlowReport
from gradscope.histories.history import History

from .made import made, noise

RECORDS = 200
LOSS = np.linspace(2, 1, RECORDS)


def compared(here: History, there: History) -> Against:
    found = analyze_flow(here, against=there).result.against
    assert found is not None
    return found


def test_a_run_against_itself_differs_in_nothing() -> None:
    run = made(noise(RECORDS, 4), loss=LOSS)

    found = compared(run, run)

    assert [layer.level for layer in found.layers] == [0, 0, 0, 0]
    assert not any(layer.differs for layer in found.layers)
    assert not any((found.findings, found.onsets, found.only_here, found.only_there))
    assert found.efficiency.here == found.efficiency.there
    assert found.loss.here == found.loss.there


def test_noise_of_another_seed_is_no_difference() -> None:
    found = compared(made(noise(RECORDS, 6, seed=1)), made(noise(RECORDS, 6, seed=2)))

    assert not any(layer.differs for layer in found.layers)


def test_the_level_of_a_layer_is_the_ratio_of_median_rms_gradients_of_the_last_window() -> None:
    here, there = noise(RECORDS, 3, seed=1), noise(RECORDS, 3, seed=2)
    here[:, 1] *= 100
    sizes = [100, 100, 10_000]

    found = compared(made(here, numel=sizes), made(there, numel=100)).layers

    def level(norms: np.ndarray, size: int) -> float:
        return float(np.median(np.log10(norms.astype(np.float32)[-32:] / np.sqrt(size))))

    wanted = [level(here[:, i], sizes[i]) - level(there[:, i], 100) for i in range(3)]
    assert [layer.level for layer in found] == pytest.approx(wanted, rel=1e-6)
    assert [layer.differs for layer in found] == [False, True, True]


def test_layers_are_matched_by_name_and_those_of_one_run_are_listed() -> None:
    here = made(noise(RECORDS, 3) * [1, 10, 100], names=["a", "b", "new"])
    there = made(noise(RECORDS, 3) * [10, 1, 1], names=["b", "a", "old"])

    found = compared(here, there)

    assert [layer.layer_name for layer in found.layers] == ["a", "b"]
    assert not any(layer.differs for layer in found.layers)
    assert (found.only_here, found.only_there) == (("new",), ("old",))


def test_runs_of_different_length_are_compared_over_the_steps_of_both() -> None:
    long = noise(RECORDS, 4, 0.05)
    long[100:] *= 1000

    found = compared(made(noise(100, 4, 0.05)), made(long))

    assert (found.first_step, found.last_step) == (0, 99)
    assert not any(layer.differs for layer in found.layers)


def test_steps_recorded_at_other_intervals_are_compared() -> None:
    sparse = made(noise(20, 2), steps=np.arange(0, RECORDS, 10))

    found = compared(made(noise(RECORDS, 2)), sparse)

    assert (found.first_step, found.last_step) == (0, 190)
    assert not any(layer.differs for layer in found.layers)


def exploding_from(record: int) -> History:
    growth = np.exp(0.1 * np.clip(np.arange(RECORDS) - record, 0, None))
    return made(noise(RECORDS, 4, 0.05) * growth[:, None])


def test_new_findings_gone_ones_and_onsets_are_told() -> None:
    healthy, broken = made(noise(RECORDS, 4, 0.05)), exploding_from(120)

    worse, better = compared(broken, healthy), compared(healthy, broken)

    (new,), (gone,) = worse.findings, better.findings
    assert (new.name, new.here, new.there) == ("exploding-gradient", "critical", None)
    assert (gone.name, gone.here, gone.there) == ("exploding-gradient", None, "critical")
    (onset,) = worse.onsets
    assert (onset.kind, onset.there) == ("exploding", None)
    assert onset.here is not None
    assert 115 <= onset.here[1] <= 130


def test_an_onset_of_both_runs_has_both_steps() -> None:
    (onset,) = compared(exploding_from(120), exploding_from(60)).onsets

    assert onset.here is not None
    assert onset.there is not None
    assert onset.here[1] - onset.there[1] == pytest.approx(60, abs=8)


def test_losses_and_update_ratios_are_compared() -> None:
    weights = np.ones((RECORDS, 2))
    here = made(noise(RECORDS, 2), loss=LOSS, param_l2=weights, update_l2=weights * 1e-2)
    there = made(noise(RECORDS, 2), loss=LOSS / 2, param_l2=weights, update_l2=weights * 1e-3)

    found = compared(here, there)

    assert found.loss.here == pytest.approx(2 * (found.loss.there or 0))
    assert [layer.update for layer in found.layers] == pytest.approx([1, 1])


def test_what_too_few_records_or_zeros_have_no_level_is_unknown() -> None:
    zero = noise(RECORDS, 2)
    zero[:, 0] = 0

    assert [x.level is None for x in compared(made(zero), made(noise(RECORDS, 2))).layers] == [
        True,
        False,
    ]
    assert [x.level for x in compared(made(noise(4, 2)), made(noise(4, 2))).layers] == [None, None]


def test_differences_do_not_change_the_gate() -> None:
    healthy = made(noise(RECORDS, 4, 0.05))

    assert analyze_flow(healthy, against=exploding_from(120)).gate.exit_code == 0
    assert analyze_flow(exploding_from(120), against=healthy).gate.exit_code == 1


def test_runs_without_a_common_step_are_not_compared_and_coverage_says_so() -> None:
    later = made(noise(50, 2), steps=np.arange(1000, 1050))

    report = analyze_flow(made(noise(50, 2)), against=later)

    assert report.result.against is None
    assert any("no step in common" in skip.reason for skip in report.coverage.skipped)
    assert common_steps(np.arange(3), np.arange(0)) is None
    assert common_steps(np.arange(3), np.arange(2, 5)) == (2, 2)


def test_an_unreadable_other_run_is_an_error_and_the_first_is_reported(tmp_path: Path) -> None:
    report = analyze_flow(exploding_from(120), against=tmp_path / "gone.npz")

    assert report.gate.exit_code == 3
    assert [f.name for f in report.findings] == ["exploding-gradient"]
    assert "gone.npz" in report.errors[0].input


def test_the_report_with_a_comparison_survives_json() -> None:
    report = analyze_flow(exploding_from(120), against=exploding_from(60))

    again = FlowReport.model_validate_json(report.model_dump_json())

    assert again.result.against == report.result.against
