"""What the last part of a tensor's name says: a layer's parameter, a raw one, or nothing known.

A state dict holds constants beside what was trained: filterbanks, adjacency matrices, time grids,
blur kernels, masks. Nobody can list their names; those of the parameters that layers multiply by
can be listed, since frameworks give them. What is called otherwise is taken for a constant.
"""

from __future__ import annotations

import re
from enum import Enum, auto
from functools import lru_cache


class Leaf(Enum):
    """What a name says of a matrix, before its shape and siblings are asked."""

    LAYER = auto()  # weight, kernel, W_Q, in_proj_weight, gate_up_proj
    RAW = auto()  # trained, but no layer multiplies by it: queries, prompts, decays
    FIXED = auto()  # computed, not trained, whatever else it is called: blur_kernel, ema_w
    UNKNOWN = auto()


_LAYER = re.compile(
    r"\w*weight\d*|weights|kernel|w\d*|w[qkvogudixhrc]{1,4}|original\d*|proj|projection|linear|lin|"
    r"fc\d*|dense|conv\d*d?|mlp|head|classifier|qkv|emb|embed(ding)?s?|codebooks?|gamma|beta|"
    r"lora|hada|lokr|oft|[gw]\d+a?"
)
_RAW = re.compile(
    r"quer(y|ies)|latents?|prompts?|ctx|prototypes?|theta|att|attn|rel|a|ds?|decay|faaaa|maa|"
    r"alpha|gain|logit|scale|shift|slope|tau|temperature"
)
_FIXED = re.compile(
    r"adj|adjacency|avg|average|blur|cis|dct|dft|ema|eps|epsilon|fft|fir|fisher|freqs?|gauss|"
    r"gaussian|grad|grid|haar|hann|idct|istft|laplacian|mask|mat|matrix|mel|noise|sobel|stft|wavelet|"
    r"window"
)
#: Layers of constant filters: their weight is called as a trained one.
_FIXED_LAYER = re.compile(r"\w*(blur|stft|sobel|haar|wavelet)\w*|i?d[fw]t", re.IGNORECASE)
#: Names that a container gave to arrays without names.
_ANONYMOUS = re.compile(r"(arr|param|tensor|var|variable)?_?\d*|onnx::\w+")
_TOKEN = re.compile(r"[A-Z]+(?![a-z])\d*|[A-Z]?[a-z0-9]+")


def leaf_of(name: str) -> Leaf:
    """What the leaf of ``name`` says; of lists of parameters (``weights.0``) the list's name."""
    leaf = name.rpartition(".")[2]
    if "/" in leaf or leaf.isdigit() or leaf == "default":
        parts = re.split(r"[./]", name.removesuffix(":0"))
        while len(parts) > 1 and (parts[-1].isdigit() or parts[-1] == "default"):
            parts.pop()
        leaf = parts[-1]
    return _said(leaf)


@lru_cache(maxsize=4096)
def _said(leaf: str) -> Leaf:
    if _ANONYMOUS.fullmatch(leaf):
        return Leaf.LAYER
    tokens = [t.lower() for t in _TOKEN.findall(leaf)]
    for kind, pattern in ((Leaf.FIXED, _FIXED), (Leaf.LAYER, _LAYER), (Leaf.RAW, _RAW)):
        if any(pattern.fullmatch(token) for token in tokens):
            return Leaf.UNKNOWN if _is_constant_plural(leaf, tokens) else kind
    return Leaf.UNKNOWN


def _is_constant_plural(leaf: str, tokens: list[str]) -> bool:
    """``lbs_weights``, ``class_weights``: given, not trained; ``weights`` alone may be."""
    return tokens[-1] == "weights" and leaf != "weights"


def in_fixed_layer(name: str) -> bool:
    """Whether a tensor belongs to a module of constant filters: ``stft.conv_real.weight``."""
    return any(map(_is_fixed_layer, name.split(".")[-3:-1]))


@lru_cache(maxsize=4096)
def _is_fixed_layer(part: str) -> bool:
    return _FIXED_LAYER.fullmatch(part) is not None


@lru_cache(maxsize=4096)
def is_offset(leaf: str) -> bool:
    """Whether a leaf is that of something added: ``b``, ``b_Q``, ``enc_b_ih``."""
    tokens = leaf.split("_")
    return any(re.fullmatch(r"b\d*", t) for t in tokens) and not any(
        re.fullmatch(r"[wW]\d*", t) for t in tokens
    )


@lru_cache(maxsize=4096)
def is_average(leaf: str) -> bool:
    """Whether a leaf is the moving average of another: ``ema_embedding``, ``embed_avg``."""
    return any(t in ("ema", "avg", "average") for t in leaf.lower().split("_"))
