"""Where and when gradients vanish, explode or are dead, and how bad that is."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from gradscope.flow.facts import DeadFacts, ExplodingFacts, VanishingFacts
from gradscope.report.model import Number, Record

Level = Literal["none", "mild", "moderate", "severe", "critical"]
LEVELS: tuple[Level, ...] = ("none", "mild", "moderate", "severe", "critical")
Recovery = Literal["high", "medium", "low", "none"]


class Extent(Record):
    """Where and when."""

    start_layer: str
    end_layer: str
    layer_count: int
    affected_parameters: int | None
    #: From the first to the last record of the region.
    duration_steps: int
    records: int
    #: It began after the first and by the second of these steps; None: before the record began.
    onset: tuple[int | None, int]
    end: int
    ongoing: bool


class Peak(Record):
    """The worst value and where it was seen."""

    value: Number
    layer_name: str
    step: int


class Region(Record):
    """Adjacent layers over a stretch of time, for one cause."""

    region_id: str
    affected_layers: tuple[str, ...]
    severity_level: Level
    extent: Extent
    #: Which tests fired, of those documented with the analyzer.
    tests: tuple[str, ...]
    systemic: bool
    peak: Peak | None
    update_ratio: float | None
    cause: str
    mitigation_suggestions: tuple[str, ...]
    #: What the level was judged by; not part of the report.
    facts: tuple[VanishingFacts, ...] | tuple[ExplodingFacts, ...] = Field(
        default=(), exclude=True, repr=False
    )


class DeadZone(Record):
    """Adjacent layers that get no gradient for a while."""

    zone_id: str
    affected_layers: tuple[str, ...]
    #: The layer nearest the loss: what lies behind it can only inherit.
    origin: str
    #: Steps of the longest unbroken stretch.
    dead_duration: int
    recovery_potential: Recovery
    intervention_required: bool
    extent: Extent
    past_recoveries: int
    #: What recovery was judged by; not part of the report.
    facts: DeadFacts | None = Field(default=None, exclude=True, repr=False)


class ExplodingLayer(Record):
    """One layer of an exploding region."""

    layer_name: str
    #: The greatest finite norm, and the step it was seen at.
    gradient_norm: Number | None
    step: int | None
    severity: Level
    tests: tuple[str, ...]
    #: Greatest norm over the layer's median.
    ratio: float | None
    numel: int | None
    recommended_action: str


class Explosion(Record):
    """Exploding gradients over the whole history."""

    exploding_layers: tuple[ExplodingLayer, ...]
    max_gradient_norm: float | None
    max_layer: str | None
    max_step: int | None
    mean_gradient_norm: float | None
    std_gradient_norm: float | None
    median_gradient_norm: float | None
    mad_gradient_norm: float | None
    #: Share of the layers, and of the parameters.
    explosion_ratio: float | None
    parameter_ratio: float | None
    overall_severity: Level
    mitigation_recommendations: tuple[str, ...]


class Depth(Record):
    """How the RMS gradient changes in the backward pass."""

    #: Nats lost per layer (negative: gained), by Theil-Sen over the weights.
    nats_per_layer: float
    r_squared: float
    layers: int
    systemic: Literal["vanishing", "exploding"] | None
    #: Nothing is lost in one place: a line explains decades, however little a layer takes.
    gradual: bool = False
