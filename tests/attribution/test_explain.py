"""``explain`` from Python: reports, files, targets, geometry, real photographs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from architectures import mobilenet_v2
from PIL import Image
from torch import Tensor, nn

import gradscope
from gradscope.attribution.methods import methods
from gradscope.errors import InputError, NotApplicableError, UsageError
from gradscope.models.images import open_image
from gradscope.models.preprocessing import IMAGENET, Preprocessing
from gradscope.report.model import as_json

from .forms import model

SQUASHED = replace(IMAGENET, resize=(224, 224))
FETCHED = Path(__file__).parents[2] / "fixtures" / "fetched"
PICTURES = FETCHED / "pictures"
PREPROCESS = "image_mean=0.5/0.5/0.5,image_std=0.25/0.25/0.25,size=16x16"


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    pixels = np.random.default_rng(0).integers(0, 255, (30, 47, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def explained(photo: Path, **options: Any) -> Any:
    return gradscope.explain(model("rectifiers"), photo, preprocess=PREPROCESS, **options)


def test_a_report_holds_the_map_its_target_and_what_it_takes_to_repeat_it(photo: Path) -> None:
    report = explained(photo, method=["gradcam", "saliency"], target=2, seed=5)

    assert report.gate.exit_code == 0
    result = report.result
    cam, gradient = result.explanations
    net = model("rectifiers")
    pixels = Image.open(photo).resize((16, 16), Image.Resampling.BILINEAR)
    x = (torch.from_numpy(np.asarray(pixels, np.float32)).permute(2, 0, 1)[None] / 255 - 0.5) / 0.25
    logits = net(x)[0].detach()
    assert cam.target.index == 2
    assert cam.target.score == pytest.approx(float(logits[2]), abs=1e-5)
    assert cam.target.probability == pytest.approx(float(logits.softmax(0)[2]), abs=1e-5)
    wanted = gradscope.attribute(net, x, "gradcam", target=2)
    assert cam.layer == wanted.layer == "last"
    assert "the last layer with maps" in cam.layer_reason
    assert cam.map.max == pytest.approx(float(wanted.upsampled.max()), rel=1e-4)
    assert (cam.map.shape, gradient.layer) == ((16, 16), None)
    assert [p.index for p in result.images[0].predictions] == logits.argsort(
        descending=True
    ).tolist()
    assert result.environment.seed == 5
    assert set(result.environment.versions) == {"gradscope", "torch", "numpy"}
    assert len(result.model.sha256) == len(result.images[0].sha256) == 64
    assert result.preprocessing.size == (16, 16)


def test_a_figure_is_one_more_file_of_each_map(photo: Path, tmp_path: Path) -> None:
    report = explained(photo, method=["gradcam"], output=tmp_path / "out", figure="svg")

    (found,) = report.result.explanations
    text = Path(found.files.figure).read_text()
    assert f"probability {found.target.probability:.2g}" in text
    assert f"gradcam at {found.layer}" in text
    assert (
        explained(photo, method=["gradcam"], output=tmp_path / "out")
        .result.explanations[0]
        .files.figure
        is None
    )


def test_an_unknown_figure_is_refused_before_anything_is_read(photo: Path) -> None:
    with pytest.raises(UsageError, match="png, svg, pdf"):
        explained(photo, figure="gif")


def test_files_hold_the_raw_signed_values_in_input_geometry(photo: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    report = explained(
        photo, method=["gradcam", "input-x-gradient", "gradcam++"], output=out, target=1
    )

    names = {path.name for path in out.iterdir()}
    assert names == {
        "photo.1.sheet.png",
        *(f"photo.{m}.1.{end}" for m in ("gradcam", "input-x-gradient", "gradcampp")
          for end in ("heatmap.png", "overlay.png", "npz")),
    }  # fmt: skip
    for e in report.result.explanations:
        with np.load(e.files.array) as arrays:
            assert arrays["map"].shape == (16, 16)
            assert float(arrays["map"].min()) == pytest.approx(e.map.min)
            if e.method == "input-x-gradient":
                np.testing.assert_allclose(arrays["attribution"].sum(0), arrays["map"], atol=1e-5)
                assert arrays["attribution"].shape == (3, 16, 16)
            else:
                assert arrays.files == ["map"]
        with Image.open(e.files.overlay) as overlay:
            assert overlay.size == (6 * 47, 6 * 30)
            assert json.loads(overlay.info["Comment"])["image"] == str(photo)


def test_a_map_of_a_small_picture_is_drawn_at_a_size_that_can_be_looked_at(
    tmp_path: Path,
) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (28, 20, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "digit.png")

    report = explained(tmp_path / "digit.png", method="gradcam", output=tmp_path / "out")

    files = report.result.explanations[0].files
    for drawn in files.overlay, files.heatmap:
        with Image.open(drawn) as picture:
            assert picture.size == (200, 280)


def test_a_huge_picture_is_drawn_at_a_size_that_can_be_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gradscope.attribution.drawing.folder._MOST_PIXELS", 1 << 14)
    pixels = np.zeros((200, 240, 3), np.uint8)
    pixels[:100, :120] = 200
    Image.fromarray(pixels).save(tmp_path / "huge.png")

    report = explained(tmp_path / "huge.png", method="occlusion", output=tmp_path / "out")

    with Image.open(report.result.explanations[0].files.overlay) as overlay:
        width, height = overlay.size
    assert 0.9 * (1 << 14) < width * height <= 1 << 14
    assert width / height == pytest.approx(6 / 5, rel=0.02)
    assert report.result.images[0].width == 240


def test_a_picture_just_small_enough_is_drawn_at_its_own_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gradscope.attribution.drawing.folder._MOST_PIXELS", 40 * 50)
    Image.fromarray(np.zeros((30, 40, 3), np.uint8)).save(tmp_path / "small.png")

    report = explained(tmp_path / "small.png", method="occlusion", output=tmp_path / "out")

    with Image.open(report.result.explanations[0].files.overlay) as overlay:
        assert overlay.size == (7 * 40, 7 * 30)


def test_top_targets_and_contrasts(photo: Path) -> None:
    ranked = explained(photo, target="top3").result
    order = [p.index for p in ranked.images[0].predictions]
    assert [e.target.index for e in ranked.explanations] == order[:3]
    first = explained(photo, target="top1", versus="top1").result.explanations[0].target
    assert (first.index, first.versus) == (order[0], order[1])
    named = explained(photo, target="b", versus="c", labels={0: "a", 1: "b", 2: "c"}).result
    target = named.explanations[0].target
    assert (target.index, target.label, target.versus, target.versus_label) == (1, "b", 2, "c")


def test_the_same_request_gives_the_same_report(photo: Path) -> None:
    twice = [
        as_json(explained(photo, method=["smoothgrad", "rise"], masks=20, evaluated=True, seed=3))
        for _ in range(2)
    ]

    assert twice[0] == twice[1]
    other = as_json(explained(photo, method=["smoothgrad", "rise"], masks=20, seed=4))
    first, second = (r["result"]["explanations"][0]["map"] for r in (twice[0], other))
    assert first != second


def test_damaged_pictures_are_reported_and_the_rest_is_done(photo: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.jpg").write_bytes(b"nothing")

    report = explained(tmp_path, method="saliency")

    assert report.gate.exit_code == 3
    assert [Path(e.input).name for e in report.errors] == ["bad.jpg"]
    assert [Path(i.path).name for i in report.result.images] == ["photo.png"]
    assert (report.coverage.analyzed, report.coverage.total) == (1, 2)
    none = explained(tmp_path / "bad.jpg")
    assert none.gate.exit_code == 3


def test_several_methods_share_the_pass_that_reads_the_layer(photo: Path) -> None:
    net = model("rectifiers")
    calls = []
    net.register_forward_hook(lambda _m, _i, _o: calls.append(1))
    cams = ["gradcam", "gradcam++", "xgradcam", "hirescam", "layercam", "eigencam"]

    gradscope.explain(net, photo, cams, preprocess=PREPROCESS, layer="last")

    assert len(calls) == 1


def test_options_go_to_the_methods_that_have_them(photo: Path) -> None:
    first, second = explained(
        photo, method=["gradcam", "integrated-gradients"], steps=4
    ).result.explanations

    assert first.options["relu"] is False
    assert "steps" not in first.options
    assert second.options["steps"] == 4
    assert second.diagnostics.relative_delta is not None
    with pytest.raises(UsageError, match="no option 'stepps'"):
        explained(photo, method=["gradcam", "saliency"], stepps=4)


def test_a_picture_can_be_the_reference(photo: Path, tmp_path: Path) -> None:
    Image.new("RGB", (20, 20), (255, 255, 255)).save(tmp_path / "white.png")

    given, named = (
        explained(photo, method="integrated-gradients", reference=r, target=0).result
        for r in (str(tmp_path / "white.png"), "white")
    )

    assert given.explanations[0].map.sum == pytest.approx(named.explanations[0].map.sum, rel=1e-4)
    assert given.explanations[0].options["reference"] == "an image"
    with pytest.raises(UsageError, match="neither one of black"):
        explained(photo, method="integrated-gradients", reference="grey")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"layer": "nothing"}, "no layer 'nothing'"),
        ({"layer": "head"}, r"returns \[1, 4\], which has no positions"),
        ({"target": 9}, "class indices are 0 to 3"),
        ({"target": "cat"}, "classes have no names"),
        ({"method": "attention-rollout"}, "attention-rollout: no self-attention found"),
        ({"colormap": "rainbow"}, "no colormap"),
        ({"fail_on": "bad"}, "fail_on"),
        ({"method": []}, "name a method"),
    ],
)
def test_a_wrong_request_is_refused(photo: Path, options: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        explained(photo, **options)


def test_a_size_that_the_model_refuses_is_a_usage_error_in_its_words(photo: Path) -> None:
    with pytest.raises(UsageError, match=r"refuses inputs \[1, 3, 20, 20\]"):
        gradscope.explain(model("rectifiers"), photo, preprocess="size=20x20")


def test_a_model_that_gives_no_scores_is_no_image_model(photo: Path) -> None:
    with pytest.raises(UsageError, match="scores at every position: --target mask:CLASS"):
        gradscope.explain(nn.Conv2d(3, 4, 3), photo)


@pytest.fixture
def number() -> nn.Module:
    """A grey model that returns one number."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 26 * 26, 1)
    ).eval()  # fmt: skip


