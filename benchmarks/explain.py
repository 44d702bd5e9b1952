"""What attribution costs beside captum, pytorch-grad-cam and RISE's authors: one 224 x 224 image.

    python benchmarks/explain.py [rounds] [row ...]

Prints the median ratio of processor times of runs that take turns (of wall times with --wall, on a
machine that does nothing else), and how far the maps are apart. A peer that is not installed is
left out and said so: pip install captum grad-cam (which wants torchvision and OpenCV). Peers
get their best batch size of those tried; ours chooses its own. The model was asked before, as in a
folder of pictures: its private copy is there, and each run sees that nothing has changed in it.

Two rows measure what one waits for, not equal work: integrated gradients that add up within 1 %,
and RISE with a standard error of a tenth of the map's range. The peer gets the fewest steps or
masks that suffice, as if it knew them; the authors' masks are counted by their estimator's variance
and a part of them is timed. The peer of visualize is the same ascent by the model itself at its
full size, as it was before pictures were made from the coarse to the fine.

A target is bounded by arithmetic: at what oneDNN reaches on these layers, resnet50's 8.2 GFLOP take
two thirds of a peer's time. RISE and ScoreCAM change the whole picture, so that no part of them can
be spared.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "fixtures"))

from architectures import resnet18
from turns import FETCHED, Case, Row, Run, best, clock, compared, random_case, real_case

from gradscope import explain
from gradscope.attribution.formulas.random_masks import family
from gradscope.attribution.formulas.rise import Shown, adjusted, papers
from gradscope.attribution.synthesis.ascent import synthesise
from gradscope.attribution.synthesis.views import Stage, smaller, stages
from gradscope.models.forms import as_model
from gradscope.models.model import Model
from gradscope.models.preprocessing import IMAGENET
from gradscope.models.probe import held
from gradscope.models.quick import quick

STEPS = 32
SQUARE = 28
MASKS = 128
#: Standard error over the range of a map; masks by which the authors' variance is measured.
ERROR = 0.1
PILOT = 512
#: Steps of a picture; those of the program are 256, in the same parts.
ASCENT = 20
warnings.simplefilter("ignore")


# --- the rows -------------------------------------------------------------------------------------


def gradcam() -> Iterator[Row]:
    from captum.attr import LayerGradCam

    case = random_case()
    cam = LayerGradCam(case.net, case.net.layer4)

    def theirs() -> Tensor:
        small = cam.attribute(case.x, target=case.target, relu_attributions=True)
        return interpolate(small, size=case.x.shape[2:], mode="bilinear", align_corners=False)[:, 0]

    # After sixteen pictures there is a copy; the long methods see as many in one run.
    ours = case.ours("gradcam", layer="layer4", relu=True)
    yield Row("gradcam", "captum", 0.8, ours, theirs, warm=16)
    yield Row("gradcam", "pytorch-grad-cam", 0.8, ours, _grad_cam("GradCAM", case), warm=1)


def integrated_gradients() -> Iterator[Row]:
    from captum.attr import IntegratedGradients

    case = random_case()
    path = IntegratedGradients(case.net)
    theirs = best(
        lambda size: lambda: path.attribute(
            case.x, target=case.target, n_steps=STEPS, method="riemann_middle",
            internal_batch_size=size,
        )
    )  # fmt: skip
    ours = case.ours("integrated-gradients", steps=STEPS)
    yield Row(f"integrated-gradients, {STEPS} points", "captum", 0.75, ours, theirs)


def completeness() -> Iterator[Row]:
    """The fewest of the doubled steps that add up within a hundredth, as if they were known."""
    from captum.attr import IntegratedGradients

    case = real_case()
    path = IntegratedGradients(case.net)
    scores = (case.net(x)[0, case.target] for x in (case.x, torch.zeros_like(case.x)))
    change = float(next(scores) - next(scores))

    def run(steps: int) -> Tensor:
        return path.attribute(
            case.x, target=case.target, n_steps=steps, method="riemann_middle",
            internal_batch_size=8,
        )  # fmt: skip

    def enough(steps: int) -> bool:
        return abs(float(run(steps).sum()) - change) <= 0.01 * abs(change)

    steps = next((n for n in (8, 16, 32, 64, 128, 256) if enough(n)), 512)
    ours = case.ours("integrated-gradients", tolerance=0.01)
    yield Row(f"adding up to 1 % ({steps} points)", "captum", 0.5, ours, partial(run, steps))


def occlusion() -> Iterator[Row]:
    from captum.attr import Occlusion

    case = random_case()
    window = Occlusion(case.net)
    square = (3, SQUARE, SQUARE)
    theirs = best(
        lambda size: (
            lambda: window.attribute(
                case.x, square, square, target=case.target, perturbations_per_eval=size
            )[:, 0]
        )
    )
    ours = case.ours("occlusion", window=SQUARE, stride=SQUARE)
    yield Row("occlusion, 64 squares", "captum", 0.5, ours, theirs)


def rise() -> Iterator[Row]:
    case = random_case()
    ours = case.ours("rise", masks=MASKS, coverage=False)
    yield Row(f"rise, {MASKS} masks", "RISE's authors", 0.5, ours, _authors(case))


def rise_to_an_error() -> Iterator[Row]:
    for picture in ("chelsea", "coffee"):
        case = real_case(picture)
        needed = _needed(case)
        name = f"rise to {ERROR:g}, {picture} ({needed:,} masks)"
        ours, theirs = case.ours("rise", error=ERROR), _authors(case)
        yield Row(name, "RISE's authors", 0.5, ours, theirs, needed / MASKS, warm=0)


def _authors(case: Case) -> Run:
    """RISE as its authors publish it (explanations.py of eclique/RISE), on masks of ours."""
    side = case.x.shape[2]
    masks = family(7, 0.5, case.x).drawn(range(MASKS)).pixels()[:, None]

    def run(size: int) -> Tensor:
        with torch.no_grad():
            found = [case.net(part * case.x).softmax(1) for part in masks.split(size)]
            shares = torch.cat(found)[:, case.target]
            return (shares @ masks.flatten(1)).view(1, side, side) / MASKS / 0.5

    return best(lambda size: partial(run, size))


def _needed(case: Case) -> int:
    """Masks after which the authors' estimator has the standard error."""
    masks = family(7, 0.5, case.x).drawn(range(PILOT))
    with torch.no_grad():
        shares = torch.cat(
            [
                case.net(masks[part].pixels()[:, None] * case.x).softmax(1)[:, case.target]
                for part in torch.arange(PILOT).split(8)
            ]
        )
    seen = Shown(masks, torch.zeros(1), shares[None])
    # The range is that of the better map: noise widens it.
    better = adjusted(seen).maps
    error = papers(seen).variance.mean().sqrt() / (better.max() - better.min())
    return round(PILOT * (float(error) / ERROR) ** 2)


