"""Layers over a run: series, directions, and the run as a whole beside them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pydantic import ConfigDict

from gradscope.report.model import Number, Record

Basis = Literal["exact", "sketch", "norm"]
FlowDirection = Literal["forward", "backward", "oscillating", "stagnant", "indeterminate"]


@dataclass(frozen=True, slots=True)
class GradientDirection:
    """The direction of one gradient, and how it agrees with the record before.

    Like ``TemporalFlow`` no model: there is one for each cell, and a dataclass is made five times
    as fast.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    step: int
    #: The count-sketch of the unit gradient, for the records of the last window.
    direction_vector: tuple[float, ...] | None
    magnitude: Number | None
    #: Cosine to the gradient ``lag`` steps before, and its standard error (0 when exact).
    consistency_score: float | None
    standard_error: float | None
    lag: int | None


class LayerFlow(Record):
    """One layer over the whole run; medians are over the last window of records."""

    layer_name: str
    kind: str
    numel: int | None
    #: Steps of ``gradient_magnitudes``.
    steps: tuple[int, ...]
    gradient_magnitudes: tuple[Number | None, ...]
    gradient_directions: tuple[GradientDirection, ...] | None
    #: Mean cosine of the window's gradients to each other; by norms, exp(-spread of log changes).
    flow_consistency: float | None
    #: 0 to 1: how many of three decades the layer lies below both its neighbours.
    bottleneck_score: float | None
    #: Bits per step and dimension that gradients carry above noise; by norms, |change of log|.
    information_flow_rate: float | None
    basis: Basis
    rms: float | None
    #: Decades below (positive) or above the loss side's RMS gradient.
    deficit: float | None
    update_ratio: float | None
    zero_fraction: float | None
    flow_direction: FlowDirection
    stability_score: float | None
    #: Effective gradient noise scale in samples (McCandlish et al. 2018), by lagged products.
    noise_scale: float | None
    records: int
    missing: int

    @property
    def subject(self) -> str:
        """What findings about it name."""
        return self.layer_name


@dataclass(frozen=True, slots=True)
class TemporalFlow:
    """One layer at one record."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    step: int
    layer_name: str
    gradient_magnitude: Number | None
    flow_direction: FlowDirection
    stability_score: float | None


class Curves(Record):
    """The run as a whole, at the steps of the layers' series; None where nothing was recorded."""

    steps: tuple[int, ...]
    loss: tuple[Number | None, ...] | None
    total_norm: tuple[Number | None, ...] | None
    #: The greatest of the parameter groups.
    learning_rate: tuple[Number | None, ...] | None