def test_one_number_is_a_value_and_no_class(photo: Path, number: nn.Module) -> None:
    result = gradscope.explain(number, photo, "saliency").result

    assert result.preprocessing.size == (28, 28)
    assert result.preprocessing.assumed
    assert (result.model.classes, result.model.head) == (1, "value")
    target = result.explanations[0].target
    assert (target.aim, target.probability, target.named) == ("value", None, "value")
    (prediction,) = result.images[0].predictions
    assert (prediction.score, prediction.probability) == (target.score, None)
    assert any("if it is the logit of yes" in note for note in result.notes)


def test_one_number_is_the_logit_of_yes_where_no_and_yes_have_names(
    photo: Path, number: nn.Module
) -> None:
    value = gradscope.explain(number, photo, "saliency").result.explanations[0].target.score

    yes, no = (
        gradscope.explain(number, photo, "saliency", target=name, labels={0: "no", 1: "yes"}).result
        for name in ("yes", "no")
    )

    assert (yes.explanations[0].target.score, no.explanations[0].target.score) == (value, -value)
    probability = 1 / (1 + np.exp(-value))
    assert yes.explanations[0].target.probability == pytest.approx(probability, rel=1e-5)
    assert no.explanations[0].target.probability == pytest.approx(1 - probability, rel=1e-5)


