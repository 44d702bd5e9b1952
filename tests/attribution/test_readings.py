"""Targets beyond a class of the whole picture: each against the same scalar, wrapped by hand."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import captum.attr
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional

import gradscope
from gradscope.attribution.result import Explanation
from gradscope.attribution.targets.aim import parse_aim
from gradscope.errors import NotApplicableError, UsageError

PREPROCESS = "image_mean=0.5/0.5/0.5,image_std=0.25/0.25/0.25,size=16x24"
HEIGHT, WIDTH = 32, 48


class Trunk(nn.Module):
    """Maps [N, 8, 8, 12] of an image [N, 3, 16, 24]."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.conv = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, stride=2, padding=1)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).relu()


class Segmenter(nn.Module):
    def __init__(self, classes: int = 4, last: nn.Module | None = None) -> None:
        super().__init__()
        self.trunk = Trunk()
        self.head = nn.Conv2d(8, classes, 1)
        self.aux = nn.Conv2d(8, classes, 1)
        self.last = nn.Identity() if last is None else last

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        maps = self.trunk(x)
        size = (x.shape[2], x.shape[3])
        out = functional.interpolate(self.last(self.head(maps)), size=size, mode="bilinear")
        return {"aux": self.aux(maps), "out": out}


class Encoder(nn.Module):
    """An image tower: an embedding of 192 numbers, without a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.projection = Trunk(), nn.Linear(8 * 8 * 12, 192, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.projection(self.trunk(x).flatten(1))


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    pixels = np.random.default_rng(0).integers(0, 255, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def prepared(path: Path) -> Tensor:
    pixels = Image.open(path).resize((24, 16), Image.Resampling.BILINEAR)
    raw = torch.from_numpy(np.asarray(pixels, np.float32).copy()).permute(2, 0, 1)[None]
    return ((raw.double() / 255).float() - 0.5) / 0.25


class Wrapped(nn.Module):
    def __init__(self, net: nn.Module, scalar: Callable[[Any], Tensor]) -> None:
        super().__init__()
        self.net, self.scalar = net, scalar

    def forward(self, x: Tensor) -> Tensor:
        return self.scalar(self.net(x))


def explained(net: nn.Module, photo: Path, target: Any, **more: Any) -> list[Explanation]:
    out = photo.parent / "out"
    report = gradscope.explain(
        net.eval(), photo, ["input-x-gradient", "gradcam"], target=target, preprocess=PREPROCESS,
        layer="trunk.conv.2", output=out, **more,
    )  # fmt: skip
    assert report.errors == ()
    return list(report.result.explanations)


def agrees_with_captum(
    net: nn.Module, photo: Path, scalar: Callable[[Any], Tensor], found: list[Explanation]
) -> None:
    """Both maps are those that captum gives for the wrapped model, and the score is its value."""
    x, wrapped = prepared(photo), Wrapped(net.eval(), scalar)
    gradient, cam = found
    with np.load(gradient.files.array) as arrays:
        values = torch.from_numpy(arrays["attribution"])[None]
    leaf = x.clone().requires_grad_()
    wanted = captum.attr.InputXGradient(wrapped).attribute(leaf)
    torch.testing.assert_close(values, wanted.detach(), rtol=1e-4, atol=1e-6)
    with np.load(cam.files.array) as arrays:
        low = torch.from_numpy(arrays["map"])[None, None]
    maps = captum.attr.LayerGradCam(wrapped, net.trunk.conv[2]).attribute(x.requires_grad_())
    large = functional.interpolate(maps, size=(16, 24), mode="bilinear").detach()
    torch.testing.assert_close(low, large, rtol=1e-4, atol=1e-6)
    assert gradient.target.score == pytest.approx(wrapped(x).detach().item(), rel=1e-4)


# --- segmentation ---------------------------------------------------------------------------------


def test_a_pixel_is_the_pictures_and_its_class_the_likeliest_there(photo: Path) -> None:
    net = Segmenter()
    found = explained(net, photo, "pixel:21,40")

    scores = net(prepared(photo))["out"][0, :, 10, 20].detach()
    index = int(scores.argmax())
    target = found[0].target
    assert (target.index, target.aim) == (index, "pixel:21,40")
    assert target.named == f"{index} (pixel:21,40)"
    assert target.probability == pytest.approx(float(scores.softmax(0)[index]), rel=1e-5)
    agrees_with_captum(net, photo, lambda out: out["out"][:, index, 10, 20], found)
    assert Path(found[0].files.array).name == f"photo.input-x-gradient.pixel-21-40.{index}.npz"


def test_another_class_can_be_asked_for_at_a_pixel_and_contrasted(photo: Path) -> None:
    net = Segmenter()
    found = explained(net, photo, "pixel:0,47:cat", labels={0: "sky", 1: "sea", 2: "dog", 3: "cat"})
    agrees_with_captum(net, photo, lambda out: out["out"][:, 3, 0, 23], found)
    against = explained(net, photo, "pixel:31,0:1", versus=2)
    agrees_with_captum(
        net, photo, lambda out: out["out"][:, 1, 15, 0] - out["out"][:, 2, 15, 0], against
    )


def test_a_mask_is_the_area_that_the_model_gives_to_a_class(photo: Path) -> None:
    net = Segmenter()
    area = net(prepared(photo))["out"].argmax(1)
    index = int(area.flatten().bincount().argmax())

    found = explained(net, photo, f"mask:{index}")

    mask = (area == index).float()
    agrees_with_captum(net, photo, lambda out: (out["out"][:, index] * mask).sum((1, 2)), found)
    assert found[0].target.probability is None
    assert found[0].target.named == f"{index} (mask:{index})"


@pytest.mark.parametrize("last", [None, nn.Sigmoid()])
def test_a_single_map_of_scores_has_a_background(photo: Path, last: nn.Module | None) -> None:
    net = Segmenter(1, last)
    maps = net(prepared(photo))["out"][:, 0].detach()
    front = (maps > (0 if last is None else 0.5)).float()
    at = front[0].nonzero()[0].tolist()

    found = explained(net, photo, f"pixel:{2 * at[0]},{2 * at[1]}")

    assert found[0].target.index == 1
    agrees_with_captum(net, photo, lambda out: out["out"][:, 0, at[0], at[1]], found)
    own = maps[0, at[0], at[1]]
    wanted = float(own.sigmoid() if last is None else own)
    assert found[0].target.probability == pytest.approx(wanted, rel=1e-4)
    masked = explained(net, photo, "mask:1")
    agrees_with_captum(net, photo, lambda out: (out["out"][:, 0] * front).sum((1, 2)), masked)


class Depth(nn.Module):
    """One map [N, h, w] of a value, at half the input's size; and what it was read from."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.head = Trunk(), nn.Conv2d(8, 1, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        maps = self.trunk(x)
        return {"predicted_depth": self.head(maps)[:, 0], "hidden_states": maps.flatten(2)}


