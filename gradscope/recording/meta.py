"""What a shard says of the run that it is a part of."""

from __future__ import annotations

import time
import uuid
from datetime import UTC, datetime
from typing import Any

import torch

from gradscope.histories.sketching import WIDTH
from gradscope.recording.measure import MOST_SKETCHED
from gradscope.recording.optimizers import Optimizers
from gradscope.recording.topology import Topology
from gradscope.recording.turns import Turns


def facts(run_id: str | None, batch_size: float | None, accumulation: int | None) -> dict[str, Any]:
    """What is the same in every shard of a run that begins now."""
    return {
        "run_id": run_id or uuid.uuid4().hex[:12],
        "started": datetime.now(UTC).isoformat(),
        **({} if batch_size is None else {"batch_size": float(batch_size)}),
        **({} if accumulation is None else {"accumulation": int(accumulation)}),
    }


def meta(
    stage: str, dtype: torch.dtype, order: Topology | None, optimizers: Optimizers, turns: Turns
) -> dict[str, Any]:
    """What is known of a run so far."""
    return {
        "writer": "gradscope",
        "torch": torch.__version__,
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "stage": stage,
        "reduction": "global",
        "rank": rank(),
        "sketch": {"k": WIDTH, "hash": "murmur3 finaliser", "most": MOST_SKETCHED,
                   "subset": "without replacement"},
        **optimizers.described(),
        "precision": dict.fromkeys(("grad", "param"), str(dtype).removeprefix("torch.")),
        "topology": {"source": "assumed-chain" if order is None else "recorded"},
        **({"captures": turns.captures, "optimizer_steps": turns.steps} if len(optimizers) else {}),
    }  # fmt: skip


def rank() -> int:
    """This process's among those that train together."""
    available = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_rank() if available else 0