def test_a_models_own_probability_of_yes_is_told(photo: Path, number: nn.Module) -> None:
    net = nn.Sequential(number, nn.Sigmoid())
    logit = gradscope.explain(number, photo, "saliency").result.explanations[0].target.score

    target = gradscope.explain(net, photo, "saliency", target=1).result.explanations[0].target

    assert target.probability == target.score == pytest.approx(1 / (1 + np.exp(-logit)), rel=1e-5)


def test_an_embedding_has_no_likeliest_class(photo: Path) -> None:
    net = nn.Sequential(*list(model("rectifiers").children())[:2], nn.Flatten())
    net.num_classes = 0  # type: ignore[assignment]

    with pytest.raises(UsageError, match="an embedding"):
        gradscope.explain(net, photo, preprocess=PREPROCESS)
    result = gradscope.explain(net, photo, "saliency", preprocess=PREPROCESS, target=3).result
    assert (result.model.head, result.images[0].predictions) == ("embedding", ())
    assert result.explanations[0].target.named == "channel:3"


class Heads(nn.Module):
    """Two heads side by side, and the features that both read."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.other = model("rectifiers"), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        kind = self.net(x)
        return {
            "features": x.mean((2, 3)),
            "kind": kind,
            "colour": self.other(x.square().mean((2, 3))),
        }


def test_heads_that_compete_are_told_and_one_can_be_asked_for(photo: Path) -> None:
    first = gradscope.explain(Heads().eval(), photo, preprocess=PREPROCESS)
    asked = gradscope.explain(
        Heads().eval(), photo, "saliency", preprocess=PREPROCESS, output_name="colour"
    )

    assert (first.result.model.output, first.result.model.classes) == ("kind", 4)
    assert [f.name for f in first.findings] == ["ambiguous-output"]
    assert (asked.result.model.output, asked.result.model.classes) == ("colour", 3)
    assert asked.findings == ()
    maps = gradscope.attribute(Heads().eval(), torch.rand(1, 3, 16, 16), "saliency", output_name=2)
    assert len(maps.diagnostics["scores"]) == 1


class Spoiled(nn.Module):
    """NaN for pictures that are dark, from one layer on."""

    def __init__(self) -> None:
        super().__init__()
        self.net = model("rectifiers")
        self.last = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        dark = x.mean((1, 2, 3), keepdim=True) < 0
        return self.net(self.last(x / (~dark)) if bool(dark.any()) else x)


def test_an_answer_that_is_not_finite_is_a_finding_and_the_rest_is_done(tmp_path: Path) -> None:
    for name, colour in (("dark.png", (9, 9, 9)), ("light.png", (250, 240, 200))):
        Image.new("RGB", (20, 20), colour).save(tmp_path / name)

    report = gradscope.explain(
        Spoiled().eval(), tmp_path, ["gradcam", "saliency", "occlusion"], preprocess=PREPROCESS
    )

    assert [Path(e.image).name for e in report.result.explanations] == ["light.png"] * 3
    finding = report.findings[0]
    assert (finding.name, Path(finding.input).name) == ("non-finite-output", "dark.png")
    assert "4 of 4 scores are not finite" in finding.message
    assert "the first layer whose output is not is last" in finding.message
    assert report.gate.exit_code == 1
    assert report.errors == ()


@pytest.mark.parametrize("name", sorted(methods()))
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_no_method_fails_on_an_answer_that_is_not_finite(
    photo: Path, name: str, value: float
) -> None:
    net = model("rectifiers")
    net.head.bias.data[2] = value

    report = gradscope.explain(net, photo, name, preprocess=PREPROCESS, chunk=2)

    assert [f.name for f in report.findings] == ["non-finite-output"]
    assert report.result.explanations == ()
    with pytest.raises(InputError, match="the first layer whose output is not is head"):
        gradscope.attribute(net, torch.rand(1, 3, 16, 16), "saliency")


def test_probabilities_instead_of_logits_are_told(photo: Path) -> None:
    net = nn.Sequential(model("rectifiers"), nn.Softmax(1))

    result = gradscope.explain(net, photo, "saliency", preprocess=PREPROCESS).result

    assert result.model.ends_in_softmax
    assert any("probabilities" in note for note in result.notes)


@pytest.mark.parametrize("name", sorted(methods()))
def test_every_method_runs_on_a_transformer_or_says_why_not(name: str) -> None:
    image = torch.randn(1, 3, 32, 32)
    few = {"rise": {"masks": 4}, "smoothgrad": {"samples": 2}, "integrated-gradients": {"steps": 2}}

    if name == "lrp":
        with pytest.raises(NotApplicableError, match="; use attention-lrp"):
            gradscope.attribute(model("vit"), image, name, target=1)
        return
    found = gradscope.attribute(model("vit"), image, name, target=1, **few.get(name, {}))

    assert torch.isfinite(found.values).all()
    assert found.upsampled.shape == (1, 32, 32)


# --- real photographs -----------------------------------------------------------------------------

needs = pytest.mark.skipif(
    not (PICTURES / "quokka.jpg").is_file() or not (FETCHED / "mobilenet_v2.pth").is_file(),
    reason="photographs or MobileNetV2 not found: run `make fixtures`",
)


@pytest.fixture(scope="module")
def net() -> nn.Module:
    made = mobilenet_v2()
    made.load_state_dict(torch.load(FETCHED / "mobilenet_v2.pth"))
    return made.eval()


@needs
@pytest.mark.fetched
def test_mobilenet_knows_its_photographs(net: nn.Module) -> None:
    paths = [PICTURES / name for name in ("chelsea.png", "coffee.png", "camera.png", "quokka.jpg")]

    result = gradscope.explain(net, paths, "gradcam", preprocess="imagenet").result

    best = [(i.predictions[0].label, round(i.predictions[0].probability, 2)) for i in result.images]
    assert best == [("Egyptian cat", 0.72), ("espresso", 0.99), ("tripod", 0.98), ("wombat", 0.62)]
    chelsea = {p.index: p.probability for p in result.images[0].predictions}
    for index, probability in ((285, 0.717), (282, 0.147), (281, 0.130), (287, 0.005)):
        assert chelsea[index] == pytest.approx(probability, abs=1e-3)
    assert {e.layer for e in result.explanations} == {"features.18"}


@needs
@pytest.mark.fetched
@pytest.mark.parametrize(
    ("name", "target", "box", "steps", "share"),
    [
        ("camera.png", 872, (180, 225, 512, 412), SQUASHED, 0.55),
        ("quokka.jpg", 106, (50, 148, 642, 550), SQUASHED, 0.60),
        # The crop leaves out a third of the picture, and the map finds back around it.
        ("quokka.jpg", 106, (50, 148, 642, 550), IMAGENET, 0.89),
    ],
)
def test_grad_cams_energy_lies_in_the_known_box(
    net: nn.Module,
    name: str,
    target: int,
    box: tuple[int, int, int, int],
    steps: Preprocessing,
    share: float,
) -> None:
    """Top, left, bottom and right in the picture's pixels."""
    prepared = steps(open_image(str(PICTURES / name)))
    found = gradscope.attribute(
        net, prepared.inputs[None], "gradcam", layer="features.18", target=target, relu=True
    )

    energy = prepared.geometry.to_picture(found.upsampled[0].double().numpy(), fill=0)
    top, left, bottom, right = box
    inside = energy[top:bottom, left:right].sum() / energy.sum()
    assert inside == pytest.approx(share, abs=0.01)
    assert inside > (bottom - top) * (right - left) / energy.size + 0.15