def test_a_pixel_of_a_map_of_values_is_that_value(photo: Path) -> None:
    found = explained(Depth(), photo, "pixel:20,30")

    agrees_with_captum(Depth(), photo, lambda out: out["predicted_depth"][:, 5, 7], found)
    assert (found[0].target.probability, found[0].target.aim) == (None, "pixel:20,30")


class Masks(nn.Module):
    """MaskFormer's output: for each of five queries its classes, "nothing" last, and a mask."""

    def __init__(self, *, nothing: bool = True) -> None:
        super().__init__()
        self.trunk, self.nothing = Trunk(), nothing
        self.masks, self.kinds = nn.Conv2d(8, 5, 1), nn.Linear(8, 5 * 4)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        maps = self.trunk(x)
        kinds = self.kinds(maps.mean((2, 3))).view(-1, 5, 4)
        kinds = kinds + (torch.tensor([0, 0, 0, 3.0]) if self.nothing else 0)
        return {
            "class_queries_logits": kinds, "masks_queries_logits": 9 * self.masks(maps),
            "encoder_last_hidden_state": maps,
        }  # fmt: skip


@pytest.mark.parametrize("nothing", [True, False])
def test_masks_of_queries_are_summed_by_their_classes(photo: Path, nothing: bool) -> None:
    """A query's number is no class."""
    net = Masks(nothing=nothing).eval()

    def maps(out: dict[str, Tensor]) -> Tensor:
        kinds = out["class_queries_logits"]
        likely = kinds.softmax(2)[..., :3] if nothing else kinds.sigmoid()
        drawn = out["masks_queries_logits"].sigmoid()
        return (likely[:, :, :, None, None] * drawn[:, :, None]).sum(1)

    found = explained(net, photo, "pixel:20,30:2")

    agrees_with_captum(net, photo, lambda out: maps(out)[:, 2, 5, 7], found)
    most = int(maps(net(prepared(photo)))[0, :, 5, 7].argmax())
    assert explained(net, photo, "pixel:20,30")[0].target.index == most


