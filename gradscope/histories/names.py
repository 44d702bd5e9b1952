"""How loggers name what they write: one table of patterns for every format that has names."""

from __future__ import annotations

import re
from collections.abc import Sequence

from gradscope.histories.history import Kind

#: The note on a run that logged nothing of its layers.
ONLY_TOTAL = "only the total gradient norm was logged, so nothing is known of single layers"

#: How a parameter's gradient norm is named. What is not an L2 norm (``grad_inf_norm``) is not here.
_GRADIENTS = tuple(
    re.compile(pattern, re.IGNORECASE)
    for pattern in (
        r"^(?:train/)?grad_2(?:\.0)?_norm[/_](?P<name>.+)$",  # Lightning
        r"^l2_norm/grad/(?P<name>.+)$",  # Composer
        r"^grad/(?P<name>.+)\.norm$",  # OLMo
        r"^(?:train/)?(?:grad_norms?|gradient_norms?|grads?|gradients?)[/:.](?P<name>.+)$",  # W&B
        r"^(?P<name>.+)[/:._](?:grad_norm|gradient_norm|grad_l2|l2_norm)$",
        r"^(?P<name>.+)[/:._](?:grads?|gradients?)$",
    )
)
#: Other statistics that stand beside the norm under the same prefix.
_NO_NORM = re.compile(r"[./_](?:min|max|avg|mean|std|var|median|hist|histogram)$", re.IGNORECASE)
_WHERE = r"(?:(?:train|training|trainer|optim|optimizer|metrics?|global|model|stats)[/_.:])*"
_TOTAL = re.compile(
    _WHERE + r"(?:(?:total_|global_)?(?:grad|gradient)s?_(?:l2_)?norm(?:[/_.](?:total|global|all))?"
    r"|grad_2(?:\.0)?_norm_total|l2_norm/grad/global|(?:grad|gradient)s?/(?:total|global)_norm"
    r"|total_norm|total_l2)",
    re.IGNORECASE,
)
_LOSS = re.compile(r"(?:(?:train|training|batch)[/_])?loss(?:_step|/train)?", re.IGNORECASE)
_RATE = re.compile(
    r"(?:(?:train|optim|optimizer)[/_])?(?:lr|learning_rate)(?:[-/].+|_?group_?\d+|_?\d+)?",
    re.IGNORECASE,
)


def gradient_of(name: str) -> str | None:
    """The parameter whose gradient norm a column or tag is; None when it is another thing."""
    if is_total(name):
        return None
    for pattern in _GRADIENTS:
        if found := pattern.match(name):
            return None if _NO_NORM.search(found["name"]) else found["name"]
    return None


def is_total(name: str) -> bool:
    """Whether it is the norm of all gradients together."""
    return _TOTAL.fullmatch(name) is not None


def is_loss(name: str) -> bool:
    """Whether it is the loss of training; that of validation is not."""
    return _LOSS.fullmatch(name) is not None


def is_rate(name: str) -> bool:
    """Whether it is a learning rate; there may be one for each parameter group."""
    return _RATE.fullmatch(name) is not None


def guessed_kind(name: str, shape: Sequence[int] | None = None) -> Kind:
    """What a parameter is, by its name and, where it is known, its shape."""
    lowered = name.lower()
    if lowered.endswith(("bias", ".beta")) or ".bias_" in lowered:
        return "bias"
    if re.search(r"(norm|\bbn|\.bn|ln_|_ln|layernorm)", lowered):
        return "norm"
    if re.search(r"(embed|wte|wpe)", lowered):
        return "embedding"
    if shape is None:
        return "other"
    if len(shape) == 1:
        return "norm" if lowered.endswith(("weight", "gamma", "scale")) else "bias"
    return "matrix" if len(shape) == 2 else "conv" if len(shape) > 2 else "other"


def clean(name: str) -> str:
    """A name that can be written as UTF-8: lone surrogates become escapes."""
    return name.encode("utf-8", "backslashreplace").decode()
