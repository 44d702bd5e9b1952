"""What attribution costs beside captum and pytorch-grad-cam: resnet50, one image of 224 x 224.

    python benchmarks/explain.py [rounds]

Prints the median ratio of wall times of runs that take turns, and how far the maps are apart. A
peer that is not installed is left out and said so: pip install captum grad-cam (the latter also
wants torchvision and OpenCV). Peers get their best batch size of those tried; ours chooses its own.
"""

from __future__ import annotations

import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "fixtures"))

from architectures import resnet50

from gradscope import attribute
from gradscope.models.forms import as_model

STEPS = 32
CHUNKS = (1, 2, 4, 8, 16, 32)
warnings.simplefilter("ignore")

Run = Callable[[], Any]


def seconds(run: Run) -> tuple[float, Any]:
    began = time.perf_counter()
    found = run()
    return time.perf_counter() - began, found


def timed(ours: Run, theirs: Run, rounds: int) -> tuple[float, float, Any, Any]:
    """The median of ours over theirs, pair by pair, that of ours in seconds, and what both gave."""
    if rounds > 1:
        ours(), theirs()
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
    from captum.attr import IntegratedGradients, LayerGradCam

    cam, path = LayerGradCam(net, net.layer4), IntegratedGradients(net)

    def gradcam() -> Tensor:
        small = cam.attribute(x, target=target, relu_attributions=True)
        return interpolate(small, size=x.shape[2:], mode="bilinear", align_corners=False)[:, 0]

    def integrated(size: int) -> Run:
        return lambda: path.attribute(
            x, target=target, n_steps=STEPS, method="riemann_middle", internal_batch_size=size
        )

    return {"gradcam": gradcam, "integrated-gradients": best(integrated)}


def grad_cams(net: nn.Module, x: Tensor, target: int) -> dict[str, Run]:
    import pytorch_grad_cam as theirs
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    targets = [ClassifierOutputTarget(target)]

    def of(kind: type[Any], size: int = 32) -> Run:
        def run() -> Tensor:
            with kind(model=net, target_layers=[net.layer4]) as cam:
                cam.batch_size = size
                return torch.from_numpy(cam(input_tensor=x, targets=targets))

        return run

    # One size for the slow ones: a run takes minutes.
    return {
        "gradcam": of(theirs.GradCAM),
        "scorecam": of(theirs.ScoreCAM, 16),
        "ablationcam": of(theirs.AblationCAM, 16),
    }


def peers(net: nn.Module, x: Tensor, target: int) -> Iterator[tuple[str, dict[str, Run]]]:
    for name, make in (("captum", captums), ("pytorch-grad-cam", grad_cams)):
        try:
            yield name, make(net, x, target)
        # RuntimeError: a torchvision that does not fit this torch.
        except (ImportError, RuntimeError) as error:
            print(f"{name} is left out: {error}; pip install captum grad-cam torchvision")


LIMITS = {"gradcam": 0.8, "integrated-gradients": 0.9, "ablationcam": 0.2, "scorecam": 1.0}


def main() -> None:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 7
    torch.manual_seed(0)
    net = resnet50().eval()
    x = torch.randn(1, 3, 224, 224)
    model = as_model(net)
    with torch.no_grad():
        target = int(net(x).argmax())
    print(f"resnet50, 224 x 224, {torch.get_num_threads()} threads, {rounds} rounds")
    for name, runs in peers(net, x, target):
        for method, theirs in runs.items():
            options = {"steps": STEPS} if method == "integrated-gradients" else {"relu": True}
            layer = {} if method == "integrated-gradients" else {"layer": "layer4"}

            def ours(m: str = method, o: dict[str, Any] = {**options, **layer}) -> Any:  # noqa: B006
                return attribute(model, x, m, target=target, **o)

            slow = method in ("scorecam", "ablationcam")
            found, took, result, other = timed(ours, theirs, 1 if slow else rounds)
            mine = result.upsampled if other.dim() == 3 else result.values
            limit = LIMITS[method]
            verdict = "met" if found <= limit else "MISSED"
            print(
                f"{method:<22} {took:7.2f} s  {found:5.2f} x {name:<17} target <= {limit}: "
                f"{verdict:<7} maps differ by {apart(mine, other):.1e}"
            )


if __name__ == "__main__":
    main()
