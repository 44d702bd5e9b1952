"""Every attribution method: one row of name, family, reference, options and home.

A row names the module that has its formula; the function there bears the method's name. This
module imports nothing heavy, so that listing methods and refusing wrong options cost nothing.
Plug-ins add methods through the entry point group ``gradscope.methods``: each names a ``Method``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from difflib import get_close_matches
from typing import Any

from gradscope.attribution.method import Method, Option
from gradscope.errors import UsageError
from gradscope.plugins import loaded

# Plug-ins find the types beside the table.
__all__ = ["Method", "Option", "method_named", "methods"]

_SAMPLES = {
    "samples": Option(25, "noisy copies of each image", effort=True),
    "noise": Option(0.15, "standard deviation of the noise over the image's range"),
}
_STABILISERS = (
    "stabilisers swallow what weak activations carry: use integrated-gradients, or lower --option "
    "epsilon where it was raised"
)
_REFERENCE = Option("mean", "black, white, mean, blurred or random (in pixels), or a picture file")
_DRAWS = Option(4, "random references to average over")
_FUSION = Option("mean", "how heads are combined", ("mean", "max", "min"))
_SMOOTHED = {
    "eigen_smooth": Option(
        False, "first principal component of the channels' parts, not their sum"
    ),
    "aug_smooth": Option(False, "mean map over the mirror image and three brightnesses"),
}
_RELU = {"relu": Option(False, "cut off negative values, as in the paper's last step")}


def _home(module: str, name: str) -> str:
    function = name.replace("++", "_plus_plus").replace("-", "_")
    return f"gradscope.attribution.formulas.{module}:{function}"


def _input(name: str, summary: str, reference: str, module: str, **more: Any) -> Method:
    home = _home(module, name)
    return Method(name, "gradient", summary, reference, home, differentiates="input", **more)


def _cam(name: str, summary: str, reference: str, module: str, **options: Option) -> Method:
    return Method(
        name, "activation", summary, reference, _home(module, name), _RELU | options,
        reads_layer=True, differentiates="layer",
    )  # fmt: skip


def _gradient_free_cam(
    name: str, summary: str, reference: str, module: str, **options: Option
) -> Method:
    return replace(_cam(name, summary, reference, module, **options), differentiates=None)


def _perturbed(name: str, summary: str, reference: str, **more: Any) -> Method:
    home = _home(name, name)
    return Method(name, "perturbation", summary, reference, home, **more)


def _attended(name: str, summary: str, reference: str, **options: Option) -> Method:
    home = _home("attention", name)
    return Method(name, "attention", summary, reference, home, options, differentiates="input")


_BUILT_IN = (
    _input(
        "saliency", "gradient of the score; its greatest magnitude over the channels is drawn",
        "Simonyan et al. 2014, arXiv:1312.6034", "gradients", channels="max-abs",
    ),
    _input(
        "input-x-gradient", "gradient times input", "Shrikumar et al. 2016, arXiv:1605.01713",
        "gradients", sign="signed",
    ),
    _input(
        "smoothgrad", "mean gradient over noisy copies", "Smilkov et al. 2017, arXiv:1706.03825",
        "gradients", channels="max-abs", options=_SAMPLES,
    ),
    _input(
        "vargrad", "variance of the gradient over noisy copies",
        "Adebayo et al. 2018, arXiv:1810.03292", "gradients", options=_SAMPLES,
    ),
    _input(
        "guided-backprop", "gradient with negative values cut off at every rectifier",
        "Springenberg et al. 2015, arXiv:1412.6806", "guided", channels="max-abs",
    ),
    _input(
        "deconvnet", "as guided-backprop, without the rectifiers' own gates",
        "Zeiler & Fergus 2014, arXiv:1311.2901", "guided", channels="max-abs",
    ),
    _input(
        "guided-gradcam", "guided-backprop times the upsampled Grad-CAM map",
        "Selvaraju et al. 2017, arXiv:1610.02391", "guided", channels="max-abs",
        reads_layer=True,
    ),
    _input(
        "integrated-gradients", "path integral of the gradient from a reference image",
        "Sundararajan et al. 2017, arXiv:1703.01365", "gradients",
        sign="signed",
        refine="refine: --tolerance 0.01, which adds points until it is met, or --steps 256",
        options={
            "steps": Option(32, "points on the path", effort=True),
            "reference": _REFERENCE,
            "rule": Option("midpoint", "quadrature rule", ("midpoint", "gauss-legendre")),
            "tolerance": Option(
                0.0, "points where the path bends until the relative delta is within this; 0 off",
                goal=True,
            ),
            "draws": _DRAWS,
        },
    ),
    _input(
        "deeplift", "slopes between image and reference, chained backwards (the rescale rule)",
        "Shrikumar et al. 2017, arXiv:1704.02685", "deeplift", sign="signed",
        options={"reference": _REFERENCE, "draws": _DRAWS},
    ),
    _input(
        "gradient-shap", "gradients at random points between random references and noisy images",
        "Lundberg & Lee 2017, arXiv:1705.07874; Erion et al. 2021", "gradients", sign="signed",
        refine="average over more: --option samples=500",
        options={
            "samples": Option(50, "random points", effort=True),
            "reference": _REFERENCE,
            "noise": Option(0.0, "standard deviation of the noise over the image's range"),
        },
    ),
    Method(
        "kernel-shap", "perturbation", "Shapley values of superpixels, by weighted least squares",
        "Lundberg & Lee 2017, arXiv:1705.07874", _home("shapley", "kernel-shap"), sign="signed",
        options={
            "segments": Option(
                49, "superpixels; in Python also their labels, an array [H, W]", array=True
            ),
            "samples": Option(1000, "coalitions of superpixels that are shown"),
            "reference": _REFERENCE,
        },
    ),
    _input(
        "lrp", "the score handed back layer by layer, in proportion to contributions",
        "Bach et al. 2015, doi:10.1371/journal.pone.0130140; Montavon et al. 2019", "lrp",
        sign="signed",
        refine=_STABILISERS,
        options={
            "composite": Option(
                "epsilon-plus", "the rules of dense layers and convolutions",
                ("epsilon-plus", "epsilon-plus-flat", "epsilon-gamma", "epsilon-gamma-box",
                 "epsilon-alpha2-beta1", "epsilon-alpha2-beta1-flat", "epsilon", "gamma"),
            ),
            "epsilon": Option(1e-6, "stabiliser of the epsilon rule"),
            "gamma": Option(0.25, "how much more the gamma rule counts positive weights"),
            "biases": Option(True, "biases get their share; false hands it on to the pixels"),
        },
    ),
    _input(
        "attention-lrp", "relevance through attention: AttnLRP, for transformers",
        "Achtibat et al. 2024, arXiv:2402.05602", "transformers", sign="signed",
        refine=_STABILISERS,
        options={
            "gamma": Option(0.05, "gamma rule of dense layers; 0 for the epsilon rule"),
            "convolution_gamma": Option(0.25, "the same for the convolution of patches"),
            "epsilon": Option(1e-6, "stabiliser"),
        },
    ),
    Method(
        "relevance", "attention",
        "attention weighted by its gradient and its relevance, through all blocks",
        "Chefer et al. 2021, arXiv:2012.09838", _home("transformers", "relevance"),
        differentiates="input",
    ),
    _cam(
        "gradcam", "channels weighted by their mean gradient",
        "Selvaraju et al. 2017, arXiv:1610.02391", "cams", **_SMOOTHED,
    ),
    _cam(
        "gradcam++", "channels weighted by positive gradients, each by its alpha",
        "Chattopadhyay et al. 2018, arXiv:1710.11063, eq. 19", "cams", **_SMOOTHED,
    ),
    _cam(
        "xgradcam", "channels weighted by gradients, these by the activations' shares",
        "Fu et al. 2020, arXiv:2008.02312", "cams", **_SMOOTHED,
    ),
    _cam(
        "hirescam", "activations times gradients, position by position",
        "Draelos & Carin 2020, arXiv:2011.08891", "cams", **_SMOOTHED,
    ),
    _cam(
        "layercam", "as hirescam, with positive gradients only",
        "Jiang et al. 2021, IEEE TIP 30:5875", "cams", **_SMOOTHED,
    ),
    _gradient_free_cam(
        "eigencam", "first principal component of the activations; independent of the target",
        "Muhammad & Yeasin 2020, arXiv:2008.00299", "cams",
    ),
    _cam(
        "finercam", "gradcam of the target less the classes nearest to it",
        "Zhang et al. 2025, arXiv:2501.11309", "cams", **_SMOOTHED,
        alpha=Option(1.0, "how much of the other classes is taken off"),
        classes=Option(3, "how many classes, those of the nearest scores"),
    ),
    _cam(
        "shapleycam", "as gradcam, with half the curvature of the score taken off the gradient",
        "Cai 2025, arXiv:2501.06261", "cams", **_SMOOTHED,
        utility=Option("rest", "rest: logit and log-probability; or the logit", ("rest", "logit")),
    ),
    _gradient_free_cam(
        "kpcacam", "as eigencam, after a kernel", "Karmani et al. 2024, arXiv:2410.00267", "cams",
        kernel=Option("sigmoid", "the kernel", ("sigmoid", "rbf", "poly")),
        gamma=Option(0.0, "its coefficient; 0 for one over the channels"),
    ),
    _gradient_free_cam(
        "scorecam", "channels weighted by the score of the image masked by them",
        "Wang et al. 2020, arXiv:1910.01279", "masking",
        channels=Option(0, "only the channels of greatest variance; 0 for all"),
    ),
    _gradient_free_cam(
        "ablationcam", "channels weighted by what the score loses without them",
        "Desai & Ramaswamy 2020, WACV, eq. 3", "masking",
    ),
    _perturbed(
        "occlusion", "what the score loses when a square is covered",
        "Zeiler & Fergus 2014, arXiv:1311.2901", sign="signed",
        options={
            "window": Option(0, "side of the square in pixels; 0 for a seventh of the image"),
            "stride": Option(0, "pixels from square to square; 0 for half the window"),
            "fill": Option(0.0, "covering value in the model's units (0: the mean colour)"),
        },
    ),
    _perturbed(
        "rise", "random masks weighted by the probability of the masked image",
        "Petsiuk et al. 2018, arXiv:1806.07421",
        options={
            "masks": Option(1000, "random masks", effort=True),
            "grid": Option(7, "cells along each side of a mask"),
            "keep": Option(0.5, "fraction of the cells that a mask keeps"),
            "coverage": Option(
                True, "divide by what the masks leave of each pixel; false: by keep, as the paper"
            ),
            "error": Option(
                0.0, "draw masks until the standard error is this share of the range; 0: masks",
                goal=True,
            ),
        },
    ),
    _attended(
        "attention", "what the class token (or the mean patch) attends to in one block",
        "Vaswani et al. 2017, arXiv:1706.03762",
        block=Option(-1, "index of the block, from 0; negative from the last"), fusion=_FUSION,
    ),
    _attended(
        "attention-rollout", "attention multiplied through all blocks, residuals included",
        "Abnar & Zuidema 2020, arXiv:2005.00928", fusion=_FUSION,
        discard=Option(0.0, "fraction of each row's smallest weights to drop first"),
    ),
    _attended(
        "gradient-rollout", "attention weighted by its positive gradient, through all blocks",
        "Chefer et al. 2021, arXiv:2103.15679, eq. 5-6",
    ),
)  # fmt: skip


def methods() -> Mapping[str, Method]:
    """Every method by name, built-in ones first. Raises UsageError for a plug-in that fails."""
    return {
        method.name: method for method in (*_BUILT_IN, *(found for _, found in loaded("methods")))
    }


def method_named(name: str) -> Method:
    """The method. Raises UsageError for an unknown name, with similar ones."""
    known = methods()
    if name not in known:
        close = get_close_matches(name, known, n=3)
        offered = f"did you mean {', '.join(close)}?" if close else f"there are {', '.join(known)}"
        raise UsageError(f"unknown method {name!r}; {offered}")
    return known[name]
