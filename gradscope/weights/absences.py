"""What ``config.json`` promises and is not there, or is there and was not promised."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence

from gradscope.weights.configuration import GENERATES, Configuration, configuration
from gradscope.weights.names import series
from gradscope.weights.promises import TEXT
from gradscope.weights.result import Examined, TensorResult

#: What output layers are called, whatever their tensors are called when they are quantised.
_OUTPUT = re.compile(
    r"(^|\.)(\w*lm_heads?|embed_out|output_layer|output_projection|output|unembed|proj_out|ff_out|"
    r"head|classifier|score|predictions\.decoder|final_linear)(\.|$)"
)


def lacks_head(examined: Examined) -> bool:
    """Whether the output layer is promised to be a matrix of its own, and is not there."""
    config = examined.document("config")
    nested = [config[k] for k in TEXT if isinstance(config.get(k), Mapping)]
    tied = [f.get("tie_word_embeddings") for f in (config, *nested) if isinstance(f, Mapping)]
    made = config.get("architectures")
    generates = made is None or (
        isinstance(made, list) and any(isinstance(a, str) and GENERATES.search(a) for a in made)
    )
    if not generates or False not in tied or True in tied:
        return False
    tables = configuration(examined).embeddings
    halved = config.get("is_encoder_decoder") is True and not any(
        "decoder" in t.name for t in examined.tensors
    )
    return (
        bool(tables) and not halved and not any(_may_be_head(t, tables) for t in examined.tensors)
    )


def _may_be_head(tensor: TensorResult, tables: Sequence[TensorResult]) -> bool:
    """By its name, or because it is another matrix of a vocabulary by the model's width."""
    if tensor in tables:
        return False
    if _OUTPUT.search(tensor.name) and len(tensor.shape) >= 1:
        return True
    return len(tensor.shape) == 2 and any(
        set(tensor.shape) == set(table.shape) and "lora" not in tensor.name for table in tables
    )


_EXPERT = re.compile(r"^(?P<stack>.*\bexperts)\.(?:expert_)?(?P<number>\d+)\.")
_STACKED = re.compile(r"\bexperts\.(gate_up_proj|down_proj|gate_proj|up_proj|w[123])(\.weight)?$")


def expert_counts(config: Configuration) -> tuple[frozenset[int], Mapping[str, int]]:
    """How many experts are promised, with and without empty ones, and how many each stack has."""
    numbers: dict[str, set[int]] = defaultdict(set)
    stacked: dict[str, int] = {}
    for tensor in config.tensors:
        if "experts" not in tensor.name:
            continue
        if found := _EXPERT.match(tensor.name):
            numbers[found["stack"]].add(int(found["number"]))
        elif _STACKED.search(tensor.name) and len(tensor.shape) == 3:
            stacked[tensor.name] = tensor.shape[0]
    keys = ("num_local_experts", "n_routed_experts", "num_experts", "moe_num_experts")
    promised = config.number(*keys)
    several = {promised + other for other in config.others("zero_expert")} if promised else ()
    counts = {stack: len(n) for stack, n in numbers.items()} | stacked
    return frozenset(filter(None, (promised, *several))), counts


def surplus_layers(config: Configuration) -> tuple[str, int, int] | None:
    """The main stack of layers, where it has more than are promised: name, found, promised."""
    promised = config.number("num_hidden_layers", "n_layer", "n_layers", "num_layers")
    extra = sum(config.others(r"nextn|mtp|num_predict_layers"))
    if promised is None:
        return None
    for stack, members in series(t.name for t in config.tensors).items():
        found = max(members) + 1
        if is_main(stack) and found == len(members) and found > promised + extra:
            return stack, found, promised
    return None


def is_main(stack: str) -> bool:
    """Whether the number of hidden layers refers to this stack."""
    own = ("model.layers", "layers", "transformer.h", "h", "encoder.layer", "bert.encoder.layer")
    return stack in own
