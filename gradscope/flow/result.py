"""The ``result`` of ``gradscope flow`` (contract: the seeds' field names), and what rules read.

Magnitudes are L2 norms in the units of the loss over those of the parameters. ``basis`` says what
a number rests on: "exact" gradients, "sketch" (unbiased estimates from count-sketches) or "norm"
(norms alone). None is undefined or unknown, never zero.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import ClassVar, Literal

from pydantic import ConfigDict, Field

from gradscope.flow.facts import DeadFacts, ExplodingFacts, VanishingFacts
from gradscope.report.model import Number, Record, Report
from gradscope.report.severity import Severity

#: As ``History.topology``; spelled out, because listing rules must not import NumPy.
Topology = Literal["recorded", "given", "assumed-chain"]
Basis = Literal["exact", "sketch", "norm"]
Level = Literal["none", "mild", "moderate", "severe", "critical"]
LEVELS: tuple[Level, ...] = ("none", "mild", "moderate", "severe", "critical")
FlowDirection = Literal["forward", "backward", "oscillating", "stagnant", "indeterminate"]
NodeType = Literal["source", "sink", "bottleneck", "amplifier", "normal"]
Condition = Literal["bottleneck", "amplifier", "normal"]
EdgeType = Literal["strong", "weak", "intermittent", "blocked", "unknown"]
Standstill = Literal["update", "schedule", "starved", "rounded", "epsilon", "repeats"]
Absence = Literal["unused", "frozen", "not-recorded", "partly"]
Recovery = Literal["high", "medium", "low", "none"]


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


class FlowNode(Record):
    """One layer as a node; ``role`` and ``condition`` are what ``node_type`` chooses between."""

    layer_name: str
    node_type: NodeType
    role: Literal["source", "sink", "interior", "isolated"]
    condition: Condition
    #: Median RMS gradient over the window.
    gradient_strength: float | None
    #: Edges in and out.
    connectivity: int | None
    #: Share of all parameters whose gradient must pass here; None on an assumed chain.
    influence_score: float | None
    depth: int | None


class FlowEdge(Record):
    """An edge in the direction of the forward pass; flow is relative to the median edge."""

    from_layer: str
    to_layer: str
    flow_strength: float | None
    flow_consistency: float | None
    edge_type: EdgeType
    basis: Literal["recorded", "proxy"]


class NetworkMetrics(Record):
    """The network as a whole."""

    #: Geometric mean over entries of the widest path's width over the width at the loss, 0 to 1.
    overall_flow_efficiency: float | None
    #: Share of the parameters reached from the loss over edges that are not blocked.
    network_connectivity: float | None
    bottleneck_density: float | None
    #: Median consistency of the edges.
    flow_stability: float | None
    #: Factor by which the RMS gradient changes per layer away from the loss.
    information_propagation_speed: float | None


class FlowNetwork(Record):
    """Layers and the edges between them."""

    nodes: tuple[FlowNode, ...]
    edges: tuple[FlowEdge, ...]
    metrics: NetworkMetrics


class CriticalPath(Record):
    """The widest way of the gradient from the loss to one entry layer."""

    path_id: str
    #: From the loss to the entry.
    layers: tuple[str, ...]
    path_length: int
    #: Natural logarithm of the entry's over the loss side's RMS gradient.
    total_flow_strength: float | None
    bottleneck_layers: tuple[str, ...]
    weakest_link: tuple[str, str] | None
    #: 1: no other route; 0: another is as wide. None on an assumed chain.
    criticality_score: float | None
    #: Decades between the weakest link and the median one.
    optimization_potential: float | None
    #: Other routes around the weakest link, and their width over this one's.
    alternatives: tuple[tuple[tuple[str, ...], float], ...] = ()


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


class Spike(Record):
    """A jump that most affected layers share and that is over soon."""

    step: int
    layer_name: str
    layers: int
    #: Norm over the median of the records before, and its modified z.
    ratio: float
    z: float
    left_a_trace: bool
    #: The records after it are as high: what began is no spike.
    stayed: bool = False


class NonFinite(Record):
    """Gradients with NaN or Inf elements."""

    step: int
    #: The layer nearest the loss among the first to turn; None when the loss did before.
    origin: str | None
    inherited_by: tuple[str, ...]
    loss_nonfinite: bool
    records: int
    #: The last finite record before.
    last_finite_step: int | None
    #: The last finite total norm over its level after warm-up, where it had grown fourfold, and
    #: between which steps it left that level: what diverges grows before it overflows.
    growth_before: float | None
    growing_since: tuple[int, int] | None


class Depth(Record):
    """How the RMS gradient changes in the backward pass."""

    #: Nats lost per layer (negative: gained), by Theil-Sen over the weights.
    nats_per_layer: float
    r_squared: float
    layers: int
    systemic: Literal["vanishing", "exploding"] | None
    #: Nothing is lost in one place: a line explains decades, however little a layer takes.
    gradual: bool = False


class LearningRateAdvice(Record):
    """What the growth of oscillating gradients says about the learning rate."""

    #: Divide by this; None when only "lower it" can be said.
    divide_by: float | None
    current: float | None
    suggested: float | None
    growth_per_step: float
    cosine: float
    why: str


class Oscillation(Record):
    """Windows in which successive gradients oppose each other."""

    layers: tuple[str, ...]
    share_of_layers: float
    cosine: float | None
    growth_per_step: float | None
    onset: tuple[int | None, int]
    ongoing: bool
    basis: Basis


class Stagnation(Record):
    """A network that no longer moves."""

    onset: tuple[int | None, int]
    update_ratio: float | None
    reason: Standstill
    converged: bool
    #: The greatest median update ratio of its records, where they tell; not part of the report.
    fastest: float | None = Field(default=None, exclude=True, repr=False)


class UpdateRatio(Record):
    """A layer whose steps are large against its weights."""

    layer_name: str
    median: float
    peak: float
    step: int
    numel: int | None


class Leap(Record):
    """The step that changed the median layer most, against its weights."""

    ratio: float
    step: int
    #: Among the records at the start that nothing is compared with.
    first: bool


class Missing(Record):
    """A layer without gradients."""

    layer_name: str
    state: Absence
    records: int
    numel: int | None


class Convergence(Record):
    """The whole network's gradients fell together."""

    decades: float
    loss_fell: bool | None


