"""The rule about numbered series: layers and experts that are not there, or not whole."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise

from gradscope.report.model import Severity
from gradscope.report.rules import Observation, Unknown, rule
from gradscope.text import escaped, listed, plural
from gradscope.weights.adapter_config import adapter_configs
from gradscope.weights.configuration import configuration
from gradscope.weights.experts import missing_experts
from gradscope.weights.names import series
from gradscope.weights.promises import promised_layers
from gradscope.weights.result import Examined, Need
from gradscope.weights.roles import TRAINING
from gradscope.weights.rules.tensors import is_whole
from gradscope.weights.unequal import lost_modules


@rule("C006", "missing-layer", Severity.HIGH, reads=Examined, needs=Need.HEADERS)
def missing_layer(
    examined: Examined, *, least_members: int = 4, least_contiguous: float = 0.75
) -> Iterator[Observation | Unknown]:
    """A numbered series of equal layers or experts has a gap, or ends before it should.

    Layers: before config.json says, of the language model, the encoder, the decoder or the vision
    part. Experts, of which at least half are there: before the rows of their router do, and each
    must have the matrices that most have. A layer between the first and the last that alone lacks a
    module (not a whole block, which hybrid models leave out) is incomplete.

    Judged only of series called layers, blocks or h whose members have the same four or more
    tensors each and most of whose neighbours are present, so the numbering of nn.Sequential (where
    activations take numbers but hold no tensors) is left alone, and so are numbers between layers
    of two kinds, and adapters whose layers were chosen.
    """
    configs = adapter_configs(examined.checkpoint) if examined.adapted else ()
    if any(config.chooses_layers for config in configs):
        return
    found = series(t.name for t in examined.tensors if t.role not in TRAINING)
    config = examined.document("config")
    looped = bool(configuration(examined).others(r"recurren|loop|repeat"))  # layers that run again
    for stack, members in found.items():
        numbers = sorted(members)
        if len(numbers) < least_members or not _uniform(members):
            continue
        steps = [b - a for a, b in pairwise(numbers)]
        if sum(step == 1 for step in steps) < least_contiguous * len(steps):
            continue
        promised = 0 if looped else promised_layers(config, stack, found)
        start = 0 if numbers[-1] < promised else numbers[0]  # some series count from 1
        end = max(numbers[-1] + 1, promised)
        lost = sorted(set(range(start, end)) - set(numbers))
        if missing := [n for n in lost if not _between_kinds(n, members)]:
            yield _missing(stack, missing, len(numbers), end - start)
    for path, absent, present, expected_experts in missing_experts(examined):
        yield _missing(path, absent, present, expected_experts, "expert")
    if is_whole(examined) and not examined.adapted:
        yield from _incomplete(examined)


def _missing(
    stack: str, missing: Sequence[int], present: int, expected: int, what: str = "layer"
) -> Observation:
    return Observation(
        f"{stack}.{missing[0]}",
        f"{what} {listed(missing, len(missing), 8)} of {escaped(stack)} is missing: "
        f"{present} of {plural(expected, what)} found",
        "find the file or the conversion step that lost it; a non-strict loader initialises the "
        f"{what} at random",
        {
            f"missing_{what}s": len(missing),
            f"present_{what}s": present,
            "first_missing": missing[0],
        },
    )


def _uniform(members: Mapping[int, frozenset[str]]) -> bool:
    """Whether most members hold the same tensors, at least four each."""
    ((commonest, count),) = Counter(members.values()).most_common(1)
    return len(commonest) >= 4 and count >= 0.5 * len(members)


def _between_kinds(number: int, members: Mapping[int, frozenset[str]]) -> bool:
    """Whether layers of one kind end here and those of another begin: what lies between, as a
    change of layout, may hold nothing.
    """
    before = {held for n, held in members.items() if n < number}
    after = {held for n, held in members.items() if n > number}
    return bool(before and after) and before.isdisjoint(after)


def _incomplete(examined: Examined) -> Iterator[Observation]:
    for lost in lost_modules(examined.tensors):
        yield Observation(
            lost.subject,
            f"{escaped(lost.module)} is missing in layer {lost.number} of {escaped(lost.stack)}; "
            f"the other {lost.layers - 1} layers have one",
            "find the file or the conversion step that lost it; a non-strict loader initialises "
            "it at random",
            {"missing_modules": 1, "layers": lost.layers},
        )
