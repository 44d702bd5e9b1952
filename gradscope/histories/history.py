"""A recorded training run: what every reader returns and every analyzer reads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from gradscope.checkpoints.tensors import Failure

Kind = Literal["matrix", "conv", "bias", "norm", "embedding", "other"]
KINDS: tuple[Kind, ...] = ("matrix", "conv", "bias", "norm", "embedding", "other")

#: How the edges are known: from the recorder's walk, from the file's author, or not at all.
Topology = Literal["recorded", "given", "assumed-chain"]

Reals = NDArray[np.floating[Any]]
Integers = NDArray[np.integer[Any]]


class Status(IntEnum):
    """What a record says of one layer at one step. Absent is never zero."""

    NOT_RECORDED = 0
    RECORDED = 1
    #: ``.grad`` was None though the parameter requires a gradient.
    NONE = 2
    #: ``requires_grad`` was False.
    FROZEN = 3


@dataclass(frozen=True, slots=True)
class Layer:
    """One row of a history: a parameter, or a module when only modules were recorded."""

    name: str
    kind: Kind = "other"
    #: Number of elements; None when the file does not say.
    numel: int | None = None
    #: The module that owns the parameter; the row's own name when unknown.
    module: str = ""
    #: Row of the first layer that shares this one's storage, which alone is counted.
    tied_to: int | None = None
    #: Index of the optimizer's parameter group, a column of ``History.lr``.
    group: int | None = None
    #: Which of several optimizers has it; None when there is one, or it is in none.
    optimizer: int | None = None


@dataclass(frozen=True, eq=False, slots=True)
class Sketches:
    """Count-sketches of unit gradients, float [S, L, k], of the records ``index`` (int64 [S]).

    A row of zeros stands for a gradient that is zero, non-finite or absent.
    """

    values: Reals
    index: Integers

    @property
    def width(self) -> int:
        """Numbers a sketch has."""
        return int(self.values.shape[2])


@dataclass(frozen=True, eq=False, slots=True)
class Exact:
    """Cosine of each gradient to that of ``lag`` records before, float and int64 [T, L]."""

    cosine: Reals
    lag: Integers


@dataclass(frozen=True, eq=False, slots=True)
class History:
    """T records of L layers, validated by the reader that made it.

    Arrays are [T, L] unless said otherwise; NaN is an unknown value, and ``None`` a statistic that
    the file does not have. Layers are in execution order where it is known, else in file order.
    Norms are those of gradients as the optimizer would get them, before clipping, unless
    ``meta["stage"]`` says otherwise.
    """

    path: str
    format: str
    nbytes: int
    #: Optimizer steps, int64 [T], strictly increasing.
    steps: Integers
    layers: tuple[Layer, ...]
    #: Gradient L2 norms. Inf and NaN are data: the gradient had such elements.
    l2: Reals
    #: ``Status`` codes, uint8.
    status: Integers
    max_abs: Reals | None = None
    mean_abs: Reals | None = None
    mean: Reals | None = None
    zero_fraction: Reals | None = None
    #: Counts of NaN and Inf elements, int64; -1 unknown.
    n_nan: Integers | None = None
    n_inf: Integers | None = None
    sketches: Sketches | None = None
    exact: Exact | None = None
    param_l2: Reals | None = None
    #: Norms of the change that the step made to the parameters.
    update_l2: Reals | None = None
    #: Cosine of that change to the negative gradient.
    update_cosine: Reals | None = None
    #: [T] each.
    loss: Reals | None = None
    #: Of several optimizers the loss of each one's step [T, optimizers]; ``loss`` is then only that
    #: of records in which one backward pass served all.
    optimizer_loss: Reals | None = None
    total_l2: Reals | None = None
    clip_coefficient: Reals | None = None
    loss_scale: Reals | None = None
    #: Whether mixed precision skipped the step, uint8 [T].
    skipped: Integers | None = None
    #: Learning rates [T, groups].
    lr: Reals | None = None
    #: Mean square of micro-batch gradient norms, and how many there were [T].
    micro_mean_square: Reals | None = None
    micro_count: Integers | None = None
    #: Rows ``(u, v)``: the output of layer u reaches layer v; -1 the input, L the loss. [E, 2]
    edges: Integers | None = None
    topology: Topology = "assumed-chain"
    #: RMS of each edge's contribution to the gradient at its producer, [T, E].
    edge_flow: Reals | None = None
    #: Rows of ``unit_last_nonzero`` of each layer, int64 [L + 1], and the last step at which each
    #: output unit had a gradient (-1 never), int64 [units].
    unit_offset: Integers | None = None
    unit_last_nonzero: Integers | None = None
    #: ``optimizer``, ``stage``, ``precision``, ``reduction``, … as the file has them.
    meta: Mapping[str, Any] = field(default_factory=dict)
    #: What a person should know of the reading: what was sorted, dropped, assumed.
    notes: tuple[str, ...] = ()
    #: What could not be read, (subject, reason).
    skipped_parts: tuple[tuple[str, str], ...] = ()
    #: Parts that could not be read while the rest could: a truncated last shard.
    failures: tuple[Failure, ...] = ()
    #: Statistics that are not exact, e.g. ``{"l2": "from histogram bins"}``.
    approximate: Mapping[str, str] = field(default_factory=dict)

    @property
    def shape(self) -> tuple[int, int]:
        """(records, layers)."""
        return len(self.steps), len(self.layers)

    def _repr_html_(self) -> str:
        """What a notebook shows."""
        from gradscope.histories.notebook import history_html

        return history_html(self)
