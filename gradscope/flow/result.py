"""The ``result`` of ``gradscope flow`` (contract: the seeds' field names), and what rules read.

Magnitudes are L2 norms in the units of the loss over those of the parameters. ``basis`` says what
a number rests on: "exact" gradients, "sketch" (unbiased estimates from count-sketches) or "norm"
(norms alone). None is undefined or unknown, never zero.
"""

from __future__ import annotations

from enum import StrEnum
from typing import ClassVar

from gradscope.flow.records.against import Against
from gradscope.flow.records.events import Missing, NonFinite, Spike
from gradscope.flow.records.layers import Curves, LayerFlow, TemporalFlow
from gradscope.flow.records.loss import LossLevel
from gradscope.flow.records.network import CriticalPath, FlowNetwork, Topology
from gradscope.flow.records.optimizer import Accumulation, Captures, Clipping, Damping, Unoptimized
from gradscope.flow.records.regions import DeadZone, Depth, Explosion, Region
from gradscope.flow.records.steps import (
    Convergence,
    Leap,
    LearningRateAdvice,
    Oscillation,
    Overwritten,
    Stagnation,
    UpdateRatio,
)
from gradscope.report.model import Record, Report


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
    overwritten: Overwritten | None = None
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
