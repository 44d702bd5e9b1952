"""Rules about adapters: what they change, and whether all of them is there."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from statistics import median

from gradscope.report.rules import Observation, Unknown, rule
from gradscope.report.severity import Severity
from gradscope.text import escaped, listed, plural, quoted
from gradscope.weights.adapter_config import AdapterConfig, adapter_configs, alpha_of, ends
from gradscope.weights.adapters import Adapter
from gradscope.weights.names import common_pattern, series
from gradscope.weights.result import AdapterResult, Examined, Need
from gradscope.weights.rules.tensors import VANISHED, is_constant, is_whole
from gradscope.weights.steps import step_count


@rule("W120", "idle-adapter", Severity.HIGH, reads=Examined, needs=Need.HEADERS)
def idle_adapter(
    examined: Examined,
    *,
    one_direction: float = 1.5,
    least_rank: int = 8,
    least_share: float = 0.5,
    most_layers: float = 0.25,
) -> Iterator[Observation | Unknown]:
    """An adapter changes nothing, or less than it was made for.

    An adapter's change is a product (LoRA's B A; LoHa, LoKr, VeRA and others have more factors) of
    which one factor starts at zero. High where every product is still zero after training steps
    (of the file's metadata, `trainer_state.json` or the folder's name), or where two factors are
    zero, which no gradient leaves; info at the start. Zero in some modules only, an alpha of 0, a
    target of `adapter_config.json` without an adapter, one that its neighbours have in up to a
    quarter of the layers, and A without B are medium; B without A, which loaders make random, is
    high. Low: at least half of the modules of rank 8 and more use one direction, by an effective
    rank exp(H(σ/Σσ)) of B A (Roy and Vetterli 2007) of at most 1.5.
    """
    if is_whole(examined):
        yield from _missing_targets(examined)
        yield from _missing_in_layers(examined, most_layers)
        yield from _half_pairs(examined)
    yield from _misfits(examined)
    if not examined.adapted:
        return
    if Need.STATISTICS not in examined.measured:
        yield Unknown(f"needs {Need.STATISTICS}, which was not measured")
        return
    yield from _idle(examined)
    yield from _unscaled(examined)
    yield from _one_direction(examined, one_direction, least_rank, least_share)


# -- what is there ---------------------------------------------------------------------------------


def _missing_targets(examined: Examined) -> Iterator[Observation]:
    for config in adapter_configs(examined.checkpoint):
        modules = [a.module for a in examined.adapted if config.about(a)]
        if config.excluded or not (modules or _is_adapter_file(examined, config)):
            continue
        wanted = [t for t in config.targets if t not in config.saved_whole]
        missing = [t for t in wanted if not any(ends(module, t) for module in modules)]
        if missing:
            yield Observation(
                "target_modules",
                f"{len(missing)} of {plural(len(wanted), 'target module')} "
                f"have no adapter: {listed(map(escaped, missing), len(missing), 8)}",
                "check the names against the base model's and that all of the adapter was saved; "
                "what is not there leaves its module as it was",
                {"missing_targets": len(missing), "targets": len(wanted)},
                severity=Severity.MEDIUM,
            )


def _is_adapter_file(examined: Examined, config: AdapterConfig) -> bool:
    """Whether the file was written as an adapter of a known method, whatever is in it."""
    if config.fields.get("peft_type") not in ("LORA", "ADALORA", "LOHA", "LOKR", "IA3", "VERA"):
        return False
    files = {os.path.basename(t.file) for t in examined.tensors}
    named = all(file.startswith("adapter_model") for file in files)
    return bool(files) and named


#: The last block of SD3 and its like has no context to pass on.
_CONTEXT = re.compile(r"(^|\.)\w*(context|add)\w*(\.|$)")


def _missing_in_layers(examined: Examined, most: float) -> Iterator[Observation]:
    """Modules that most layers adapt, and that some layers do not although they adapt siblings."""
    configs = adapter_configs(examined.checkpoint)
    yield from _missing_chosen(examined, configs)
    if any(config.chooses_layers for config in configs):
        return
    for stack, members in series(a.module for a in examined.adapted).items():
        for module in dict.fromkeys(m for held in members.values() for m in sorted(held)):
            parent = module.rpartition(".")[0]
            having = {
                n: module in held for n, held in members.items() if _has_sibling(parent, held)
            }
            missing = sorted(n for n, has in having.items() if not has)
            few = len(missing) == 1 or len(missing) <= most * len(having)
            by_design = _periodic(missing, max(members)) or (
                missing == [max(members)] and _CONTEXT.search(module)
            )
            if missing and len(having) > 2 and few and not by_design:
                yield _gap(stack, module, missing, len(having))


def _has_sibling(parent: str, held: Iterable[str]) -> bool:
    return any(module.rpartition(".")[0] == parent for module in held)


def _periodic(missing: Sequence[int], last: int) -> bool:
    """Every so many layers: another kind of layer, as in hybrid models, not a loss."""
    steps = {b - a for a, b in pairwise(missing)}
    return (
        len(missing) > 2 and len(steps) == 1 and steps != {1} and last - missing[-1] <= max(steps)
    )


def _gap(stack: str, module: str, missing: Sequence[int], layers: int) -> Observation:
    return Observation(
        f"{stack}.{missing[0]}.{module}",
        f"{module} has no adapter in layer {listed(missing, len(missing), 8)} of {stack}; it has "
        f"one in {layers - len(missing)} of {layers}",
        "check that all of the adapter was saved; if those layers were left out on purpose, "
        "layers_to_transform or exclude_modules of adapter_config.json should say so",
        {"missing_layers": len(missing), "layers": layers},
        severity=Severity.MEDIUM,
    )


def _missing_chosen(examined: Examined, configs: Iterable[AdapterConfig]) -> Iterator[Observation]:
    found = series(a.module for a in examined.adapted)
    present = {n for members in found.values() for n in members}
    chosen = {n for config in configs for n in config.layers}
    if missing := sorted(chosen - present) if present else []:
        yield Observation(
            "layers_to_transform",
            f"layer {listed(missing, len(missing), 8)} of layers_to_transform has no adapter",
            "check that all of the adapter was saved and that the base model has these layers",
            {"missing_layers": len(missing), "layers": len(chosen)},
            severity=Severity.MEDIUM,
        )


def _half_pairs(examined: Examined) -> Iterator[Observation]:
    for present, absent in (("B", "A"), ("A", "B")):
        half = [a for a in examined.adapted if a.method == "lora" and a.lacks == absent]
        if half:
            random = absent == "A"
            yield Observation(
                common_pattern([examined.by_name[a.names[present]] for a in half]),
                f"{present} without {absent} in {len(half)} of "
                f"{plural(len(examined.adapted), 'module')}: a loader "
                + ("draws A at random" if random else "starts B at zero, which changes nothing"),
                f"save the adapter again with both factors, or restore {absent} from its source",
                {"half_pairs": len(half), "adapters": len(examined.adapted)},
                severity=Severity.HIGH if random else Severity.MEDIUM,
            )


def _misfits(examined: Examined) -> Iterator[Observation]:
    for adapter in examined.adapted:
        if not adapter.fits:
            shapes = [f"{f} {list(s)}" for f, s in adapter.shapes.items()]
            yield Observation(
                next(iter(adapter.names.values())),
                f"the factors of {quoted(adapter.module)} cannot be multiplied: "
                f"{listed(shapes, len(shapes), 4)}",
                "restore both from one checkpoint; no loader takes them",
                severity=Severity.MEDIUM,
            )


# -- what it changes -------------------------------------------------------------------------------


def _idle(examined: Examined) -> Iterator[Observation]:
    judged = [a for a in examined.adapted if a.judged and not a.lacks]
    idle = {a: zero for a in judged if (zero := tuple(_neutral(a, examined)))}
    if not idle:
        return
    if len(idle) < len(judged):
        yield _idle_in_part(examined, idle, judged)
    else:
        yield _idle_altogether(examined, idle)


def _neutral(adapter: Adapter, examined: Examined) -> Iterator[str]:
    """The factors by which an adapter leaves its module as it is; none where it changes it."""
    if adapter.pruned:
        yield "lora_E"
    elif adapter.neutral is None:
        yield from (f for f, name in adapter.trained.items() if _is(examined, name, 0))
    else:
        there = {f: v for f, v in adapter.neutral.items() if f in adapter.names}
        if all(_is(examined, adapter.names[f], v) for f, v in there.items()):
            yield from there


def _is(examined: Examined, name: str, value: float) -> bool:
    tensor = examined.by_name[name]
    s = tensor.statistics
    if value == 0 and s is not None and s.abs_max is not None:  # zero, or decayed to nothing
        return s.abs_max < VANISHED and s.finite_count == s.count
    return is_constant(tensor, value)


def _idle_altogether(examined: Examined, idle: Mapping[Adapter, Sequence[str]]) -> Observation:
    steps = step_count(examined)
    stuck = all(len(zero) > 1 for a, zero in idle.items() if a.neutral is None)
    stuck = stuck and any(a.neutral is None for a in idle)
    unscaled = all(alpha_of(a, examined) == 0 for a in idle)
    after = "" if steps is None else f" after {plural(steps, 'training step')}"
    return Observation(
        _subject(examined, idle),
        f"every one of {plural(len(idle), 'module')} is left as it was{after}: "
        f"{_where(idle)}; the adapter changes nothing"
        + (", and no gradient reaches factors that are both zero" if stuck else ""),
        _remedy(steps, stuck, unscaled),
        {"zero_adapters": len(idle), "adapters": len(idle)}
        | ({} if steps is None else {"step": steps})
        | {"affected_fraction": 1.0},
        severity=None if steps or stuck else Severity.INFO,
    )


def _remedy(steps: int | None, stuck: bool, unscaled: bool) -> str:
    if unscaled:
        return "set alpha: at 0 the product counts for nothing and gets no gradient"
    if steps:
        return (
            "check that the adapter's parameters require gradients and are the optimizer's, and "
            "that what was trained is what was saved (gathered, under FSDP and ZeRO-3)"
        )
    return "initialise one factor at random, and train" if stuck else "train the adapter"


def _idle_in_part(
    examined: Examined, idle: Mapping[Adapter, Sequence[str]], judged: Sequence[Adapter]
) -> Observation:
    severity, why, remedy = _explained(idle, judged)
    return Observation(
        _subject(examined, idle),
        f"{len(idle)} of {plural(len(judged), 'module')} are left as they were: "
        f"{_where(idle)}; {why}",
        remedy,
        {"zero_adapters": len(idle), "adapters": len(judged)},
        severity=severity,
    )


def _explained(idle: Iterable[Adapter], judged: Sequence[Adapter]) -> tuple[Severity, str, str]:
    """What is to be thought of modules that were not trained while others were."""
    if all("lora_E" in adapter.names for adapter in idle):
        return Severity.INFO, "AdaLoRA gave them no rank", "nothing to do"
    if _end_text_encoders(idle, judged):
        why = "the diffusion model reads the text encoder before its last layer"
        return Severity.INFO, why, "nothing to do; training can leave that layer out"
    if all(re.search(r"(^|\.)experts?[._]\d+(\.|$)", adapter.module) for adapter in idle):
        why = "no token of training was routed to these experts"
        return Severity.LOW, why, "train on more or other text, or leave the experts out"
    return (
        Severity.MEDIUM,
        "these were not trained",
        "check that these modules received gradients (target modules, frozen layers)",
    )


_TEXT_ENCODER = re.compile(
    r"^(?P<encoder>lora_te\d?|(?:\w+\.)*text_encoder(?:_\d)?)[._].*?layers[._](?P<layer>\d+)[._]"
)


def _end_text_encoders(idle: Iterable[Adapter], judged: Iterable[Adapter]) -> bool:
    """Whether all of these are in the last layer of a text encoder."""
    last: dict[str, int] = {}
    for adapter in judged:
        if found := _TEXT_ENCODER.match(adapter.module):
            last[found["encoder"]] = max(last.get(found["encoder"], 0), int(found["layer"]))
    matches = [_TEXT_ENCODER.match(adapter.module) for adapter in idle]
    return all(found and int(found["layer"]) == last[found["encoder"]] for found in matches)


def _subject(examined: Examined, idle: Mapping[Adapter, Sequence[str]]) -> str:
    return common_pattern([examined.by_name[a.names[zero[0]]] for a, zero in idle.items()])


def _where(idle: Mapping[Adapter, Sequence[str]]) -> str:
    """Which factors are zero (of IA3: one), each once."""
    factors = list(dict.fromkeys(factor for zero in idle.values() for factor in zero))
    same = all(adapter.neutral is not None for adapter in idle)
    return f"{listed(factors, len(factors), 4)} {'as initialised' if same else 'zero'}"


def _unscaled(examined: Examined) -> Iterator[Observation]:
    """Alpha 0, but not where the products are zero as well: that was said, with the cause."""
    zero = [a for a in examined.adapted if alpha_of(a, examined) == 0]
    zero = [a for a in zero if not a.judged or not tuple(_neutral(a, examined))]
    if zero:
        yield Observation(
            common_pattern([examined.by_name[next(iter(a.names.values()))] for a in zero]),
            f"alpha is 0 in {len(zero)} of {plural(len(examined.adapted), 'module')}: what was "
            "trained there is multiplied by 0",
            "set alpha to the value of training, in adapter_config.json or beside the factors",
            {"zero_alphas": len(zero), "adapters": len(examined.adapted)},
            threshold=0,
            severity=Severity.MEDIUM,
        )


def _one_direction(
    examined: Examined, most: float, least_rank: int, least_share: float
) -> Iterator[Observation]:
    seen = [a for a in examined.adapters if a.effective_rank and (a.rank or 0) >= least_rank]
    used = [a for a in seen if (a.effective_rank or 0) <= most]
    if not used or len(used) < least_share * len(seen):
        return
    ranks = sorted({a.rank or 0 for a in used})
    half = median(a.effective_rank or 0 for a in used)
    yield Observation(
        _modules(used),
        f"{len(used)} of {plural(len(seen), 'module')} use one direction of the "
        f"{' to '.join(dict.fromkeys((str(ranks[0]), str(ranks[-1]))))} they pay for (median "
        f"effective rank {half:.3g})",
        "a smaller rank would do as much; if more was hoped for, lower the learning rate and look "
        "for data that repeats itself",
        {"effective_rank": half, "rank": ranks[-1], "modules": len(used), "adapters": len(seen)},
        threshold=most,
        severity=Severity.LOW,
    )


def _modules(found: Sequence[AdapterResult]) -> str:
    return found[0].module if len(found) == 1 else f"{found[0].module} (+{len(found) - 1} more)"
