"""What is measured of a region or a zone, before anything is made of it.

Measurements fill these in, ``judgement`` reads them. A value that is *held* is one that a single
layer reaches at three records or more of the region (at all of them when it is shorter).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, Literal, TypeVar

if TYPE_CHECKING:
    from gradscope.flow.records.regions import Extent, Peak

#: What became of a layer's weights: zero since the first record, shrunk to next to nothing, or not.
Weights = Literal["zero", "shrunk", "kept"]

F = TypeVar("F")


@dataclass(frozen=True, slots=True)
class VanishingFacts:
    """One layer's part in a region of vanishing gradients."""

    tests: tuple[str, ...]
    #: The tests that one layer fails for as long as a value has to be held.
    held_tests: tuple[str, ...]
    #: The whole stack loses its gradient, by ``nats_per_layer``.
    systemic: bool
    nats_per_layer: float | None
    #: What depth takes is lost little by little, not in one place.
    gradual: bool
    #: Decades lost by depth or time, held; minus infinity when they are not.
    decades: float
    #: Share of its full step that epsilon leaves, held where the update test fires, and the median.
    attenuation_held: float
    attenuation: float | None
    #: Median norm of a step's change over that of the weights.
    update_ratio: float | None
    #: Epsilon of an Adam-like optimizer.
    epsilon: float | None
    only_biases: bool
    weights: Weights = "kept"
    #: Median share of elements without any gradient; None where it was not recorded.
    zeros: float | None = None


@dataclass(frozen=True, slots=True)
class ExplodingFacts:
    """One layer's part in a region of exploding gradients."""

    tests: tuple[str, ...]
    held_tests: tuple[str, ...]
    systemic: bool
    nats_per_layer: float | None
    #: Held where the test fires, else minus infinity: norm over the layer's own level, nats above
    #: the loss side's RMS, norm of the step over that of the weights.
    own_ratio: float
    depth_nats: float
    update_ratio: float
    #: The fastest growth of ln RMS per step of any of its layers.
    growth: float | None
    #: Whether the loss lies above that of the records before; None when unknown.
    loss_rises: bool | None
    #: 90th percentile of the total norm over the calmer half of the run.
    usual_norm: float
    #: By which factor the learning rate was raised where it began; None where unknown.
    rate_factor: float | None = None


@dataclass(frozen=True, slots=True)
class DeadFacts:
    """A zone without gradient."""

    #: Steps of the longest stretch.
    duration: int
    #: Records that the longest stretch at the end of the history has lasted; None: all are over.
    age: int | None
    #: Lengths in records of earlier dead stretches of these layers that ended.
    ended: tuple[int, ...]
    #: Some elements still have a gradient at the last record.
    partly_alive: bool
    #: Gradients of these layers were not finite before.
    was_nonfinite: bool
    #: At the end every layer of the network is dead.
    everything: bool
    #: Half-precision gradients that had come near the smallest numbers of their type.
    underflowed: bool
    only_biases: bool
    #: The worst of its layers.
    weights: Weights = "kept"
    #: The loss has come down to its least value, where nothing is left to learn.
    learnt: bool = False


@dataclass(frozen=True, slots=True)
class Candidate(Generic[F]):
    """A region as it was measured: adjacent layers over a stretch of time.

    ``facts`` has those of each layer's stretch (of the zone as a whole, where it is dead): what one
    layer does proves nothing about its neighbour.
    """

    region_id: str
    affected_layers: tuple[str, ...]
    extent: Extent
    peak: Peak | None
    update_ratio: float | None
    facts: tuple[F, ...]
