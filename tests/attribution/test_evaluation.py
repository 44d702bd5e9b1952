"""What --evaluate measures and judges of trained networks, shares, and leaves out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from architectures import mobilenet_v2
from PIL import Image
from torch import Tensor, nn

import gradscope
from gradscope.attribution.evaluation.measured import JUDGED
from gradscope.errors import UsageError
from gradscope.report.model import as_json

from .forms import model
from .networks import digits, scenes, trained

FETCHED = Path(__file__).parents[2] / "fixtures" / "fetched"
PICTURES = FETCHED / "pictures"
PLAIN = "image_mean=0,image_std=1,size={0}x{0}"


def saved(pictures: Tensor, folder: Path) -> Path:
    for number, picture in enumerate(pictures):
        pixels = (picture[0] * 255).round().byte().numpy()
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return folder


def judged(report: Any) -> set[str]:
    return {f.subject for f in report.findings if f.name == "sanity-check-failed"}


def cnn(name: str, folder: Path) -> tuple[nn.Module, list[str], str]:
    """A trained network, pictures of its kind, and their preprocessing."""
    if name == "mobilenet":
        net = mobilenet_v2()
        net.load_state_dict(torch.load(FETCHED / "mobilenet_v2.pth"))
        return net.eval(), [str(PICTURES / "chelsea.png")], "imagenet"
    if name == "digits":
        from make import load_digits

        pictures = load_digits()[0][:4]
        return digits(), [str(saved(pictures, folder))], PLAIN.format(8)
    return trained(), [str(saved(scenes(4, 9)[0], folder))], PLAIN.format(32)


needs_fetched = pytest.mark.skipif(
    not (PICTURES / "chelsea.png").is_file() or not (FETCHED / "mobilenet_v2.pth").is_file(),
    reason="photographs or MobileNetV2 not found: run `make fixtures`",
)


@pytest.mark.parametrize(
    "name",
    [
        "digits",
        "residual",
        pytest.param("mobilenet", marks=[needs_fetched, pytest.mark.fetched]),
    ],
)
def test_guided_backpropagation_fails_the_sanity_check_and_gradients_pass(
    name: str, tmp_path: Path
) -> None:
    net, pictures, preprocess = cnn(name, tmp_path)

    report = gradscope.explain(
        net,
        pictures,
        ["gradcam", "saliency", "input-x-gradient", "guided-backprop", "deconvnet"],
        preprocess=preprocess,
        evaluated=True,
        select=["sanity-check-failed"],
    )

    assert judged(report) == {"guided-backprop", "deconvnet"}


def test_rise_passes_the_sanity_check_and_failed_it_with_the_papers_divisor(
    tmp_path: Path,
) -> None:
    asked: dict[str, Any] = {
        "preprocess": PLAIN.format(32), "evaluated": True, "masks": 200,
        "select": ["sanity-check-failed"],
    }  # fmt: skip
    folder = saved(scenes(3, 9)[0], tmp_path)

    fair, papers = (
        gradscope.explain(trained(), folder, "rise", coverage=coverage, **asked)
        for coverage in (True, False)
    )

    assert judged(fair) == set()
    assert judged(papers) == {"rise"}


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    pixels = np.random.default_rng(0).integers(0, 255, (30, 47, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def explained(photo: Path | list[Path], net: nn.Module | None = None, **options: Any) -> Any:
    preprocess = "image_mean=0.5/0.5/0.5,image_std=0.25/0.25/0.25,size=16x16"
    return gradscope.explain(net or model("rectifiers"), photo, preprocess=preprocess, **options)


def test_evaluation_fills_every_diagnostic_that_rules_judge(photo: Path) -> None:
    report = explained(photo, method=["gradcam", "guided-backprop"], evaluated=True)

    for e in report.result.explanations:
        known = e.diagnostics
        assert 0 <= known.insertion_auc <= 1
        assert 0 <= known.deletion_auc <= 1
        assert 3 <= known.random_control.rankings <= 8
        assert known.sensitivity > 0
        assert 0 < known.repeatability <= 1
        assert known.sparseness > 0
        assert len(known.randomisation) == 5
        assert known.randomisation[-1].layer == "stem"
        assert -1 <= known.similarity <= 1
        assert known.complexity_rise is not None
        (other,) = set(known.agreement)
        assert other != e.method
        assert known.road is None
    assert report.coverage.not_evaluated[0].rule == "incomplete-attribution"


def test_progress_never_goes_back_and_ends_complete(photo: Path) -> None:
    told: list[tuple[int, int]] = []

    explained(
        photo, method=["gradcam", "integrated-gradients"], target="top2", evaluated=True,
        progress=lambda done, total: told.append((done, total)),
    )  # fmt: skip

    shares = [done / total for done, total in told]
    assert shares == sorted(shares)
    assert shares[-1] == 1
    assert len(set(shares)) > 10


def counted(photo: Path, **options: Any) -> int:
    """How many pictures a run puts to the model."""
    net = model("rectifiers")
    seen: list[int] = []
    net.register_forward_pre_hook(lambda _m, inputs: seen.append(len(inputs[0])))
    explained(photo, net, target=1, **options)
    return sum(seen)


def test_methods_that_read_a_layer_share_the_passes_of_repetitions(photo: Path) -> None:
    one = counted(photo, method="gradcam", layer="last", evaluated=True)
    cams = ["gradcam", "hirescam", "layercam", "xgradcam"]

    four = counted(photo, method=cams, layer="last", evaluated=True)

    # Insertion and deletion are each map's own: up to ten pictures for it and each position.
    assert four - one <= 3 * (3 * 10 + 8 * 10)
    assert one <= 100


def test_repetitions_are_made_with_a_quarter_of_the_effort(photo: Path) -> None:
    plain = counted(photo, method="rise", masks=400)

    assert counted(photo, method="rise", masks=400, evaluated=True) < 8 * plain


def test_what_a_budget_leaves_out_is_said(photo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(10_000))
    monkeypatch.setattr(
        "gradscope.attribution.evaluation.budget.time.monotonic", lambda: next(clock)
    )

    report = explained(
        photo, method=["gradcam", "saliency"], evaluated=True, budget=3.5, fail_on="never"
    )

    (first, second) = (e.diagnostics for e in report.result.explanations)
    assert first.agreement is not None
    assert second.agreement is not None
    assert first.insertion_auc is not None
    assert second.insertion_auc is None
    assert first.randomisation is first.sensitivity is None
    said = [(s.subject, s.reason) for s in report.coverage.skipped]
    assert said == [
        (f"{name} of 1 picture", "the budget of 3.5 s was spent") for name in list(JUDGED)[1:]
    ]
    assert report.coverage.narrowed == ("--budget",)
    assert {n.rule for n in report.coverage.not_evaluated} >= {"sanity-check-failed"}
    assert report.gate.exit_code == 0


def test_a_budget_that_suffices_changes_nothing(photo: Path) -> None:
    free, limited = (
        as_json(explained(photo, evaluated=True, budget=budget)) for budget in (None, 1e6)
    )

    assert free == limited
    with pytest.raises(UsageError, match="--budget is for --evaluate"):
        explained(photo, budget=3)
