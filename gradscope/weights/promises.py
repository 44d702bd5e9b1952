"""How many layers ``config.json`` promises of each stack of a model."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

Fields = Mapping[str, object]

#: Where a composed model keeps the configuration of its language model.
TEXT = ("text_config", "llm_config", "language_config")
_MAIN = r"(model\.|transformer\.|backbone\.|gpt_neox\.|decoder\.|bert\.|roberta\.)?"
_HIDDEN = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_VISION = ("num_hidden_layers", "depth", "num_layers", "n_layers")
#: Stack -> where its configuration is, and the keys of its number of layers.
_STACKS: tuple[tuple[str, tuple[str, ...], tuple[str, ...]], ...] = (
    (r"(model\.)?encoder\.layers", (), ("encoder_layers",)),
    (r"(model\.)?decoder\.layers", (), ("decoder_layers",)),
    (r"encoder\.block", (), ("num_layers",)),
    (r"decoder\.block", (), ("num_decoder_layers", "num_layers")),
    (rf"{_MAIN}(layers|h)", (), _HIDDEN),
    (rf"{_MAIN}encoder\.layer", (), _HIDDEN),
    (r"(.*\.)?(vision|visual)\w*\.(.*\.)?(layers?|blocks|resblocks)", ("vision_config",), _VISION),
    (rf"(model\.)?language_model\.{_MAIN}(layers|h)", TEXT, _HIDDEN),
)


def promised_layers(config: Fields, stack: str, stacks: Collection[str]) -> int:
    """The number that is promised of a stack; 0 where nothing is, or nothing to be believed.

    ``stacks`` are all that the checkpoint has: of several in one part, none is told.
    """
    for pattern, parts, keys in _STACKS:
        if re.fullmatch(pattern, stack) is None:
            continue
        if parts and sum(re.fullmatch(pattern, other) is not None for other in stacks) > 1:
            continue
        nested = next((config[p] for p in parts if isinstance(config.get(p), Mapping)), None)
        said = nested if isinstance(nested, Mapping) else {} if parts else config
        values = (said.get(key) for key in keys)
        found = next((v for v in values if type(v) is int and 0 < v < 10_000), 0)
        if found:
            return found
    return 0
