"""The same numbers, whatever form a model was saved in."""

from __future__ import annotations

from functools import cache, partial

import pytest
import torch

from gradscope import attribute
from gradscope.attribution.attribute import Attribution
from gradscope.models.forms import as_model
from gradscope.models.model import Model
from gradscope.models.probe import held, run

from .forms import FORMS, images, model, saved

METHODS = {
    "rectifiers": ("gradcam", "layercam", "saliency", "guided-backprop", "deconvnet", "ablationcam",
                   "scorecam", "guided-gradcam", "integrated-gradients"),
    "vit": ("gradcam", "saliency", "attention", "attention-rollout", "gradient-rollout",
            "ablationcam"),
    "registers": ("hirescam", "attention-rollout", "gradient-rollout"),
    "channels last": ("gradcam", "xgradcam", "ablationcam"),
}  # fmt: skip
#: A frozen graph has lost its modules' names; its operators are counted.
FROZEN = {"last": "convolution.2"}


@cache
def form(name: str, kind: str) -> Model:
    made = model(name)
    return as_model(
        made if kind == "eager" else saved(made, kind, images(name, 1 + ("dynamic" in kind)))
    )


def explained(name: str, kind: str, method: str) -> Attribution:
    layer = "last" if name == "rectifiers" else "auto"
    layer = FROZEN.get(layer, layer) if kind == "frozen" else layer
    return attribute(form(name, kind), images(name), method, target=[1, 2], layer=layer)


@pytest.mark.parametrize("kind", FORMS)
@pytest.mark.parametrize("name", METHODS)
def test_every_form_gives_the_maps_of_the_module(name: str, kind: str) -> None:
    for method in METHODS[name]:
        wanted = explained(name, "eager", method)
        found = explained(name, kind, method)

        assert wanted.values.abs().max() > 1e-6, method
        scale = float(wanted.values.abs().max())
        torch.testing.assert_close(
            found.values,
            wanted.values,
            rtol=0,
            atol=1e-5 * scale,
            msg=partial("{}: {}".format, method),
        )
        if kind != "frozen":
            assert found.layer == wanted.layer, method


@pytest.mark.parametrize("kind", [k for k in FORMS if k != "frozen"])
@pytest.mark.parametrize("name", METHODS)
def test_every_layer_that_has_a_name_gives_what_the_module_gives(name: str, kind: str) -> None:
    x = images(name, 1)
    made = model(name)
    seen: dict[str, torch.Tensor] = {}
    for layer, part in made.named_modules():
        part.register_forward_hook(
            lambda _m, _i, out, layer=layer: (
                seen.update({layer: out.clone()}) if isinstance(out, torch.Tensor) else None
            )
        )
    made(x)

    other = form(name, kind)
    known = [layer for layer in seen if layer and layer in other.layers]
    assert len(known) > 5
    with held(other.module):
        for layer in known:
            (found,) = run(other, x, [layer]).pieces[layer]
            torch.testing.assert_close(found, seen[layer], rtol=1e-5, atol=1e-5)


def test_an_export_of_one_image_answers_a_batch() -> None:
    fixed = form("rectifiers", "export")

    assert fixed.batch == 1
    three = attribute(fixed, images("rectifiers", 3), "gradcam", target=0)
    assert three.values.shape == (3, 7, 7)


def test_a_traced_transformer_that_was_fused_can_be_differentiated() -> None:
    fused = saved(model("vit"), "traced without gradients", images("vit", 1))

    assert "_native_multi_head_attention" in str(fused.inlined_graph)  # type: ignore[attr-defined]
    found = attribute(fused, images("vit", 1), "saliency", target=0)
    assert found.values.abs().max() > 0