Precursed = Literal["updates", "gradients", "loss"]


class Precursor(Record):
    """Something that rose out of its range before or as a loss did."""

    what: Precursed
    #: After the first and by the second of these steps.
    onset: tuple[int, int]


class Divergence(Record):
    """A loss that left its best level upwards."""

    #: After the first and by the second of these steps; None: from the first record on.
    onset: tuple[int | None, int]
    #: Medians of windows: the best one before, and the last one.
    before: float
    after: float
    peak: float
    peak_step: int
    ends: Literal["higher", "returned", "non-finite"]
    #: It had fallen before it rose; it ends below where it began.
    fell: bool
    progressed: bool
    #: Nine tenths of the rise are undone, and it still falls at the end.
    recovers: bool = False
    #: It rose at one record, before which steps were no larger and weights moved no further than
    #: usual: what the weights are asked is another thing.
    at_once: bool = False
    #: By which factor learning rate and total gradient norm changed there.
    learning_rate_factor: float | None
    gradient_factor: float | None
    #: The greatest median update ratio around the onset.
    update_ratio: float | None
    #: Median cosine of the steps from then on to the negative gradient.
    descent: float | None
    #: What rose out of its range on the way, in the order in which it did.
    precursors: tuple[Precursor, ...] = ()


class Unoptimized(Record):
    """Layers with a gradient of which no optimizer holds all parameters."""

    layers: tuple[str, ...]
    #: The same, by parameter where an optimizer holds the layer's others.
    named: tuple[str, ...]
    parameters: int | None
    #: Of all parameters.
    share: float


class Damping(Record):
    """Layers whose steps an adaptive optimizer's epsilon halves or worse at the end."""

    epsilon: float
    layers: tuple[str, ...]
    #: Of all parameters.
    share: float
    #: What the median layer has left of its full step.
    left: float | None
    #: Gradients were clipped, which is counted in.
    clipped: bool


class Clipping(Record):
    """How many steps were clipped."""

    share: float
    #: Median coefficient of those, where recorded.
    median: float | None
    #: The norm that the total is pinned at, where it is told by that.
    limit: float | None
    #: Steps are as long as gradients, so shorter gradients are shorter steps: SGD.
    proportional: bool = False


class Accumulation(Record):
    """How gradients add up from step to step, over the first records."""

    cosine: float
    #: Norm over the first one; norm of what each step adds over the first; and the power of the
    #: norm that this grows with.
    growth: float
    added: float
    added_growth: float | None
    #: The second norm over the first, at the very beginning of the run.
    doubled: float | None


