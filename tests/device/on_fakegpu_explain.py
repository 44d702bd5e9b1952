"""Attribution on a fake accelerator: the numbers of the CPU, and nothing mixed.

Run by test_fakegpu.py in a process of its own.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import fakegpu
import numpy as np
import pytest
import torch
from PIL import Image

REASON = fakegpu.missing()
if REASON:
    pytest.skip(REASON, allow_module_level=True)
fakegpu.register()
sys.path[:0] = [
    str(Path(__file__).parents[2] / "fixtures"),
    str(Path(__file__).parents[1] / "attribution"),
]

from forms import images, model  # noqa: E402

import gradscope  # noqa: E402
from gradscope.attribution.methods import methods  # noqa: E402
from gradscope.attribution.synthesis.ascent import Objective, synthesise  # noqa: E402
from gradscope.attribution.synthesis.priors import PRIORS  # noqa: E402
from gradscope.attribution.synthesis.views import stages  # noqa: E402

FEW: dict[str, dict[str, Any]] = {
    "rise": {"masks": 6},
    "smoothgrad": {"samples": 3},
    "vargrad": {"samples": 3},
    "integrated-gradients": {"steps": 4, "reference": "blurred"},
    "occlusion": {"window": 8, "stride": 8},
}


@pytest.mark.parametrize("name", sorted(methods()))
def test_every_method_gives_what_it_gives_on_the_cpu(name: str) -> None:
    of_tokens = methods()[name].family == "attention" or name in ("attention-lrp", "relevance")
    kind = "vit" if of_tokens else "rectifiers"
    # Chefer et al. divide by sums that nearly cancel: single precision is itself 2e-4 off.
    dtype = torch.float64 if name == "relevance" else torch.float32
    net, x = model(kind).to(dtype), images(kind).to(dtype)
    wanted = gradscope.attribute(net, x, name, target=[1, 2], **FEW.get(name, {}))

    found = gradscope.attribute(
        net.to("fakegpu"), x.to("fakegpu"), name, target=[1, 2], **FEW.get(name, {})
    )

    assert found.values.device.type == "fakegpu"
    scale = float(wanted.values.abs().max())
    torch.testing.assert_close(found.values.cpu(), wanted.values, rtol=0, atol=1e-5 * scale)


def test_a_whole_report_is_that_of_the_cpu(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (30, 47, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    asked: dict[str, Any] = {
        "method": ["gradcam", "integrated-gradients"], "steps": 4, "preprocess": "size=16x16",
        "evaluated": True, "output": tmp_path / "out",
    }  # fmt: skip

    wanted = gradscope.explain(model("rectifiers"), tmp_path / "a.png", **asked).result
    found = gradscope.explain(model("rectifiers").to("fakegpu"), tmp_path / "a.png", **asked).result

    assert found.environment.device == "fakegpu:0"
    for a, b in zip(found.explanations, wanted.explanations, strict=True):
        assert a.map.max == pytest.approx(b.map.max, rel=1e-4)
        assert a.diagnostics.insertion_auc == pytest.approx(b.diagnostics.insertion_auc, abs=1e-4)
        assert a.diagnostics.sensitivity == pytest.approx(b.diagnostics.sensitivity, rel=1e-3)
        pairs = zip(a.diagnostics.randomisation, b.diagnostics.randomisation, strict=True)
        assert all(p.correlation == pytest.approx(q.correlation, abs=0.02) for p, q in pairs)


@pytest.mark.parametrize("prior", PRIORS)
def test_synthesis_starts_and_sees_as_on_the_cpu(prior: str) -> None:
    net = model("rectifiers").requires_grad_(False)
    plan, size = stages((16, 16), (16, 16), ()), (3, 16, 16)

    def made(device: str) -> torch.Tensor:
        net.to(device)
        objective: Objective = lambda _, x: (net(x)[:, 1], 0.0)  # noqa: E731
        options = {"prior": PRIORS[prior], "steps": 3, "device": device}
        return synthesise(objective, size, plan, **options)[0].image

    wanted = made("cpu")

    torch.testing.assert_close(made("fakegpu"), wanted, rtol=0, atol=1e-4)
