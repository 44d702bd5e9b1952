"""What attribution costs beside captum and pytorch-grad-cam: resnet50, one image of 224 x 224.

    python benchmarks/explain.py [rounds]

Prints the median ratio of processor times of runs that take turns (of wall times with --wall, on a
machine that does nothing else), and how far the maps are apart. A peer that is not installed is
left out and said so: pip install captum grad-cam (which wants torchvision and OpenCV). Peers
get their best batch size of those tried; ours chooses its own. The model was asked before, as in a
folder of pictures: its private copy is there, and each run sees that nothing has changed in it.

A target is bounded by arithmetic: at what oneDNN reaches on these layers, resnet50's 8.2 GFLOP take
two thirds of a peer's time. RISE changes the whole picture, so that no part of them can be spared.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "fixtures"))

from architectures import mobilenet_v2, resnet50

from gradscope import attribute, explain
from gradscope.attribution.formulas.perturbation import _mask
from gradscope.models.forms import as_model
from gradscope.models.images import open_image
from gradscope.models.preprocessing import IMAGENET

FETCHED = Path(__file__).resolve().parents[1] / "fixtures" / "fetched"
STEPS = 32
SQUARE = 28
MASKS = 128
CHUNKS = (1, 2, 4, 8, 16, 32)
warnings.simplefilter("ignore")

Run = Callable[[], Any]


clock = time.perf_counter if "--wall" in sys.argv else time.process_time


def seconds(run: Run) -> tuple[float, Any]:
    began = clock()
    found = run()
    return clock() - began, found


def timed(ours: Run, theirs: Run, rounds: int, warm: int) -> tuple[float, float, Any, Any]:
    """The median of ours over theirs, pair by pair, that of ours in seconds, and what both gave."""
    for _ in range(warm):
        ours()
    if rounds > 1:
        theirs()
    pairs = []
    for _ in range(rounds):
        (a, mine), (b, other) = seconds(ours), seconds(theirs)
        pairs.append((a, b))
    return (
        statistics.median(a / b for a, b in pairs),
        statistics.median(a for a, _ in pairs),
        mine,
        other,
    )


def apart(ours: Tensor, theirs: Tensor) -> float:
    """The greatest difference of two maps, each from its least value to its greatest."""
    a, b = (values.detach().double().clamp(min=0) for values in (ours, theirs))
    a, b = ((v - v.min()) / (v.max() - v.min()) for v in (a, b))
    return float((a - b).abs().max())


def best(make: Callable[[int], Run]) -> Run:
    return min((make(size) for size in CHUNKS), key=lambda run: seconds(run)[0])


# --- the peers ------------------------------------------------------------------------------------


def captums(net: nn.Module, x: Tensor, target: int) -> dict[str, Run]:
    from captum.attr import IntegratedGradients, LayerGradCam, Occlusion

    cam, path, window = LayerGradCam(net, net.layer4), IntegratedGradients(net), Occlusion(net)

    def gradcam() -> Tensor:
        small = cam.attribute(x, target=target, relu_attributions=True)
        return interpolate(small, size=x.shape[2:], mode="bilinear", align_corners=False)[:, 0]

    def integrated(size: int) -> Run:
        return lambda: path.attribute(
            x, target=target, n_steps=STEPS, method="riemann_middle", internal_batch_size=size
        )

    def occlusion(size: int) -> Run:
        return lambda: window.attribute(
            x, (3, SQUARE, SQUARE), (3, SQUARE, SQUARE), target=target, perturbations_per_eval=size
        )[:, 0]

    return {
        "gradcam": gradcam,
        "integrated-gradients": best(integrated),
        "occlusion": best(occlusion),
    }


def completing(net: nn.Module, x: Tensor, target: int) -> dict[str, Run]:
    """The fewest of the doubled steps that add up within a hundredth, as if they were known."""
    from captum.attr import IntegratedGradients

    path = IntegratedGradients(net)
    change = float((net(x) - net(torch.zeros_like(x)))[0, target])

    def run(steps: int) -> Tensor:
        return path.attribute(
            x, target=target, n_steps=steps, method="riemann_middle", internal_batch_size=8
        )

    def enough(steps: int) -> bool:
        return abs(float(run(steps).sum()) - change) <= 0.01 * abs(change)

    steps = next((n for n in (8, 16, 32, 64, 128, 256) if enough(n)), 512)
    return {f"to 1 % ({steps} steps)": lambda: run(steps)}


def authors(net: nn.Module, x: Tensor, target: int) -> dict[str, Run]:
    """RISE as its authors publish it (explanations.py of eclique/RISE), on masks of ours."""
    side = x.shape[2]
    masks = torch.stack([_mask(seed, 7, 0.5, side, side) for seed in range(MASKS)])[:, None]

    def rise(size: int) -> Run:
        def run() -> Tensor:
            with torch.no_grad():
                found = [net(part * x).softmax(1) for part in masks.split(size)]
                shares = torch.cat(found)[:, target]
                return (shares @ masks.flatten(1)).view(1, side, side) / MASKS / 0.5

        return run

    return {"rise": best(rise)}


def grad_cams(net: nn.Module, x: Tensor, target: int) -> dict[str, Run]:
    import pytorch_grad_cam as theirs
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    targets = [ClassifierOutputTarget(target)]

    def of(kind: type[Any], size: int = 32, layer: Any = net.layer4) -> Run:
        def run() -> Tensor:
            with kind(model=net, target_layers=[layer]) as cam:
                cam.batch_size = size
                return torch.from_numpy(cam(input_tensor=x, targets=targets))

        return run

    # One size for the slow ones: a run takes minutes. ScoreCAM of 256 channels, not 2,048.
    return {
        "gradcam": of(theirs.GradCAM),
        "scorecam": of(theirs.ScoreCAM, 16, net.layer1),
        "ablationcam": of(theirs.AblationCAM, 16),
    }


#: A network, an image and its class.
Case = tuple[nn.Module, Tensor, int]


def random_case() -> Case:
    torch.manual_seed(0)
    net, x = resnet50().eval(), torch.randn(1, 3, 224, 224)
    return net, x, int(net(x).argmax())


def real_case() -> Case:
    """Training bends the path; random weights hardly do. Raises OSError where not fetched."""
    net = mobilenet_v2().eval()
    net.load_state_dict(torch.load(FETCHED / "mobilenet_v2.pth"))
    x = IMAGENET(open_image(str(FETCHED / "pictures" / "chelsea.png"))).inputs[None]
    return net, x, int(net(x).argmax())


def peers() -> Iterator[tuple[str, Case, dict[str, Run]]]:
    for name, case, make in (
        ("captum", random_case, captums), ("captum", real_case, completing),
        ("RISE's authors", random_case, authors), ("pytorch-grad-cam", random_case, grad_cams),
    ):  # fmt: skip
        try:
            found = case()
            yield name, found, make(*found)
        # RuntimeError: a torchvision that does not fit this torch.
        except (ImportError, RuntimeError, OSError) as error:
            print(f"{name} is left out: {error}; pip install captum grad-cam torchvision")


LIMITS = {
    "gradcam": 0.8, "integrated-gradients": 0.75, "to 1 %": 0.5, "occlusion": 0.5, "rise": 0.5,
    "scorecam": 0.7, "ablationcam": 0.2,
}  # fmt: skip
#: Ours of what a peer is measured at, where it is not a CAM of layer4.
OURS: dict[str, tuple[str, dict[str, Any]]] = {
    "integrated-gradients": ("integrated-gradients", {"steps": STEPS}),
    "to 1 %": ("integrated-gradients", {"tolerance": 0.01}),
    "occlusion": ("occlusion", {"window": SQUARE, "stride": SQUARE}),
    "rise": ("rise", {"masks": MASKS, "coverage": False}),
    "scorecam": ("scorecam", {"layer": "layer1", "relu": True}),
}


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
        net, _, _ = real_case()
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
    print(f"{torch.get_num_threads()} threads, {rounds} rounds, 224 x 224; resnet50 at random, and")
    print("MobileNetV2 as published for the time to a completeness of 1 %")
    for name, (net, x, target), runs in peers():
        model = as_model(net)
        for method, theirs in runs.items():
            kind = method.partition(" (")[0]
            called, options = OURS.get(kind, (kind, {"layer": "layer4", "relu": True}))

            def ours(m: str = called, o: dict[str, Any] = options) -> Any:
                return attribute(model, x, m, target=target, **o)  # noqa: B023  called at once

            slow = kind in ("scorecam", "ablationcam")
            # After sixteen pictures there is a copy; the long methods see as many in one run.
            warm = 0 if slow else 16 if kind == "gradcam" else 1
            found, took, result, other = timed(ours, theirs, 1 if slow else rounds, warm)
            mine = result.upsampled if other.dim() == 3 else result.values
            limit = LIMITS[kind]
            verdict = "met" if found <= limit else "MISSED"
            print(
                f"{method:<22} {took:7.2f} s  {found:5.2f} x {name:<17} target <= {limit}: "
                f"{verdict:<7} maps differ by {apart(mine, other):.1e}"
            )
    evaluated()


if __name__ == "__main__":
    main()
