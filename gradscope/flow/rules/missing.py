"""The rule about layers that never get a gradient, and experts that no longer do."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator

from gradscope.flow.records.events import Missing
from gradscope.flow.result import FlowResult, Need
from gradscope.flow.rules.say import place, several
from gradscope.report.rules import Observation, rule
from gradscope.report.severity import Severity
from gradscope.text import listed, plural

_UNUSED = (
    "the forward pass does not use these parameters or a detach() cuts them off; use them, or set "
    "requires_grad to False"
)
_CLEARED = (
    "not one layer has a gradient: they were most likely cleared before they were recorded; record "
    "after backward() and before zero_grad(), or inside the optimizer's step where that happens "
    "during the backward pass"
)


@rule("F110", "missing-gradient", Severity.MEDIUM, reads=FlowResult, needs=Need.NORMS)
def missing_gradient(result: FlowResult) -> Iterator[Observation]:
    """A layer that requires a gradient never gets one, or the file leaves out records of it.

    None at every record means that the forward pass does not use the parameter, or that a
    detach() cuts it off: it never learns; where no layer at all has one, that they were cleared
    before they were recorded. Experts that get none while others do are one finding,
    also where they had one before: their router has collapsed. Frozen layers, with their share of
    the parameters, and gaps in the records are info.
    """
    idle = idle_layers(result)
    for name, experts in _idle_experts(result).items():
        yield _idle(name, experts, result)
    unused = [m for m in result.missing if m.state == "unused" and m.layer_name not in idle]
    if unused:
        names = [m.layer_name for m in unused]
        yield Observation(
            place(names),
            f"no gradient at any of {plural(result.steps, 'record')} though one is "
            f"required: {several(names)}",
            _CLEARED if _none_at_all(result) else _UNUSED,
            {
                "layers": len(names),
                "records": result.steps,
                "parameters": sum(m.numel or 0 for m in unused),
            },
        )
    if frozen := [m for m in result.missing if m.state == "frozen"]:
        yield _frozen(result, frozen)
    dead = {name for zone in result.dead_zones for name in zone.affected_layers}
    told = idle | dead
    if partly := [m for m in result.missing if m.state == "partly" and m.layer_name not in told]:
        yield _gaps(result, partly)


def _none_at_all(result: FlowResult) -> bool:
    without = {m.layer_name for m in result.missing if m.state in ("unused", "frozen")}
    return without.issuperset(layer.layer_name for layer in result.layers)


def _frozen(result: FlowResult, frozen: list[Missing]) -> Observation:
    names = [m.layer_name for m in frozen]
    total = sum(layer.numel or 0 for layer in result.layers)
    share = sum(m.numel or 0 for m in frozen) / total if total else len(names) / len(result.layers)
    return Observation(
        place(names),
        f"{plural(len(names), 'layer')} with {share:.0%} of the parameters "
        f"{'is' if len(names) == 1 else 'are'} frozen: {several(names)}",
        "nothing if that is meant; else set requires_grad before the optimizer is made",
        {"layers": len(names), "share_of_parameters": share},
        severity=Severity.INFO,
    )


#: A layer of one expert of several: what they belong to, and which one it is.
_EXPERT = re.compile(r"^(.*?experts?)[._/]?(\d+)(?=[._/]|$)", re.IGNORECASE)


def _idle_experts(result: FlowResult) -> dict[str, list[int]]:
    """Experts without any gradient at the end, by what they belong to, where others have one."""
    silent = {m.layer_name for m in result.missing if m.state == "unused"}
    silent |= {
        name for zone in result.dead_zones if zone.extent.ongoing for name in zone.affected_layers
    }
    layers: dict[tuple[str, int], list[str]] = defaultdict(list)
    for layer in result.layers:
        if match := _EXPERT.match(layer.layer_name):
            layers[match[1], int(match[2])].append(layer.layer_name)
    idle: dict[str, list[int]] = defaultdict(list)
    for (name, index), parts in layers.items():
        if silent.issuperset(parts):
            idle[name].append(index)
    return {
        name: found
        for name, found in idle.items()
        if len(found) < sum(parent == name for parent, _ in layers)
    }


def idle_layers(result: FlowResult) -> frozenset[str]:
    """The layers of experts that get no gradient while others do."""
    idle = _idle_experts(result)
    matches = ((layer.layer_name, _EXPERT.match(layer.layer_name)) for layer in result.layers)
    return frozenset(name for name, m in matches if m and int(m[2]) in idle.get(m[1], ()))


def _idle(name: str, experts: list[int], result: FlowResult) -> Observation:
    matches = (_EXPERT.match(layer.layer_name) for layer in result.layers)
    total = len({match[2] for match in matches if match and match[1] == name})
    return Observation(
        name,
        f"{len(experts)} of {total} experts get no gradient at the end: "
        f"{listed([f'{name}.{i}' for i in experts], len(experts), 8)}",
        "the router does not choose them: add a load-balancing loss or noise to the router, and "
        "look at how many tokens each expert gets",
        {"idle_experts": len(experts), "experts": total},
    )


def _gaps(result: FlowResult, partly: list[Missing]) -> Observation:
    names = [m.layer_name for m in partly]
    most = max(partly, key=lambda m: m.records)
    return Observation(
        place(names),
        f"{plural(len(names), 'layer')} without a gradient at some records, most {most.layer_name} "
        f"({most.records} of {result.steps})",
        "expected of layers frozen for a while, unfrozen late, or used by some batches only",
        {"layers": len(names), "records": most.records},
        severity=Severity.INFO,
    )
