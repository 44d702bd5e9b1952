"""What the queries and keys of an attention are made of, by the conventions of released models.

A bound on logits holds only for the norm whose output an attention takes. Its name alone does not
tell: BART calls the norm after an attention what Whisper calls the norm before it. What no
convention tells is not claimed: attention across (keys come from elsewhere), positions that are
added to queries or that scale them (DETR, YaRN), cosines.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping

from gradscope.weights.family import own_name, place

Config = Mapping[str, object]

#: What attention within one sequence is called.
_WITHIN = {"attn", "attention", "self_attn", "self_attention", "attn1", "SelfAttention"}
#: Norms before an attention, beside its module.
_BESIDE = (
    "input_layernorm", "ln_1", "attention_norm", "attn_norm", "layernorm_before", "norm_1",
    "ln_attn", "layer_norm1",
)  # fmt: skip
#: Models whose `self_attn_layer_norm` comes before.
_BEFORE = {
    "whisper", "opt", "mbart", "pegasus", "pegasus_x", "bigbird_pegasus", "m2m_100", "nllb-moe",
    "xglm", "biogpt", "blenderbot", "speech_to_text", "seamless_m4t", "musicgen",
}  # fmt: skip
#: Models whose first layer takes what `embeddings.LayerNorm` gives.
_EMBEDDED = {
    "bert", "roberta", "xlm-roberta", "camembert", "electra", "distilbert", "layoutlm",
}  # fmt: skip
#: Models that store a gain of 1 + w as w.
_CENTRED = re.compile(r"gemma|qwen3_next", re.IGNORECASE)
#: Norms of queries, and of keys, in the attention's module.
_OF_QUERIES = (
    ("q_norm", "k_norm"), ("q_layernorm", "k_layernorm"), ("query_norm", "key_norm"),
    ("query_layernorm", "key_layernorm"), ("norm_q", "norm_k"), ("q_ln", "k_ln"),
)  # fmt: skip
#: The layers of an encoder that norms after each attention: BERT, DistilBERT.
_AFTER = {
    "attention.self.": "output.LayerNorm",
    "attention.": "output_layer_norm",
}


def norms_before(module: str, config: Config) -> Iterator[str]:
    """The norms that may hand an attention its input, the likeliest first, without their leaf."""
    outer = place(module.rstrip("./"))[0]
    if re.search(r"attention[./](attention|self)[./]$", module):
        yield from _of_encoder(module, place(outer.rstrip("./"))[0], config)
    elif own_name(module) in _WITHIN:
        yield from _of_layer(module, outer, config)


def _of_layer(module: str, outer: str, config: Config) -> Iterator[str]:
    """Beside the attention."""
    kind, own = config.get("model_type"), own_name(module)
    if kind != "openai-gpt":  # which norms after
        yield from (outer + name for name in _BESIDE)
    if own != "self_attn":  # torch's layers norm after unless told otherwise
        yield f"{outer}norm1"
    if own == "SelfAttention":
        yield f"{outer}layer_norm"
    if kind in _BEFORE and config.get("do_layer_norm_before") is not False:
        yield f"{outer}self_attn_layer_norm"
    yield from _last(module, "attention.", config)


def _of_encoder(module: str, layer: str, config: Config) -> Iterator[str]:
    """Of a module in the attention of a layer: ViT, DINOv2, ESM, BERT."""
    yield from (f"{layer}layernorm_before", f"{layer}norm1", f"{layer}attention.LayerNorm")
    yield from _last(module, "attention.self.", config)


def _last(module: str, suffix: str, config: Config) -> Iterator[str]:
    """The norm at the end of the layer before, or of the embeddings."""
    match = re.fullmatch(rf"(.*?)((?:encoder|transformer)\.layer\.)(\d+)\.{suffix}", module)
    if match is None:
        return
    model, layers, number = match[1], match[2], int(match[3])
    if number:
        yield f"{model}{layers}{number - 1}.{_AFTER[suffix]}"
    elif config.get("model_type") in _EMBEDDED:
        yield f"{model}embeddings.LayerNorm"


def norms_of_queries(module: str) -> Iterator[tuple[str, str]]:
    """The norms of queries and of keys that an attention may have, without their leaf."""
    yield from ((module + q, module + k) for q, k in _OF_QUERIES)


def against(module: str) -> Iterator[str]:
    """Tensors with which no convention holds: cosines of a learnt scale, a norm of each head's own,
    the decoder of SAM, which adds positions and norms after.
    """
    yield from (f"{module}logit_scale", f"{module}tau")
    yield from (f"{q}.norms.0.weight" for q, _ in norms_of_queries(module))
    yield f"{place(module.rstrip('./'))[0]}layer_norm3.weight"


def is_scaled_by_position(module: str, config: Config) -> bool:
    """Whether queries and keys are scaled where they are rotated, or normed without a gain."""
    rope = _said(module, config, "rope_scaling") or _said(module, config, "rope_parameters")
    kind = (rope.get("rope_type") or rope.get("type")) if isinstance(rope, Mapping) else None
    return kind in ("yarn", "longrope", "su") or config.get("model_type") in (
        "llama4",
        "llama4_text",
    )


def scale(module: str, size: int, config: Config) -> float:
    """What the product of a query and a key is multiplied by."""
    if own_name(module) == "SelfAttention" or config.get("scale_attn_weights") is False:
        return 1.0  # T5 has it in its initialisation
    multiplier = _said(module, config, "attention_multiplier")
    size_ = _said(module, config, "query_pre_attn_scalar")
    if isinstance(multiplier, int | float) and multiplier > 0:
        return float(multiplier)
    return 1 / math.sqrt(size_ if isinstance(size_, int | float) and size_ > 0 else size)


def less(module: str, config: Config) -> int:
    """What gains are stored less of."""
    centred = _CENTRED.search(str(config.get("model_type"))) is not None
    return int(centred and _is_text(module))


def _said(module: str, config: Config, name: str) -> object:
    """What the configuration of a language model says; it may be part of a larger one."""
    if not _is_text(module):
        return None
    text = config.get("text_config")
    return config.get(name, text.get(name) if isinstance(text, Mapping) else None)


def _is_text(module: str) -> bool:
    return re.search(r"vision|visual|audio", module) is None