class Captures(Record):
    """How often a recorder was called, and how many steps of an optimizer followed."""

    calls: int
    steps: int
    #: Share of the records whose step mixed precision skipped.
    skipped: float = 0.0


class Curves(Record):
    """The run as a whole, at the steps of the layers' series; None where nothing was recorded."""

    steps: tuple[int, ...]
    loss: tuple[Number | None, ...] | None
    total_norm: tuple[Number | None, ...] | None
    #: The greatest of the parameter groups.
    learning_rate: tuple[Number | None, ...] | None


class LossLevel(Record):
    """What the loss did; levels are medians of windows."""

    first: float
    last: float
    #: The value that the last eight losses or more repeat to the bit, from which step on, and
    #: whether the loss came down to it instead of being it all at once.
    constant: float | None
    constant_since: int | None = None
    reached: bool = False
    #: Between which steps it became NaN or infinite, to the end.
    lost: tuple[int, int] | None
    divergence: Divergence | None


class Pair(Record):
    """A number of this run and of the other one."""

    here: float | None
    there: float | None


class LayerAgainst(Record):
    """One layer of both runs; positive is larger here."""

    layer_name: str
    #: Decades between the median RMS gradients of the last windows, and their joint spread.
    level: float | None
    spread: float | None
    #: Decades between the median update ratios.
    update: float | None
    #: The level differs by three spreads, and by a factor of two.
    differs: bool


class OnsetAgainst(Record):
    """Between which steps a kind of trouble first began in either run; None: it did not."""

    kind: Literal["vanishing", "exploding", "diverging"]
    here: tuple[int | None, int] | None
    there: tuple[int | None, int] | None


class FindingAgainst(Record):
    """A finding that one run has and the other has not, or has with another severity."""

    rule: str
    name: str
    subject: str
    here: Severity | None
    there: Severity | None


class Against(Record):
    """How this run differs from another one, over the steps that both have."""

    input: str
    first_step: int | None
    last_step: int | None
    layers: tuple[LayerAgainst, ...]
    only_here: tuple[str, ...]
    only_there: tuple[str, ...]
    efficiency: Pair
    #: The level of the loss at the last of these steps.
    loss: Pair
    onsets: tuple[OnsetAgainst, ...]
    findings: tuple[FindingAgainst, ...]


class Need(StrEnum):
    """The kinds of facts that a rule about a history can need."""

    NORMS = "norms"
    RECORDS = "8 records of gradients"
    COMPARABLE = "comparable layers"
    DIRECTIONS = "directions"
    UPDATES = "update norms"
    LOSS = "8 losses"
    GROUPS = "parameter groups"
    TOPOLOGY = "a recorded topology"
    ZEROS = "zero fractions"


class FlowResult(Record):
    """The result of one run."""

    command: ClassVar[str] = "flow"
    Needs: ClassVar[type[StrEnum]] = Need

    layers: tuple[LayerFlow, ...]
    temporal: tuple[TemporalFlow, ...]
    network: FlowNetwork
    critical_paths: tuple[CriticalPath, ...]
    vanishing_regions: tuple[Region, ...]
    exploding_regions: tuple[Region, ...]
    dead_zones: tuple[DeadZone, ...]
    explosion: Explosion
    topology: Topology
    steps: int
    first_step: int | None
    last_step: int | None
    spikes: tuple[Spike, ...] = ()
    skipped_steps: int = 0
    nonfinite: tuple[NonFinite, ...] = ()
    depth: Depth | None = None
    oscillation: tuple[Oscillation, ...] = ()
    stagnation: Stagnation | None = None
    learning_rate: LearningRateAdvice | None = None
    update_ratios: tuple[UpdateRatio, ...] = ()
    leap: Leap | None = None
    missing: tuple[Missing, ...] = ()
    loss: LossLevel | None = None
    unoptimized: Unoptimized | None = None
    damping: Damping | None = None
    clipping: Clipping | None = None
    accumulation: Accumulation | None = None
    captures: Captures | None = None
    convergence: Convergence | None = None
    curves: Curves | None = None
    #: What differs from another run, where one was given.
    against: Against | None = None
    #: Kinds of facts the history has: what a rule may need.
    measured: tuple[Need, ...] = ()
    #: (layer, record) rows that the series leave out: all but the most recent ones.
    rows_omitted: int = 0
    notes: tuple[str, ...] = ()

    @property
    def regions(self) -> tuple[Region, ...]:
        """Where gradients explode or vanish."""
        return (*self.exploding_regions, *self.vanishing_regions)


FlowReport = Report[FlowResult]