# --- detection ------------------------------------------------------------------------------------


class Anchors(nn.Module):
    """YOLO's raw predictions: [N, 4 + K, A], or [N, A, 5 + K] with a score for "an object"."""

    def __init__(self, *, rows: bool) -> None:
        super().__init__()
        self.trunk, self.rows = Trunk(), rows
        self.head = nn.Conv2d(8, (5 if rows else 4) + 3, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        maps = self.head(self.trunk(x))
        down, across = torch.meshgrid(torch.arange(8.0), torch.arange(12.0), indexing="ij")
        middles = 2 * torch.stack([across, down])[None] + maps[:, :2].sigmoid()
        sizes = 1.5 + 0.1 * maps[:, 2:4].sigmoid()
        found = torch.cat([middles, sizes, maps[:, 4:].sigmoid()], 1).flatten(2)
        return (found.transpose(1, 2) if self.rows else found), [maps]


@pytest.mark.parametrize("rows", [False, True])
def test_a_box_of_raw_predictions_is_the_score_at_its_anchor(photo: Path, rows: bool) -> None:
    net = Anchors(rows=rows).eval()

    def scores(out: Any) -> Tensor:
        values = out[0] if rows else out[0].transpose(1, 2)
        return values[..., 5:] * values[..., 4:5] if rows else values[..., 4:]

    def at(anchor: int, index: int) -> Callable[[Any], Tensor]:
        return lambda out: scores(out)[:, anchor, index]

    first = scores(net(prepared(photo)))[0].detach()
    # These boxes hardly overlap.
    order = first.amax(1).argsort(descending=True)
    for number in (0, 3):
        anchor = int(order[number])
        index = int(first[anchor].argmax())

        found = explained(net, photo, f"box:{number}")

        assert (found[0].target.index, found[0].target.aim) == (index, f"box:{number}")
        agrees_with_captum(net, photo, at(anchor, index), found)
        assert found[0].target.probability == found[0].target.score


class Detector(nn.Module):
    """A list with a dictionary for each image, as torchvision's; boxes change with the image."""

    def __init__(self, *, detached: bool = False, empty: bool = False) -> None:
        super().__init__()
        self.trunk, self.detached, self.empty = Trunk(), detached, empty
        self.head = nn.Conv2d(8, 3, 1)

    def forward(self, x: Tensor) -> list[dict[str, Tensor]]:
        maps = self.head(self.trunk(x)).sigmoid()
        return [self.one(m.detach() if self.detached else m) for m in maps]

    def one(self, maps: Tensor) -> dict[str, Tensor]:
        scores, labels = maps.flatten(1).max(0)
        order = scores.argsort(descending=True)[: 0 if self.empty else 20]
        down, across = order // 12, order % 12
        corner = torch.stack([2 * across, 2 * down], 1).float()
        boxes = torch.cat([corner, corner + 2 + scores[order, None]], 1)
        return {"boxes": boxes, "labels": labels[order] + 1, "scores": scores[order]}


def test_a_box_of_a_list_is_the_score_of_that_detection(photo: Path) -> None:
    net = Detector()
    (first,) = net.eval()(prepared(photo))

    found = explained(net, photo, "box:2", labels={0: "none", 1: "cat", 2: "dog", 3: "bird"})

    index = int(first["labels"][2])
    assert (found[0].target.index, found[0].target.label) == (
        index,
        [0, "cat", "dog", "bird"][index],
    )
    agrees_with_captum(net, photo, lambda out: out[0]["scores"][2][None], found)


def test_a_box_is_followed_by_its_overlap(photo: Path) -> None:
    net = Detector().eval()
    x = prepared(photo)
    (first,) = net(x)
    # Surer boxes overlap it a little.
    box, label = first["boxes"][19].detach(), int(first["labels"][19])

    def followed(out: list[dict[str, Tensor]]) -> Tensor:
        found = []
        for one in out:
            best = torch.zeros(())
            for b, s, c in zip(one["boxes"], one["scores"], one["labels"], strict=True):
                low, high = torch.maximum(b[:2], box[:2]), torch.minimum(b[2:], box[2:])
                common = (high - low).clamp(min=0).prod()
                union = (b[2:] - b[:2]).prod() + (box[2:] - box[:2]).prod() - common
                if int(c) == label:
                    best = torch.maximum(best, s * common / union)
            found.append(best)
        return torch.stack(found)

    report = gradscope.explain(
        net, photo, "occlusion", target="box:19", preprocess=PREPROCESS, window=4, stride=4
    )
    wanted = gradscope.attribute(net, x, "occlusion", target=followed, window=4, stride=4)
    assert report.result.explanations[0].map.max == pytest.approx(
        float(wanted.values.max()), rel=1e-4
    )
    assert report.result.explanations[0].map.sum == pytest.approx(
        float(wanted.values.sum()), rel=1e-4
    )


class Queries(nn.Module):
    """Logits with a last class of "nothing", and a box, for each query (DETR)."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.heads = Trunk(), nn.Linear(8, 4 + 4)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        found = self.heads(self.trunk(x).flatten(2).transpose(1, 2))
        return {"pred_logits": 5 * found[..., :4], "pred_boxes": found[..., 4:].sigmoid()}


def test_a_box_of_a_query_is_its_logit(photo: Path) -> None:
    net = Queries().eval()
    first = net(prepared(photo))["pred_logits"][0].detach().softmax(1)
    query = int(first[:, :-1].amax(1).argsort(descending=True)[1])

    found = explained(net, photo, "box:1:2")

    agrees_with_captum(net, photo, lambda out: out["pred_logits"][:, query, 2], found)
    assert found[0].target.probability == pytest.approx(float(first[query, 2]), rel=1e-4)


class Focal(Queries):
    """Queries whose classes are independent: none of them is "nothing", or says so (RT-DETR)."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        out = super().forward(x)
        return out | {"pred_logits": out["pred_logits"] - torch.tensor([0, 0, 0, 99.0])}


@pytest.mark.parametrize("named", [True, False])
def test_queries_without_a_class_of_nothing_have_independent_classes(
    photo: Path, named: bool
) -> None:
    net = (Queries if named else Focal)().eval()
    logits = net(prepared(photo))["pred_logits"][0].detach()
    query = int(logits.amax(1).argmax())
    labels = dict(enumerate("abcd")) if named else None

    (found, _) = explained(net, photo, "box:0", labels=labels)

    assert found.target.index == int(logits[query].argmax())
    assert found.target.probability == pytest.approx(float(logits[query].max().sigmoid()), rel=1e-4)


def test_the_class_of_nothing_is_not_explained(photo: Path) -> None:
    net = Queries().eval()
    net.heads.bias.data[3] = 9
    logits = net(prepared(photo))["pred_logits"][0].detach()
    query = int(logits.softmax(1)[:, :3].amax(1).argmax())

    (found, _) = explained(net, photo, "box:0")

    assert (int(logits[query].argmax()), found.target.index) == (3, int(logits[query, :3].argmax()))


class Tokens(Trunk):
    """Features of every patch, as a backbone without a head returns them."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        return {"last_hidden_state": super().forward(x).flatten(2).transpose(1, 2)}


class Signed(Trunk):
    """The same without a name; no box has a negative width."""

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).flatten(2).transpose(1, 2)


class Final(nn.Module):
    """Corners, score and class of each detection in one tensor [N, A, 6]."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.detector = Trunk(), Detector()

    def forward(self, x: Tensor) -> Tensor:
        self.detector.trunk = self.trunk
        rows = [torch.cat([d["boxes"], d["scores"][:, None], d["labels"][:, None]], 1)
                for d in self.detector(x)]  # fmt: skip
        return torch.stack(rows)


def test_a_box_of_final_rows_is_the_score_of_that_detection(photo: Path) -> None:
    net = Final().eval()

    found = explained(net, photo, "box:1")

    assert found[0].target.index == int(net(prepared(photo))[0, 1, 5])
    agrees_with_captum(net, photo, lambda out: out[:, 1, 4], found)


# --- embeddings -----------------------------------------------------------------------------------


def cosine(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1))