def scorecam() -> Iterator[Row]:
    yield _slow_cam("scorecam", "ScoreCAM", 0.7)


def ablationcam() -> Iterator[Row]:
    yield _slow_cam("ablationcam", "AblationCAM", 0.2)


def _slow_cam(method: str, kind: str, limit: float) -> Row:
    case = random_case(resnet18)
    ours = case.ours(method, layer="layer4", relu=True)
    theirs = _grad_cam(kind, case)
    name = f"{method}, resnet18"
    return Row(name, "pytorch-grad-cam", limit, ours, theirs, warm=0, once=True)


def _grad_cam(kind: str, case: Case) -> Run:
    import pytorch_grad_cam as theirs
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    targets = [ClassifierOutputTarget(case.target)]

    def run() -> Tensor:
        with getattr(theirs, kind)(model=case.net, target_layers=[case.net.layer4]) as cam:
            cam.batch_size = 16
            return torch.from_numpy(cam(input_tensor=case.x, targets=targets))

    return run


def visualize() -> Iterator[Row]:
    case = random_case()
    model, area, side = as_model(case.net), (224, 224), (512, 512)

    def run(model: Model, seen: tuple[Stage, ...]) -> None:
        def objective(_: int, pixels: Tensor) -> tuple[Tensor, float]:
            answer = model.forward(IMAGENET.normalise(pixels), {})
            return answer[:, case.target], 0.0

        with held(case.net):
            synthesise(objective, (3, *side), seen, steps=ASCENT)

    ours = partial(run, quick(model, worth=1), stages(side, area, smaller(area)))
    theirs = partial(run, model, stages(side, area, ()))
    yield Row(f"visualize, {ASCENT} steps", "full size", 0.5, ours, theirs)


ROWS = (
    gradcam, integrated_gradients, completeness, occlusion, rise, rise_to_an_error, scorecam,
    ablationcam, visualize,
)  # fmt: skip


#: Evaluated runs over plain ones, files and all.
EVALUATED = (
    ("gradcam",),
    ("saliency",),
    ("integrated-gradients",),
    ("gradcam", "layercam", "integrated-gradients"),
)
EVALUATED_LIMIT = 8.0


def evaluated() -> None:
    """What --evaluate costs, for MobileNetV2 and a photograph."""
    try:
        net = real_case().net
    except OSError as error:
        print(f"--evaluate is left out: {error}; make fixtures")
        return

    def spent(methods: tuple[str, ...], **more: Any) -> float:
        began = clock()
        explain(net, str(FETCHED / "pictures" / "chelsea.png"), methods, preprocess="imagenet",
                output=folder, **more)  # fmt: skip
        return clock() - began

    with tempfile.TemporaryDirectory() as folder:
        spent(("gradcam",))
        for methods in EVALUATED:
            plain = statistics.median(spent(methods) for _ in range(3))
            found = spent(methods, evaluated=True) / plain
            verdict = "met" if found <= EVALUATED_LIMIT else "MISSED"
            print(
                f"--evaluate {', '.join(methods):<46} {found:5.2f} x plain ({plain:.2f} s)  target "
                f"<= {EVALUATED_LIMIT:g}: {verdict}"
            )


def main() -> None:
    rounds = next((int(word) for word in sys.argv[1:] if word.isdigit()), 7)
    asked = [word for word in sys.argv[1:] if not word.isdigit() and not word.startswith("-")]
    print(f"{torch.get_num_threads()} threads, {rounds} rounds, 224 x 224; resnet50 at random, and")
    print("MobileNetV2 as published where a row depends on what was learnt")
    for rows in ROWS:
        if not asked or rows.__name__ in asked:
            compared(rows, rounds)
    if not asked or "evaluated" in asked:
        evaluated()


if __name__ == "__main__":
    main()
