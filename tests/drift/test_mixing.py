"""Mixes of checkpoints: which weights they have, and what looks like a mix and is none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pairs import drawn, found, model, only, written

import gradscope
from gradscope.drift.result import DriftReport, Explanation
from gradscope.errors import UsageError

NAME = "layers.1.q_proj.weight"
State = dict[str, torch.Tensor]


def tuned(seed: int) -> State:
    """The model after training on something."""
    return {n: t + 0.02 * drawn(*t.shape, seed=seed) for n, t in model().items()}


def mixed(folder: Path, new: State, *parents: State, **options: Any) -> DriftReport:
    """The report of the model that became ``new``, which may be mixed from others."""
    base, mix = written(folder / "base.safetensors", model()), folder / "mix.safetensors"
    paths = [written(folder / f"{k}.safetensors", p) for k, p in enumerate(parents)]
    return gradscope.analyze_drift(base, written(mix, new), parents=paths, **options)


def why(folder: Path, new: State, *parents: State) -> Explanation:
    told = only(mixed(folder, new, *parents), NAME).explanation
    assert told is not None
    return told


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.875])
def test_an_interpolation_has_its_share(tmp_path: Path, share: float, dtype: torch.dtype) -> None:
    other = tuned(3)
    new = {n: torch.lerp(t, other[n], share).to(dtype) for n, t in model().items()}

    told = why(tmp_path, new, other)

    assert told.kind == "combined"
    assert told.facts["0.safetensors"] == pytest.approx(share, abs=2e-3)
    assert told.facts["base"] == pytest.approx(1 - share, abs=2e-3)
    assert "left" not in told.facts
    expected = torch.lerp(model()[NAME].double(), other[NAME].double(), share)
    left = (new[NAME].double() - expected).norm() / new[NAME].double().norm()
    assert told.residual == pytest.approx(left.item(), rel=0.05)


def test_shares_and_tasks_are_said_as_people_say_them(tmp_path: Path) -> None:
    base, one, two = model(), tuned(3), tuned(4)
    half = {n: t.lerp(one[n], 0.5) for n, t in base.items()}
    tasks = {n: t + 1.5 * (one[n] - t) - 0.5 * (two[n] - t) for n, t in base.items()}
    soup = {n: (t + one[n] + two[n]) / 3 for n, t in base.items()}

    assert why(tmp_path, half, one).text == "0.5 × the base + 0.5 × '0.safetensors'"
    assert why(tmp_path, tasks, one, two).text == (
        "the base + 1.5 × ('0.safetensors' − the base) − 0.5 × ('1.safetensors' − the base)"
    )
    assert why(tmp_path, soup, one, two).text.startswith("0.3333 × the base + 0.3333 × '0.")
    assert why(tmp_path, one, two, one).text == "the tensor of '1.safetensors'"


def test_spherical_interpolation_has_weights_of_another_sum(tmp_path: Path) -> None:
    base, far = model(), model(seed=9)
    x, y = base[NAME].double(), far[NAME].double()
    angle = torch.arccos((x * y).sum() / x.norm() / y.norm())
    weights = [(torch.sin(k * angle) / torch.sin(angle)).item() for k in (0.7, 0.3)]
    new = base | {NAME: (weights[0] * x + weights[1] * y).float()}

    told = why(tmp_path, new, far)

    assert [told.facts["base"], told.facts["0.safetensors"]] == pytest.approx(weights, rel=1e-5)
    assert sum(weights) > 1.1


def test_a_mix_that_was_trained_on_keeps_what_is_left_over(tmp_path: Path) -> None:
    base, other = model(), tuned(3)
    step = 0.02 * drawn(32, 32, seed=8)
    new = base | {NAME: base[NAME].lerp(other[NAME], 0.5) + 0.03 * step}

    told = only(mixed(tmp_path, new, other), NAME)

    assert told.explanation is not None
    assert told.explanation.kind == "combined"
    left = (0.03 * step).norm() / (new[NAME] - base[NAME]).norm()
    assert f"; {left:.1%} of the change is left over" in told.explanation.text
    assert told.severity != "info"


def test_training_is_no_mix(tmp_path: Path) -> None:
    report = mixed(tmp_path, tuned(5), tuned(3))

    assert only(report, NAME).explanation is None


def test_a_merge_of_checkpoints_can_be_expected(tmp_path: Path) -> None:
    other = tuned(3)
    new = {n: torch.lerp(t, other[n], 0.3).bfloat16() for n, t in model().items()}

    right = mixed(tmp_path, new, other, expect="merge")
    idle = mixed(tmp_path, model(), other, expect="merge")
    wrong = mixed(tmp_path, new | {NAME: tuned(6)[NAME]}, other, expect="merge")

    assert found(right) == {}
    assert found(idle) == {"missing-change": ["high"]}
    assert found(wrong)["unexpected-change"] == ["high"]


def test_parents_may_lack_tensors_and_have_other_names(tmp_path: Path) -> None:
    other = {f"module.{n}": t for n, t in tuned(3).items() if "embed" not in n}
    new = model() | {NAME: model()[NAME].lerp(other[f"module.{NAME}"], 0.25)}

    assert why(tmp_path, new, other).text == "0.75 × the base + 0.25 × '0.safetensors'"


def test_parents_that_cannot_be_read_or_used_are_told(tmp_path: Path) -> None:
    base = written(tmp_path / "base.safetensors", model())

    report = gradscope.analyze_drift(base, base, parents=[tmp_path / "absent.safetensors"])

    assert report.gate.exit_code == 3
    assert [e.input for e in report.errors] == [str(tmp_path / "absent.safetensors")]
    with pytest.raises(UsageError, match="no mix can be judged"):
        gradscope.analyze_drift(base, base, parents=[base], headers_only=True)
    with pytest.raises(UsageError, match="one of them"):
        gradscope.analyze_drift(base, base, parents=[base], expect="merge", adapter=base)


def test_the_base_as_its_own_parent_says_nothing_more(tmp_path: Path) -> None:
    new = model() | {NAME: model()[NAME] + 0.02 * drawn(32, 32, seed=5)}

    assert only(mixed(tmp_path, new, model()), NAME).explanation is None


def test_a_parent_that_is_given_twice_is_one(tmp_path: Path) -> None:
    base = written(tmp_path / "base.safetensors", model())
    parent = written(tmp_path / "p.safetensors", tuned(3))

    report = gradscope.analyze_drift(base, parent, parents=[parent, parent], expect="merge")

    assert report.gate.exit_code == 0
    assert only(report, NAME).explanation is not None
