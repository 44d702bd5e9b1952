"""Features of texts, from a file, that a picture's embedding is compared with."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import load_file
from torch import Tensor

from gradscope.errors import InputError
from gradscope.models.labels import Labels
from gradscope.models.scores import Head

_WRITTEN = (
    "it has one [texts, D] array, or one [D] array for each text, named by it; beside them "
    "logit_scale and logit_bias, if the model has them"
)
#: A scale above is no logarithm: e**20 times a cosine is no logit.
_LARGEST_LOGARITHM = 20


@dataclass(frozen=True, eq=False, slots=True)
class Texts:
    """Features [K, D] of texts, and how their cosines become logits."""

    features: Tensor
    names: Labels | None
    scale: float = 1.0
    bias: float = 0.0
    head: Head = "value"


def read_texts(path: str) -> Texts:
    """Texts in an ``.npy``, ``.npz`` or ``.safetensors``.

    One array [K, D], or one [D] for each text under its own words. ``logit_scale`` is as CLIP
    keeps it, a logarithm; with ``logit_bias`` texts do not exclude each other (SigLIP). Raises
    InputError.
    """
    arrays = dict(_arrays(path))
    scale, bias = (_number(path, arrays, name) for name in ("logit_scale", "logit_bias"))
    features, names = _features(path, arrays)
    if scale is None:
        return Texts(features, names)
    factor = math.exp(scale) if scale <= _LARGEST_LOGARITHM else scale
    if bias is not None:
        return Texts(features, names, factor, bias, "independent")
    return Texts(features, names, factor, head="logits" if len(features) > 1 else "value")


def _arrays(path: str) -> Mapping[str, np.ndarray]:
    try:
        if Path(path).suffix == ".safetensors":
            return load_file(path)
        found = np.load(path, allow_pickle=False)
        return {"": found} if isinstance(found, np.ndarray) else dict(found)
    except FileNotFoundError:
        raise InputError(path, "missing", "file not found") from None
    # Each of the libraries has errors of its own.
    except Exception as error:
        raise InputError(path, "malformed", f"no text features ({error}); {_WRITTEN}") from None


def _number(path: str, arrays: dict[str, np.ndarray], name: str) -> float | None:
    found = arrays.pop(name, None)
    if found is None:
        return None
    if found.size != 1 or not np.isfinite(found).all():
        raise InputError(path, "malformed", f"{name} is not one finite number; {_WRITTEN}")
    return float(found.reshape(()))


def _features(path: str, arrays: Mapping[str, np.ndarray]) -> tuple[Tensor, Labels | None]:
    shapes = {array.shape for array in arrays.values()}
    whole = [array for array in arrays.values() if array.ndim == 2]
    if len(arrays) == 1 and whole:
        found, names = whole[0], None
    elif len(shapes) == 1 and len(next(iter(shapes))) == 1:
        found, names = np.stack(list(arrays.values())), dict(enumerate(arrays))
    else:
        raise InputError(path, "malformed", f"arrays of {sorted(shapes)}; {_WRITTEN}")
    if found.dtype.kind != "f" or not np.isfinite(found).all() or not found.size:
        raise InputError(path, "malformed", f"features that are no finite numbers; {_WRITTEN}")
    named = None if names is None or names == {0: ""} else names
    return torch.from_numpy(found.astype(np.float32)), named
