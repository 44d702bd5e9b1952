"""Every attribution method: name, family, reference, options; what it computes lies elsewhere.

This module imports nothing heavy, so that listing methods and refusing wrong options cost nothing.
Third parties' methods are found through the entry point group ``gradscope.methods``: each names a
``Method``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from importlib import import_module
from typing import Any, Literal

from gradscope.errors import UsageError
from gradscope.plugins import loaded

#: What the values are: "gradient" [N, C, H, W] of the input; "activation" [N, h, w] of a layer;
#: "perturbation" [N, H, W] of the input; "attention" [N, h, w] of the patch tokens.
Family = Literal["gradient", "activation", "perturbation", "attention"]


@dataclass(frozen=True, slots=True)
class Option:
    """One option: its default, from which its type is known, and what it does."""

    default: Any
    help: str
    choices: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Method:
    """One method. ``home`` is the ``module:function`` that computes it."""

    name: str
    family: Family
    summary: str
    reference: str
    home: str
    options: Mapping[str, Option] = field(default_factory=dict)
    #: How a heatmap is drawn: both signs, or only what is above zero.
    sign: Literal["signed", "positive"] = "positive"
    #: How channels become one map: their sum, or the greatest magnitude.
    channels: Literal["sum", "max-abs"] = "sum"
    #: Whether it reads one layer.
    reads_layer: bool = False

    @property
    def compute(self) -> Callable[..., Any]:
        """The function behind it; importing it imports torch."""
        module, _, name = self.home.partition(":")
        found: Callable[..., Any] = getattr(import_module(module), name)
        return found


_SAMPLES = {
    "samples": Option(25, "noisy copies of each image"),
    "noise": Option(0.15, "standard deviation of the noise over the image's range"),
}
_FUSION = Option("mean", "how heads become one", ("mean", "max", "min"))
_RELU = {"relu": Option(False, "cut off what is below zero, as the paper's last step does")}


def _input(name: str, summary: str, reference: str, home: str, **more: Any) -> Method:
    return Method(name, "gradient", summary, reference, f"gradscope.attribution.{home}", **more)


def _cam(name: str, summary: str, reference: str, home: str, **options: Option) -> Method:
    where = f"gradscope.attribution.{home}"
    return Method(name, "activation", summary, reference, where, _RELU | options, reads_layer=True)


def _perturbed(name: str, summary: str, reference: str, home: str, **more: Any) -> Method:
    return Method(name, "perturbation", summary, reference, f"gradscope.attribution.{home}", **more)


def _attended(name: str, summary: str, reference: str, **options: Option) -> Method:
    home = f"gradscope.attribution.attention:{name.replace('-', '_')}"
    return Method(name, "attention", summary, reference, home, options)


_BUILT_IN = (
    _input(
        "saliency", "gradient of the score; its greatest magnitude over the channels is drawn",
        "Simonyan et al. 2014, arXiv:1312.6034", "gradients:saliency", channels="max-abs",
    ),
    _input(
        "input-x-gradient", "gradient times input", "Shrikumar et al. 2016, arXiv:1605.01713",
        "gradients:input_x_gradient", sign="signed",
    ),
    _input(
        "smoothgrad", "mean gradient over noisy copies", "Smilkov et al. 2017, arXiv:1706.03825",
        "gradients:smoothgrad", channels="max-abs", options=_SAMPLES,
    ),
    _input(
        "vargrad", "variance of the gradient over noisy copies",
        "Adebayo et al. 2018, arXiv:1810.03292", "gradients:vargrad", options=_SAMPLES,
    ),
    _input(
        "guided-backprop", "gradient with negative parts cut off at every rectifier",
        "Springenberg et al. 2015, arXiv:1412.6806", "guided:guided_backprop", channels="max-abs",
    ),
    _input(
        "deconvnet", "as guided-backprop, without the rectifiers' own gates",
        "Zeiler & Fergus 2014, arXiv:1311.2901", "guided:deconvnet", channels="max-abs",
    ),
    _input(
        "guided-gradcam", "guided-backprop times the enlarged Grad-CAM map",
        "Selvaraju et al. 2017, arXiv:1610.02391", "guided:guided_gradcam", channels="max-abs",
        reads_layer=True,
    ),
    _input(
        "integrated-gradients", "path integral of the gradient from a reference image",
        "Sundararajan et al. 2017, arXiv:1703.01365", "gradients:integrated_gradients",
        sign="signed",
        options={
            "steps": Option(32, "points on the path"),
            "reference": Option(
                "mean", "black, white, mean, blurred, random, or an image; in image space"
            ),
            "rule": Option("midpoint", "of integration", ("midpoint", "gauss-legendre")),
            "tolerance": Option(
                0.0, "double the steps, up to 4,096, until the relative delta is below this; 0 off"
            ),
            "draws": Option(4, "random references to average over"),
        },
    ),
    _cam(
        "gradcam", "channels weighted by their mean gradient",
        "Selvaraju et al. 2017, arXiv:1610.02391", "cams:gradcam",
    ),
    _cam(
        "gradcam++", "channels weighted by positive gradients, each by its alpha",
        "Chattopadhyay et al. 2018, arXiv:1710.11063, eq. 19", "cams:gradcam_plus_plus",
    ),
    _cam(
        "xgradcam", "channels weighted by gradients, these by the activations' shares",
        "Fu et al. 2020, arXiv:2008.02312", "cams:xgradcam",
    ),
    _cam(
        "hirescam", "activations times gradients, place by place",
        "Draelos & Carin 2020, arXiv:2011.08891", "cams:hirescam",
    ),
    _cam(
        "layercam", "as hirescam, with positive gradients only",
        "Jiang et al. 2021, IEEE TIP 30:5875", "cams:layercam",
    ),
    _cam(
        "eigencam", "first principal component of the activations; knows no target",
        "Muhammad & Yeasin 2020, arXiv:2008.00299", "cams:eigencam",
    ),
    _cam(
        "scorecam", "channels weighted by the score of the image seen through them",
        "Wang et al. 2020, arXiv:1910.01279", "masking:scorecam",
        channels=Option(0, "only the ones of greatest variance; 0 takes all"),
    ),
    _cam(
        "ablationcam", "channels weighted by what the score loses without them",
        "Desai & Ramaswamy 2020, WACV, eq. 3", "masking:ablationcam",
    ),
    _perturbed(
        "occlusion", "what the score loses when a square is covered",
        "Zeiler & Fergus 2014, arXiv:1311.2901", "perturbation:occlusion", sign="signed",
        options={
            "window": Option(0, "side of the square in pixels; 0 is a seventh of the image"),
            "stride": Option(0, "pixels from square to square; 0 is half the window"),
            "fill": Option(0.0, "what covers, in the model's units (0: the mean colour)"),
        },
    ),
    _perturbed(
        "rise", "random masks weighted by the probability of what they leave",
        "Petsiuk et al. 2018, arXiv:1806.07421", "perturbation:rise",
        options={
            "masks": Option(1000, "random masks"),
            "grid": Option(7, "cells of a mask along a side"),
            "keep": Option(0.5, "share of the cells that a mask leaves"),
        },
    ),
    _attended(
        "attention", "what the class token (or the mean patch) attends to in one block",
        "Vaswani et al. 2017, arXiv:1706.03762",
        block=Option(-1, "which attention, from 0; negative ones from the last"), fusion=_FUSION,
    ),
    _attended(
        "attention-rollout", "attention multiplied through all blocks, residuals included",
        "Abnar & Zuidema 2020, arXiv:2005.00928", fusion=_FUSION,
        discard=Option(0.0, "share of each row's least weights to drop before"),
    ),
    _attended(
        "gradient-rollout", "attention weighted by its positive gradient, through all blocks",
        "Chefer et al. 2021, arXiv:2103.15679, eq. 5-6",
    ),
)  # fmt: skip


def methods() -> Mapping[str, Method]:
    """Every method by name, ours first. Raises UsageError for a plugin that cannot be loaded."""
    return {
        method.name: method for method in (*_BUILT_IN, *(found for _, found in loaded("methods")))
    }


def method_named(name: str) -> Method:
    """A method. Raises UsageError naming what there is."""
    known = methods()
    if name not in known:
        close = get_close_matches(name, known, n=3)
        hint = f"; did you mean {', '.join(close)}?" if close else f"; there are {', '.join(known)}"
        raise UsageError(f"no method is called {name!r}{hint}")
    return known[name]


def completed(method: Method, given: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a method, what was not given at its default.

    Raises UsageError for an option that it does not have and for a value of the wrong type.
    """
    wrong = [option for option in given if option not in method.options]
    if wrong:
        offered = ", ".join(method.options) or "none"
        raise UsageError(f"{method.name} has no option {wrong[0]!r}; its options: {offered}")
    return {
        name: _checked(name, option, given.get(name, option.default))
        for name, option in method.options.items()
    }


def _checked(name: str, option: Option, value: Any) -> Any:
    if option.choices and value not in option.choices:
        raise UsageError(f"{name} is one of {', '.join(option.choices)}, not {value!r}")
    if isinstance(option.default, bool) or not isinstance(option.default, int | float):
        return value
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise UsageError(f"{name} is a number, not {value!r}")
    return type(option.default)(value)
