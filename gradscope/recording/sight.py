"""What has been seen of a model's graph while it trained."""

from __future__ import annotations

from typing import Any

import torch

from gradscope.recording.modules import inner, modules_of
from gradscope.recording.topology import Topology, compiled_topology, merged, topology


class Sight:
    """The way a model's modules feed each other, from ``graphs`` of its outputs or losses.

    Several optimizers may have several losses, each of which shows a part.
    """

    def __init__(self, model: torch.nn.Module, graphs: int) -> None:
        self._model, self._unseen = model, graphs
        #: None while it is unknown.
        self.topology: Topology | None = None
        #: Whether there is nothing more to be seen.
        self.complete = False

    def look(self, output: Any) -> None:
        """See what an output or a loss was computed by."""
        self._unseen -= 1
        self.complete = self._unseen <= 0
        owner = {id(p): module for _, module, p in modules_of(inner(self._model))}
        self.topology = merged(self.topology, topology(output, owner))

    def look_through(self, output: Any, inputs: Any, named: Any) -> None:
        """See what an output was computed by; a compiled model, from what it was computed of."""
        self.look(output)
        if self.topology is None:
            self.topology = compiled_topology(inner(self._model), output, inputs, named)
