"""The rule about experts: dead, copied, or never chosen."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence

from gradscope.report.rules import Observation, rule
from gradscope.report.severity import Severity
from gradscope.text import escaped, listed, runs
from gradscope.weights.experts import Copy, Experts
from gradscope.weights.names import pattern
from gradscope.weights.result import Examined, Need
from gradscope.weights.rules.tensors import LOST


@rule("W119", "dead-expert", Severity.HIGH, reads=Examined, needs=Need.STATISTICS)
def dead_expert(examined: Examined) -> Iterator[Observation]:
    """An expert of a mixture is dead, the copy of another, or never chosen by its router.

    Dead: one of its matrices is zero, or has less than a thousandth of the norm of its kind in the
    other experts. Copies (medium): equal bit for bit to another expert of the layer, or to single
    ones of an earlier layer; all experts of a layer equal, as they are before the training of a
    mixture that started from a dense model, is one finding for all such layers. Never chosen on
    its own (medium; high where more than 30 % are): its row of the router is zero or repeats
    another's. An expert is judged alike
    whether it is stored alone, stacked or quantised; all-zero, duplicate-tensors, dead-units and
    duplicate-units leave it to this rule.
    """
    yield from _dead(examined)
    yield from _copied(examined)
    yield from _never_chosen(examined)


def _dead(examined: Examined) -> Iterator[Observation]:
    for experts in examined.experts.series:
        lost = examined.experts.dead.get(experts.path, {})
        if not lost:
            continue
        numbers = list(lost)
        kinds = dict.fromkeys(kind for found in lost.values() for kind in found)
        few = len(numbers) == 1
        yield Observation(
            experts.path,
            f"{_of(experts, numbers)} {'is' if few else 'are'} dead: nothing but zeros, or next to "
            f"nothing, in {listed(map(escaped, kinds), len(kinds))}",
            "restore it from the source of the checkpoint, or prune it and its row of the router"
            if few
            else "restore them from the source of the checkpoint, or prune them and their rows of "
            "the router",
            {
                "dead_experts": len(numbers),
                "present_experts": len(experts.numbers),
                "experts": ", ".join(map(str, numbers)),
                "affected_fraction": len(numbers) / len(experts.numbers),
            },
        )


def _of(experts: Experts, numbers: Sequence[int]) -> str:
    """``expert 3 of 8``, ``experts 3 and 5 of 8``, ``all 8 experts``, with their layer."""
    total = len(experts.numbers)
    where = f"in {escaped(experts.path)}"
    if len(numbers) == total:
        return f"all {total} experts {where}" if total > 1 else f"the one expert {where}"
    if len(numbers) == 2:
        return f"experts {numbers[0]} and {numbers[1]} of {total} {where}"
    word = "expert" if len(numbers) == 1 else "experts"
    return f"{word} {runs(numbers, len(numbers))} of {total} {where}"


# -- copies ---------------------------------------------------------------------------------------


def _copied(examined: Examined) -> Iterator[Observation]:
    by_layer: dict[str, list[Copy]] = defaultdict(list)
    for copy in examined.experts.copies:
        by_layer[copy.path].append(copy)
    alike = []
    for experts in examined.experts.series:
        copies = by_layer.get(experts.path, [])
        if _all_equal(experts, copies):
            alike.append(experts)
        elif copies:
            yield _copies(experts, copies)
    if alike:
        yield _alike(examined, alike)


def _all_equal(experts: Experts, copies: Sequence[Copy]) -> bool:
    """Whether all experts are one and the same, in every kind of matrix."""
    everything = len(experts.kinds)
    whole = [c for c in copies if len(c.kinds) == everything and c.original_path == experts.path]
    return len(whole) == len(experts.numbers) - 1 > 0 and len({c.original for c in whole}) == 1


def _copies(experts: Experts, copies: Sequence[Copy]) -> Observation:
    first = copies[0]
    place = "" if first.original_path == experts.path else f" of {escaped(first.original_path)}"
    kinds = "" if len(first.kinds) == len(experts.kinds) else f" in {listed(first.kinds, 3)}"
    more = len(copies) - 1
    numbers = sorted({c.number for c in copies})
    return Observation(
        f"{experts.path}.{first.number}",
        f"expert {first.number} of {escaped(experts.path)} equals expert {first.original}{place}"
        f"{kinds}" + (f", and {more} more of its experts equal others" if more else ""),
        "compare with the source of the checkpoint; restore the expert, or retrain it with its "
        "router",
        {
            "copied_experts": len(numbers),
            "present_experts": len(experts.numbers),
            "experts": ", ".join(map(str, numbers)),
            "original": first.original,
            "affected_fraction": len(numbers) / len(experts.numbers),
        },
        severity=Severity.MEDIUM,
    )


def _alike(examined: Examined, alike: Sequence[Experts]) -> Observation:
    layers, total = len(alike), len(examined.experts.series)
    first = alike[0]
    return Observation(
        first.path if layers == 1 else pattern(first.path),
        f"all {len(first.numbers)} experts of {escaped(first.path)} are equal"
        + (f", and so in {layers} of {total} layers with experts" if layers > 1 else ""),
        "expected before a mixture that starts from a dense model is trained; otherwise restore "
        "the experts from the source of the checkpoint: as it is, the mixture computes what one "
        "expert would",
        {
            "layers": layers,
            "present_experts": len(first.numbers),
            "experts": ", ".join(map(str, first.numbers)),
            "affected_fraction": 1.0,
        },
        severity=Severity.MEDIUM,
    )


# -- routers --------------------------------------------------------------------------------------


def _never_chosen(examined: Examined) -> Iterator[Observation]:
    """Rows of routers, those of experts that are dead or copies themselves aside."""
    judged = examined.experts
    seen: set[str] = set()
    for experts in judged.series:
        router = experts.router
        if router is None or router.name in seen or router.units is None:
            continue
        seen.add(router.name)
        units, s = router.units, router.statistics
        if units.rows not in router.shape or s is None or s.zero_count == s.count:
            continue
        zero = [n for n in units.dead if n not in judged.dead.get(experts.path, {})]
        twins = [
            (a, b) for a, b in units.duplicates if not judged.covers(f"{experts.path}.{b}.w", b)
        ]
        if zero or twins:
            unlisted = units.dead_rows - len(units.dead)
            yield _unrouted(experts, router.name, zero, len(zero) + unlisted, twins)


def _unrouted(
    experts: Experts,
    name: str,
    zero: Sequence[int],
    zeros: int,
    twins: Sequence[tuple[int, int]],
) -> Observation:
    said = []
    if zero:
        rows = "the row of expert" if zeros == 1 else "the rows of experts"
        said.append(f"{rows} {runs(zero, zeros)} {'is' if zeros == 1 else 'are'} zero")
    if twins:
        a, b = twins[0]
        more = f", and {len(twins) - 1} more repeat another" if len(twins) > 1 else ""
        said.append(f"the row of expert {b} equals that of expert {a}{more}")
    numbers = sorted({*zero, *(b for _, b in twins)})
    return Observation(
        name,
        f"the router of {len(experts.numbers)} experts cannot choose "
        f"{'one' if len(numbers) == 1 else f'{len(numbers)}'} of them on its own: "
        + "; ".join(said),
        "check the router against the source of the checkpoint; if training goes on, look at the "
        "load-balancing loss and the router's initialisation",
        {
            "zero_rows": zeros,
            "repeated_rows": len(twins),
            "present_experts": len(experts.numbers),
            "experts": ", ".join(map(str, numbers)),
            "affected_fraction": len(numbers) / len(experts.numbers),
        },
        severity=None if zeros > LOST * len(experts.numbers) else Severity.MEDIUM,
    )
