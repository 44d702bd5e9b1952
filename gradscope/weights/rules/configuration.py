"""The rule about what stands beside the file: the configuration and its tensors disagree."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from gradscope.report.rules import Observation, rule
from gradscope.report.severity import Severity
from gradscope.text import listed, plural, quoted
from gradscope.weights.absences import expert_counts, lacks_head, surplus_layers
from gradscope.weights.adapter_config import adapter_configs
from gradscope.weights.configuration import (
    Claim,
    Configuration,
    broken,
    configuration,
    vision,
)
from gradscope.weights.names import common_pattern
from gradscope.weights.result import Examined, Need
from gradscope.weights.rules.tensors import is_whole

_REMEDY = (
    "take config.json and weights from one source; which of the two is right shows in the model "
    "they were made from"
)


@rule("C007", "config-mismatch", Severity.MEDIUM, reads=Examined, needs=Need.HEADERS)
def config_mismatch(examined: Examined) -> Iterator[Observation]:
    """What stands beside the file promises other tensors than it has.

    Loaders trust `config.json`: they fail, or draw what is missing at random and serve the model
    (Qwen3-VL-Embedding #89, transformers #24551, #33325). Compared are the vocabulary (a table may
    be padded to a multiple of 64 to 1024), widths, heads, positions, experts, layers beyond the
    promised number, widths of the vision part, lengths of speech models, and an output layer of its
    own where `tie_word_embeddings` is false; a promise is broken when no tensor keeps it. Of an
    adapter, `r` and `rank_pattern` against the factors.
    """
    if examined.adapted:
        yield from _ranks(examined)
        return
    config = configuration(examined)
    contradicted = broken(config) | broken(vision(examined), "vision_config.")
    for key, claims in contradicted.items():
        yield _contradiction(key, claims)
    if layers := surplus_layers(config):
        yield _surplus(*layers)
    if is_whole(examined):
        yield from _experts(config)
        if lacks_head(examined):
            yield _headless(config)


def _contradiction(key: str, claims: Sequence[Claim]) -> Observation:
    first = claims[0]
    others = f" and in {plural(len(claims) - 1, 'other tensor')}" if len(claims) > 1 else ""
    return Observation(
        first.tensor,
        f"config.json says {key} is {first.promised:,}; it is {first.found:,} here{others}",
        _REMEDY,
        {"key": key, "promised": first.promised, "found": first.found, "tensors": len(claims)},
    )


def _surplus(stack: str, found: int, promised: int) -> Observation:
    return Observation(
        f"{stack}.{promised}",
        f"config.json promises {plural(promised, 'layer')}; {stack} has {found:,}, and loaders "
        "drop the rest without a word",
        _REMEDY,
        {"key": "num_hidden_layers", "promised": promised, "found": found},
    )


def _headless(config: Configuration) -> Observation:
    table = config.embeddings[0]
    return Observation(
        "lm_head",
        "config.json says that the output layer is not tied to the embedding, and there is none: "
        "loaders draw it at random",
        f"set tie_word_embeddings to true if {quoted(table.name)} is meant for both, or restore "
        "lm_head.weight from the source",
        {"key": "tie_word_embeddings", "vocabulary": table.shape[0]},
    )


def _experts(config: Configuration) -> Iterator[Observation]:
    known, counts = expert_counts(config)
    wrong = {stack: n for stack, n in counts.items() if known and n not in known}
    if not wrong:
        return
    stack, found = next(iter(wrong.items()))
    promised = min(known)
    yield Observation(
        stack,
        f"config.json promises {plural(promised, 'expert')}; {found:,} are here"
        + (f" and in {plural(len(wrong) - 1, 'other layer')}" if len(wrong) > 1 else ""),
        _REMEDY,
        {"key": "experts", "promised": promised, "found": found, "layers": len(wrong)},
    )


#: PEFT's method -> ours, for those whose r is the rank of every module.
_RANKED = {"LORA": "lora", "LOHA": "loha"}


def _ranks(examined: Examined) -> Iterator[Observation]:
    """Modules whose factors have another rank than the configuration says."""
    for config in adapter_configs(examined.checkpoint):
        method = _RANKED.get(str(config.fields.get("peft_type", "LORA")))
        if config.fields.get("target_parameters"):  # experts stacked in one factor
            continue
        wrong = [
            (adapter, adapter.layout.rank, promised)
            for adapter in examined.adapted
            if adapter.method == method and config.about(adapter) and adapter.layout is not None
            if not adapter.layout.grouped
            if (promised := config.rank(adapter)) and promised != adapter.layout.rank
        ]
        if wrong:
            _, found, promised = wrong[0]
            names = [examined.by_name[next(iter(a.names.values()))] for a, _, _ in wrong]
            yield Observation(
                common_pattern(names),
                f"adapter_config.json says that r is {promised}; the factors have rank {found}, in "
                f"{len(wrong)} of {plural(len(examined.adapted), 'module')}: "
                f"{listed((quoted(a.module) for a, _, _ in wrong), len(wrong), 2)}",
                "take adapter_config.json and weights from one run, or correct r and rank_pattern",
                {"key": "r", "promised": promised, "found": found, "modules": len(wrong)},
            )