def test_a_picture_that_a_run_could_overwrite_is_refused_before_work(photo: Path) -> None:
    explained(photo, output=photo.parent, target=1)
    drawn = photo.parent / "photo.gradcam.1.heatmap.png"
    before = drawn.read_bytes()

    with pytest.raises(UsageError, match="an input that a picture of this run could overwrite"):
        explained(photo.parent, output=photo.parent, target=1)

    assert drawn.read_bytes() == before
    assert explained(photo.parent, output=photo.parent / "out", target=1).errors == ()


def test_a_model_of_more_channels_is_explained_with_as_many_means(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(5, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 4)).eval()
    bands = np.random.default_rng(0).integers(0, 255, (8, 8, 5), dtype=np.uint8)
    np.save(tmp_path / "a.npy", bands)
    how = "image_mean=0.1/0.2/0.3/0.4/0.5,image_std=0.2/0.2/0.2/0.2/0.3,size=8x8"

    result = gradscope.explain(
        net, tmp_path / "a.npy", "input-x-gradient", preprocess=how, target=2, output=tmp_path
    ).result

    mean, std = torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5]), torch.tensor([0.2, 0.2, 0.2, 0.2, 0.3])
    x = torch.from_numpy(bands).permute(2, 0, 1)[None] / 255
    x = (x - mean.view(-1, 1, 1)) / std.view(-1, 1, 1)
    wanted = gradscope.attribute(net, x, "input-x-gradient", target=2).values[0]
    with np.load(result.explanations[0].files.array) as arrays:
        torch.testing.assert_close(torch.from_numpy(arrays["attribution"]), wanted)
    with pytest.raises(UsageError, match=r"takes 5 channels.*with 5 means"):
        gradscope.explain(net, tmp_path / "a.npy", preprocess="size=8x8")


def test_frames_of_one_file_have_files_of_their_own(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (20, 20), (v, 90, 9)) for v in (10, 90, 200)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    path = str(tmp_path / "a.gif")

    report = gradscope.explain(
        model("rectifiers"), [path, f"{path}#2"], "saliency", target=1, preprocess=PREPROCESS,
        output=tmp_path / "out",
    )  # fmt: skip

    arrays = [Path(e.files.array).name for e in report.result.explanations]
    assert arrays == ["a.saliency.1.npz", "a-2.saliency.1.npz"]
    assert report.result.explanations[0].map != report.result.explanations[1].map
    assert any("the first of 3 frames is read" in note for note in report.result.notes)
