"""What a person sees of two checkpoints."""

from __future__ import annotations

from pathlib import Path

import torch
from pairs import drawn, drift, model

from gradscope.drift.analysis import analyze_drift
from gradscope.report.formats import Display, renderer
from gradscope.report.model import AnyReport


def shown(report: AnyReport, width: int | None = 120, detail: int = 1) -> str:
    text: str = renderer("table")(report, Display(width=width, detail=detail))
    return text


def test_a_cast_of_a_whole_model_is_one_row(tmp_path: Path) -> None:
    report = drift(tmp_path, model(), {n: t.bfloat16() for n, t in model().items()})

    text = shown(report)

    assert "16 rounding" in text
    assert "16 tensors" in text
    assert text.count("rounded to BF16 to nearest") == 1
    assert "Not evaluated" not in text


def test_identical_tensors_are_counted_and_not_listed(tmp_path: Path) -> None:
    new = model() | {"layers.1.mlp.weight": model()["layers.1.mlp.weight"] * 2}

    text = shown(drift(tmp_path, model(), new))

    assert "15 identical" in text
    assert "1 changed" in text
    assert "scaled by 2" in text
    assert "layers.0.q_proj" not in text


def test_tensors_of_one_place_of_a_stack_are_one_row_with_their_number(tmp_path: Path) -> None:
    new = {n: t + 0.1 * t.std() * drawn(*t.shape, seed=3) if "q_proj" in n else t
           for n, t in model().items()}  # fmt: skip

    text = shown(drift(tmp_path, model(), new))

    assert "layers.*.q_proj.weight  ×3" in text


def test_everything_is_there_off_a_terminal(tmp_path: Path) -> None:
    text = shown(drift(tmp_path, model(), model(seed=1)), width=None)

    assert all(name in text for name in model())


def test_a_narrow_terminal_keeps_its_width(tmp_path: Path) -> None:
    report = drift(tmp_path, model(), model(seed=1) | {"x" * 300: torch.ones(2, 2)})

    assert max(map(len, shown(report, width=80).splitlines())) <= 80


def test_what_training_keeps_is_neither_counted_nor_shown_first(tmp_path: Path) -> None:
    """Moments and counters of one element among them."""
    paths = []
    for step in (1.0, 90.0):
        net = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 1))
        torch.manual_seed(0)
        for p in net.parameters():
            torch.nn.init.normal_(p, std=0.1 + step / 1e4)
        adam = torch.optim.Adam(net.parameters())
        for _ in range(int(step)):
            net(torch.ones(2, 8)).sum().backward()
            adam.step()
        paths.append(tmp_path / f"{step}.pt")
        torch.save({"model": net.state_dict(), "optimizer": adam.state_dict()}, paths[-1])

    report = analyze_drift(*paths)

    assert report.result is not None
    assert dict(report.result.counts) == {"changed": 4}
    beside = {t.name for t in report.result.tensors if t.beside}
    assert {n.partition(".")[0] for n in beside} == {"optimizer"}
    assert len(beside) == 12
    assert "4 changed" in shown(report)
    rows = [line for line in shown(report).splitlines() if "  changed  " in line]
    of_training = [line.startswith("optimizer") for line in rows]
    assert of_training == sorted(of_training)
    assert {True, False} <= set(of_training)
