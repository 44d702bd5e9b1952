"""Measurements made for tests: a tensor that is ordinary but for what a test says of it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from gradscope.statistics.records import Numerics, Statistics, Units
from gradscope.weights.result import OutlierResult, TensorResult
from gradscope.weights.roles import Role

Fields = Mapping[str, Any]


def tensor(
    *,
    name: str = "a.weight",
    role: Role = Role.LINEAR,
    shape: tuple[int, ...] = (40, 100),
    dtype: str = "F32",
    statistics: Fields | None = None,
    units: Fields | None = None,
    outliers: Fields | None = None,
    numerics: Fields | None = None,
    **fields: Any,
) -> TensorResult:
    """A tensor of ordinary measurements but for those that are given."""
    many = math.prod(shape)
    rows = shape[0] if shape else 1
    plain = {"count": many, "min": -1.0, "max": 1.0, "abs_max": 1.0, "zero_fraction": 0.0}
    even = {"rows": rows, "dead_rows": 0, "dead": (), "duplicate_rows": 0, "duplicates": ()}
    norms = {"norm_min": 1.0, "norm_median": 1.0, "norm_max": 1.0, "reference": 1.0}
    found = {"counts": {"10": 0}, "peak_ratio": 1.0, "scale": 1.0, "top": ()}
    fits = {"headroom_bits": 9.0, "saturated_fraction": 0.0, "payload": None, "distinct": None}
    return TensorResult(
        name=name,
        input="model.safetensors",
        file="model.safetensors",
        dtype=dtype,
        shape=shape,
        numel=many,
        role=role,
        statistics=Statistics(**{**plain, **(statistics or {})}),
        units=Units(**{**even, **norms, **(units or {})}),
        outliers=OutlierResult(**{**found, **(outliers or {})}),
        numerics=Numerics(**{**fits, **(numerics or {})}),
        **fields,
    )
