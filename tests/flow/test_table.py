"""What a terminal and a file are shown of a run."""

from __future__ import annotations

import math

import numpy as np
import pytest

from gradscope import analyze_flow
from gradscope.flow import table
from gradscope.histories.history import History
from gradscope.report.formats import Display
from gradscope.report.formats.table_ import render

from .made import made, noise


def shown(history: History, **display: object) -> str:
    return render(analyze_flow(history, fail_on="never"), Display(**display))


@pytest.mark.parametrize(
    ("values", "bins", "drawn"),
    [
        ([1.0, 10.0, 100.0, 1000.0], 4, "▁▃▆█"),
        ([1.0, 1.5], 2, "▁▅"),
        ([1.0, 1.0, 1.0], 3, "▁▁▁"),
        ([1.0, 100.0, 10.0, 10.0], 2, "▁▁"),
        ([1.0, 0.0, 1.0, None], 4, "▁_▁ "),
        ([0.0, 1.0, 0.0, 0.0], 2, "▁_"),
        ([1.0, math.inf, 1.0, 1.0], 2, "!▁"),
        ([1.0, 2.0], 9, "▁█"),
        ([], 5, ""),
        ([None, None], 2, "  "),
    ],
)
def test_a_trace_is_the_mean_logarithm_by_bin_of_time(
    values: list[float | None], bins: int, drawn: str
) -> None:
    assert table.trace(values, bins) == drawn


def test_the_head_tells_the_network() -> None:
    edges = np.array([[i, i + 1] for i in range(5)])
    norms = np.tile(np.exp(-0.5 * np.arange(5)[::-1]), (20, 1))

    text = shown(made(norms, steps=np.arange(20) * 5, edges=edges, topology="given"))

    assert "steps 0–95 (20 records)" in text
    assert "layers 5" in text
    assert "topology given" in text
    assert "per layer ×0.61 towards the input" in text
    assert "efficiency 0.14" in text
    assert "connectivity 100%" in text
    assert "stability 1.00" in text


def test_a_file_has_every_layer_and_a_terminal_forty_and_the_rest_counted() -> None:
    history = made(noise(20, 50))

    assert "layers.49" in shown(history)
    part = shown(history, width=120)
    assert "\nlayers.39 " in part
    assert "\nlayers.40 " not in part.split("RMS gradient")[0]
    assert "… 10 more layers; -v shows every one" in part
    assert "more layers" not in shown(history, width=120, detail=2)
    assert "layers.3" not in shown(history, width=120, detail=0)


def test_a_row_tells_the_last_norm_the_deficit_and_the_update() -> None:
    norms = np.tile([0.01, 1.0], (20, 1))
    updates = {"param_l2": np.ones((20, 2)), "update_l2": np.full((20, 2), 2.5e-3)}

    lines = shown(made(norms, **updates)).splitlines()

    first = next(line for line in lines if line.startswith("layers.0"))
    assert first.split()[1:7] == ["100", "0.01", "10^-2.0", "2.5e-03", "1.00", "indeterminate"]
    bare = shown(made(norms[:3]))
    row = next(line for line in bare.splitlines() if line.startswith("layers.0"))
    assert row.split()[4:6] == ["–", "–"]


def test_a_long_name_keeps_its_end_on_a_narrow_terminal() -> None:
    name = "encoder." + "block." * 8 + "last"
    history = made(noise(20, 2), names=[name, ""])

    narrow, wide = shown(history, width=80), shown(history, width=160)

    assert name not in narrow
    assert "…" + name[-29:] in narrow
    assert name in wide.split("RMS gradient")[0]
    assert "(root)" in narrow


def test_layers_by_time_are_drawn_on_one_scale_for_all() -> None:
    norms = np.tile([1.0, 1e-4, 0.0], (40, 1))
    norms[20:, 0] = np.nan

    text = shown(made(norms, numel=1), width=80)

    rows = {line.split()[0]: line[32:] for line in text.split("RMS gradient")[1].splitlines()[1:4]}
    assert set(rows["layers.0"][:20]) == {"█"}
    assert set(rows["layers.0"][20:]) == {"!"}
    assert set(rows["layers.1"]) == {"░"}
    assert set(rows["layers.2"]) == {"_"}
    assert "1e-4 " in text
    assert " 1e0 " in text
    ascii_ = shown(made(norms, numel=1), width=80, unicode=False)
    assert "#" * 20 in ascii_
    assert "." * 40 in ascii_


def test_cells_are_per_element_and_a_file_or_one_layer_has_no_picture() -> None:
    norms = np.ones((20, 2))

    assert "1e-2 " in shown(made(norms, numel=[1, 10_000]), width=80)
    assert "RMS gradient" not in shown(made(norms))
    assert "RMS gradient" not in shown(made(norms[:, :1]), width=80)
    assert "RMS gradient" not in shown(made(norms * np.nan), width=80)


def test_of_many_layers_every_nth_is_drawn() -> None:
    text = shown(made(noise(20, 81)), width=80).split("RMS gradient")[1]

    drawn = [line.split()[0] for line in text.splitlines() if line.startswith("layers.")]
    assert drawn == [f"layers.{i}" for i in range(0, 81, 3)]


def test_colours_are_for_terminals_that_have_them() -> None:
    history = made(noise(20, 3))

    assert "\x1b[" not in shown(history, width=80)
    assert "38;2;" in shown(history, width=80, colour=True)


def test_paths_are_shown_with_their_weak_link_where_a_topology_is_known() -> None:
    edges = np.array(
        [*([i, 5] for i in range(5)), [5, 6], *([i, i + 1] for i in range(6, 12)), [12, 13]]
    )
    norms = noise(20, 13)
    norms[:, 5] = 1e-3
    text = shown(made(norms, edges=edges, topology="given"), width=160)

    paths = [line for line in text.splitlines() if " ← " in line]
    assert len(paths) == 3
    assert paths[0].startswith("  layers.12 ← layers.11 ← layers.10 ← … ← layers.5 ← layers.0")
    assert "weakest link" in paths[0]
    assert "criticality 1.00" in paths[0]
    every = shown(made(norms, edges=edges, topology="given"))
    assert sum(" ← " in line for line in every.splitlines()) == 5
    assert "Widest paths from the loss" in text
    assert "Widest paths" not in shown(made(norms))


def test_notes_come_first() -> None:
    text = shown(made(noise(20, 2), numel=None, meta={"stage": "pre_step"}))

    assert "note the layers' sizes are unknown" in text
    assert "pre-step hook" in text


@pytest.mark.parametrize("records", [1, 5, 60])
def test_a_run_of_losses_alone_shows_the_loss_and_no_layers(records: int) -> None:
    history = made(np.empty((records, 0)), loss=np.geomspace(2.0, 0.5, records))

    text = shown(history)

    last = {1: "2", 5: "0.5", 60: "0.5"}[records]
    assert f"({records} record{'s' * (records > 1)})  loss 2 → {last}  over time (log) " in text
    assert "parameters" not in text
    assert "topology" not in text
    assert ("a loss is judged from 8 on" in text) is (records < 8)
    assert analyze_flow(history).gate.exit_code == (4 if records < 8 else 0)
