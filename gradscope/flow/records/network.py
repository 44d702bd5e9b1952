"""The layers as a network: nodes, edges, and the ways of the gradient through it."""

from __future__ import annotations

from typing import Literal

from gradscope.report.model import Record

#: As ``History.topology``; spelled out, because listing rules must not import NumPy.
Topology = Literal["recorded", "given", "assumed-chain"]
NodeType = Literal["source", "sink", "bottleneck", "amplifier", "normal"]
Condition = Literal["bottleneck", "amplifier", "normal"]
EdgeType = Literal["strong", "weak", "intermittent", "blocked", "unknown"]


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