def test_the_likeness_to_another_picture_is_a_cosine(photo: Path) -> None:
    net, other = Encoder().eval(), photo.parent / "other.png"
    pixels = np.random.default_rng(1).integers(0, 255, (20, 20, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(other)
    wanted = net(prepared(other)).detach()

    found = explained(net, photo, f"similar:{other}")

    agrees_with_captum(net, photo, lambda out: cosine(out, wanted), found)
    target = found[0].target
    assert (target.named, target.probability) == ("similar:other.png", None)
    same = explained(net, photo, f"similar:{photo}")[0].target.score
    assert same == pytest.approx(1, abs=1e-5)


def test_the_likeness_of_a_classifier_is_that_of_its_features(photo: Path) -> None:
    class Both(Encoder):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(192, 5)

        def forward(self, x: Tensor) -> Any:
            features = super().forward(x)
            return self.head(features), features

    net = Both().eval()
    wanted = torch.ones(1, 192)
    np.save(photo.parent / "t.npy", wanted.numpy())

    found = explained(net, photo, f"text:{photo.parent / 't.npy'}")

    agrees_with_captum(net, photo, lambda out: cosine(out[1], wanted), found)


def test_a_channel_is_one_number(photo: Path) -> None:
    net = Encoder()
    agrees_with_captum(net, photo, lambda out: out[:, 7], explained(net, photo, "channel:7"))


@pytest.mark.parametrize(
    ("more", "head"),
    [
        ({}, "value"),
        ({"logit_scale": math.log(100)}, "logits"),
        ({"logit_scale": 100.0}, "logits"),
        ({"logit_scale": math.log(100), "logit_bias": -5.0}, "independent"),
    ],
)
@pytest.mark.parametrize("suffix", ["npz", "safetensors"])
def test_texts_are_compared_as_their_model_does(
    photo: Path, suffix: str, more: dict[str, float], head: str
) -> None:
    net = Encoder().eval()
    texts = torch.randn((3, 192), generator=torch.Generator().manual_seed(2))
    arrays = dict(zip(("a cat", "a dog", "the sea"), texts.numpy(), strict=True))
    scalars = {name: np.float32(value).reshape(1) for name, value in more.items()}
    path = photo.parent / f"texts.{suffix}"
    if suffix == "npz":
        np.savez(path, **arrays, **scalars)
    else:
        from safetensors.numpy import save_file

        save_file(arrays | scalars, path)
    scale, bias = (100.0 if more else 1.0), more.get("logit_bias", 0.0)

    found = explained(net, photo, f"text:{path}:a dog")

    agrees_with_captum(net, photo, lambda out: scale * cosine(out, texts[1:2]) + bias, found)
    target = found[0].target
    assert (target.index if suffix == "npz" else 1, target.label) == (1, "a dog")
    cosines = torch.stack([cosine(net(prepared(photo)), t[None]) for t in texts], 1)[0].detach()
    wanted = {
        "value": None,
        "logits": (100 * cosines).softmax(0)[1],
        "independent": (100 * cosines + bias)[1].sigmoid(),
    }[head]
    if wanted is None:
        assert target.probability is None
    else:
        assert target.probability == pytest.approx(float(wanted), rel=1e-3)


@pytest.mark.parametrize(
    ("array", "said"),
    [
        (np.ones((2, 5), np.float32), r"texts of 5 numbers.*embedding has 192"),
        (np.ones((2, 3, 5), np.float32), "one \\[texts, D\\] array"),
        (np.ones((2, 192), np.int64), "no finite numbers"),
        (np.full((2, 192), np.nan, np.float32), "no finite numbers"),
        (None, "file not found"),
    ],
)
def test_a_file_of_texts_that_does_not_fit_is_told(photo: Path, array: Any, said: str) -> None:
    path = photo.parent / "t.npy"
    if array is not None:
        np.save(path, array)

    try:
        report = gradscope.explain(
            Encoder().eval(), photo, target=f"text:{path}", preprocess=PREPROCESS
        )
        assert report.gate.exit_code == 3
        message = report.errors[0].message
    except UsageError as error:
        message = str(error)
    assert __import__("re").search(said, message)


# --- functions ------------------------------------------------------------------------------------


def test_a_function_of_the_output_is_a_target(photo: Path) -> None:
    def sharpest(out: dict[str, Tensor]) -> Tensor:
        return out["aux"].square().mean((1, 2, 3))

    net = Segmenter().eval()
    found = explained(net, photo, sharpest)

    agrees_with_captum(net, photo, sharpest, found)
    assert found[0].target.named == "sharpest"
    x = torch.cat([prepared(photo), -prepared(photo)])
    maps = gradscope.attribute(net, x, "saliency", target=sharpest)
    leaf = x.clone().requires_grad_()
    wanted = torch.autograd.grad(sharpest(net(leaf)).sum(), leaf)[0]
    torch.testing.assert_close(maps.values, wanted)
    assert maps.diagnostics["scores"] == pytest.approx(sharpest(net(x)).detach().tolist())


@pytest.mark.parametrize(
    "wrong", [lambda out: out["out"], lambda _out: 3.0, lambda out: out["out"].sum()]
)
def test_a_function_has_to_return_a_number_for_each_image(wrong: Any) -> None:
    with pytest.raises(UsageError, match="not one number for each image"):
        gradscope.attribute(Segmenter().eval(), torch.rand(2, 3, 16, 24), "saliency", target=wrong)


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("net", "target", "said"),
    [
        (Segmenter, "top1", r"--target mask:CLASS or pixel:Y,X explains some of them"),
        (Segmenter, "pixel:32,0", "the picture is 32 high and 48 wide"),
        (Segmenter, "pixel:x", "it is written pixel:Y,X"),
        (Segmenter, "pixel:1,1:9", "class indices are 0 to 3"),
        (Segmenter, "box:0", "and no boxes"),
        (Segmenter, "mask:top2", "name the class of the mask"),
        (Segmenter, "similar:photo.png", r"and no embedding \[N, D\]"),
        (Detector, "top1", "--target box:0 explains the surest"),
        (Detector, "box:20", "20 detections in this picture, box:0 to box:19"),
        (Detector, "box:one", "it is written box:N"),
        (lambda: Detector(empty=True), "box:0", "0 detections in this picture"),
        (lambda: Anchors(rows=False), "top1", "--target box:0 explains the surest"),
        (Queries, "top1", "--target box:0 explains the surest"),
        (Queries, "pixel:0,0", "no scores at every position"),
        (Tokens, "top1", "these are features, not scores"),
        (Tokens, "box:0", "and no boxes"),
        (Tokens, "pixel:0,0", "no scores at every position"),
        (Signed, "box:0", "and no boxes"),
        (Depth, "top1", "if a value at every pixel, pixel:Y,X one of them"),
        (Depth, "box:0", "and no boxes"),
        (Masks, "top1", "--target mask:CLASS or pixel:Y,X"),
        (Masks, "box:0", "and no boxes"),
        (Encoder, "top1", "--target similar:IMAGE"),
        (Encoder, "pixel:0,0", "no scores at every position"),
        (Encoder, "channel:192", "class indices are 0 to 191"),
        (Encoder, "channel:-1", "it is written channel:K"),
    ],
)
def test_a_target_that_the_model_does_not_have_is_refused(
    photo: Path, net: Callable[[], nn.Module], target: str, said: str
) -> None:
    with pytest.raises(UsageError, match=said):
        gradscope.explain(net().eval(), photo, "saliency", target=target, preprocess=PREPROCESS)


def test_a_pixel_that_is_cropped_off_is_refused(photo: Path) -> None:
    with pytest.raises(UsageError, match="does not see that pixel"):
        gradscope.explain(
            Segmenter().eval(), photo, "saliency", target="pixel:5,0",
            preprocess=PREPROCESS.replace("size=16x24", "size=16,crop_size=16x16"),
        )  # fmt: skip


def test_a_class_without_a_mask_is_refused_with_those_that_have_one(photo: Path) -> None:
    net = Segmenter().eval()
    net.head.bias.data[2] = -1e3

    with pytest.raises(UsageError, match=r"gives no pixel to this class, but to \d"):
        gradscope.explain(net, photo, "saliency", target="mask:2", preprocess=PREPROCESS)


def test_detections_without_a_graph_are_refused_with_what_works(photo: Path) -> None:
    with pytest.raises(NotApplicableError, match="detached from the image"):
        gradscope.explain(
            Detector(detached=True).eval(), photo, "saliency", target="box:0", preprocess=PREPROCESS
        )
    report = gradscope.explain(
        Detector(detached=True).eval(), photo, "occlusion", target="box:0", preprocess=PREPROCESS
    )
    assert report.result.explanations[0].map.max > 0


def test_another_picture_that_is_missing_is_an_error_of_that_file(photo: Path) -> None:
    report = gradscope.explain(
        Encoder().eval(), photo, target="similar:nothing.png", preprocess=PREPROCESS
    )

    assert report.errors[0].input == "nothing.png"
    assert report.gate.exit_code == 3


def test_a_class_is_no_aim() -> None:
    assert parse_aim("281") is None
    assert parse_aim("top1") is None
    assert parse_aim("tabby, tabby cat") is None
    assert parse_aim("dogs: all") is None


def test_every_evaluation_works_for_a_pixel(photo: Path) -> None:
    report = gradscope.explain(
        Segmenter().eval(), photo, ["gradcam", "rise"], target="pixel:9,9", masks=8,
        preprocess=PREPROCESS, evaluated=True,
    )  # fmt: skip
    assert report.result.explanations[0].diagnostics.insertion_auc is not None


def test_a_layer_whose_last_call_makes_another_output_gives_a_map_of_zeros(photo: Path) -> None:
    class Twice(Segmenter):
        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"out": self.head(self.trunk(x)), "aux": self.aux(self.trunk(x))}

    report = gradscope.explain(
        Twice().eval(), photo, "gradcam", target="pixel:9,9", layer="trunk.conv.2",
        preprocess=PREPROCESS,
    )  # fmt: skip

    assert [f.name for f in report.findings] == ["degenerate-map"]
