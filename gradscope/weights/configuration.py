"""``config.json`` against the tensors: which lengths it promises, and which they have.

Only what is called the same in many architectures is compared, and a promise is only broken if none
of the tensors it is about keeps it: layers of one model may differ on purpose.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from gradscope.statistics.dtypes import is_float
from gradscope.weights.promises import TEXT
from gradscope.weights.result import Examined, TensorResult

Fields = Mapping[str, object]


@dataclass(frozen=True, slots=True)
class Claim:
    """What a key of the configuration says of one tensor, and what the tensor says."""

    key: str
    promised: int
    found: int
    tensor: str
    kept: bool


#: Parts of a composed model that its language model's configuration is not about.
_OTHER_PART = re.compile(
    r"(^|\.)(vision|visual|image|vit|audio|speech|talker|token2wav|code2wav|codec|depth_decoder|"
    r"mm|multi_modal|connector|qformer|projector|perceiver|mtp|ngram)\w*(\.|$)"
)
_VISION = re.compile(r"(^|\.)(vision|visual)\w*(\.|$)")
#: What lies between the vision part and the language model has widths of both.
_BRIDGE = re.compile(r"(^|\.)\w*(projector|projection|merger|connector|resampler|qformer)\w*(\.|$)")
#: What a model that writes text is called.
GENERATES = re.compile(r"(CausalLM|LMHeadModel|ForConditionalGeneration)$")
_TEXT_PART = re.compile(r"(^|\.)(language_model|text_model|llm)(\.|$)")


@dataclass(frozen=True)
class Configuration:
    """What the configuration says of a language model, and the tensors that it is about."""

    fields: Fields
    tensors: Sequence[TensorResult]
    #: Whether the model has other parts, whose tokens it may add to the vocabulary.
    composed: bool = False

    def number(self, *names: str) -> int | None:
        """The first of these keys that is a positive number."""
        values = (self.fields.get(name) for name in names)
        return next((v for v in values if type(v) is int and 0 < v < 2**31), None)

    def others(self, pattern: str) -> frozenset[int]:
        """The numbers under all keys that match."""
        return frozenset(
            v for k, v in self.fields.items() if type(v) is int and v > 0 and re.search(pattern, k)
        )

    def matching(self, pattern: str, dims: int = 2) -> Iterator[TensorResult]:
        """The float tensors of so many dimensions whose names end so; layer numbers are ``*``."""
        ends = re.compile(pattern)
        for end, tensors in self._by_end.items():
            if ends.search(end):
                yield from (t for t in tensors if len(t.shape) == dims and is_float(t.dtype))

    @property
    def generates(self) -> bool:
        """Whether it says that the model writes text."""
        made = self.fields.get("architectures")
        return isinstance(made, list) and any(
            isinstance(name, str) and GENERATES.search(name) for name in made
        )

    @cached_property
    def _by_end(self) -> Mapping[str, Sequence[TensorResult]]:
        """The tensors by the last three parts of their names: few keys, however many layers."""
        found: dict[str, list[TensorResult]] = defaultdict(list)
        for tensor in self.tensors:
            parts = tensor.name.rsplit(".", 3)[-3:]
            found[".".join("*" if part.isdecimal() else part for part in parts)].append(tensor)
        return found

    @cached_property
    def embeddings(self) -> tuple[TensorResult, ...]:
        """The tables of token vectors."""
        return tuple(self.matching(_EMBEDDING))


_EMBEDDING = (
    r"(^|\.)(?<!embed_tokens\.)(embed_tokens|wte|word_embeddings|tok_embeddings|embed_in|token_embedding|shared|"
    r"backbone\.embeddings?)\.weight$"
)


def configuration(examined: Examined) -> Configuration:
    """The configuration beside a checkpoint; empty where there is none."""
    config = examined.document("config")
    nested = next((config[k] for k in TEXT if isinstance(config.get(k), Mapping)), None)
    composed = any(isinstance(v, Mapping) and k.endswith("_config") for k, v in config.items())
    tensors: Sequence[TensorResult] = examined.tensors
    if composed:
        tensors = [t for t in tensors if not _OTHER_PART.search(t.name)]
    if isinstance(nested, Mapping):
        own = [t for t in tensors if _TEXT_PART.search(t.name)]
        return Configuration(nested, own or tensors, composed)
    return Configuration(config, tensors, composed)


def vision(examined: Examined) -> Configuration:
    """The configuration of a composed model's vision part; empty where there is none."""
    said = examined.document("config").get("vision_config")
    own = (t for t in examined.tensors if _VISION.search(t.name) and not _BRIDGE.search(t.name))
    fields = said if isinstance(said, Mapping) else {}
    return Configuration(fields, list(own) if fields else ())


Claims = Callable[[Configuration], Iterator[Claim]]


def broken(config: Configuration, part: str = "") -> dict[str, list[Claim]]:
    """The claims by key where no tensor keeps what the configuration promises.

    Of a ``part`` that is no language model only widths are compared.
    """
    found: dict[tuple[str, str], list[Claim]] = defaultdict(list)
    widths = (_width, _inner_width)
    for claims in widths if part else (_vocabulary, *widths, _heads, _positions, _lengths):
        for claim in claims(config):
            found[claims.__name__, part + claim.key].append(claim)
    wrong: dict[str, list[Claim]] = defaultdict(list)
    for (_, key), claims_of_key in found.items():
        if not any(claim.kept for claim in claims_of_key):
            wrong[key] += claims_of_key
    return wrong


def _vocabulary(config: Configuration) -> Iterator[Claim]:
    promised = config.number("vocab_size", "n_vocab", "padded_vocab_size")
    if promised is None:
        return
    others = config.others(r"vocab|n_words|ntoken")
    multiple = config.number("pad_vocab_size_multiple", "pad_to_multiple_of")
    for table in config.embeddings:
        rows = table.shape[0]
        kept = rows in others or _padded(promised, rows, multiple)
        kept = kept or (config.composed and 0 < rows - promised <= 8)  # Mllama's and Moshi's own
        yield Claim("vocab_size", promised, rows, table.name, kept)


def _padded(promised: int, rows: int, multiple: int | None) -> bool:
    """Whether a table was made longer for the hardware: to a multiple of 64 … 1024."""
    usual = (m for m in (64, 128, 256, 512, 1024) if m == 64 or 8 * m <= promised)
    multiples = [multiple] if multiple else usual
    return rows >= promised and any(-(-promised // m) * m == rows for m in multiples)


def _width(config: Configuration) -> Iterator[Claim]:
    promised = config.number("hidden_size", "n_embd", "d_model", "n_embed")
    if promised is None:
        return
    others = config.others(r"emb|proj_dim|hidden|dim")
    for table in config.embeddings:
        columns = table.shape[1]
        yield Claim("hidden_size", promised, columns, table.name, columns in {promised, *others})
    for norm in config.matching(r"(^|\.)(input_layernorm|ln_1|layer_norm1)\.weight$", 1):
        yield Claim("hidden_size", promised, norm.numel, norm.name, norm.numel == promised)


#: Tensor -> the dimension that has the inner width of an MLP.
_INNER = {
    r"(^|\.)mlp\.(gate|up)_proj\.weight$": 0,
    r"(^|\.)mlp\.down_proj\.weight$": 1,
    r"(^|\.)intermediate\.dense\.weight$": 0,
    r"(^|\.)mlp\.dense_h_to_4h\.weight$": 0,
    r"(^|\.)DenseReluDense\.wi(_0)?\.weight$": 0,
    r"(^|\.)(\*|mlp)\.fc1\.weight$": 0,
}


def _inner_width(config: Configuration) -> Iterator[Claim]:
    promised = config.number("intermediate_size", "ffn_dim", "encoder_ffn_dim", "d_ff", "n_inner")
    if promised is None:
        return
    others = {promised, *config.others(r"inter|ffn|ff_|_ff|inner|mlp|hidden")}
    halves = not config.generates  # some detectors halve what a gate is beside
    for pattern, axis in _INNER.items():
        for tensor in config.matching(pattern):
            length = tensor.shape[axis]
            kept = length in others or (halves and 2 * length in others)
            yield Claim("intermediate_size", promised, length, tensor.name, kept)


#: Attention whose heads are not num_attention_heads times one length.
_OTHER_HEADS = r"lora_rank|qk_|v_head|rope_head|gate|cross_head|num_heads_per|global_head|swa_"


def _heads(config: Configuration) -> Iterator[Claim]:
    heads = config.number("num_attention_heads", "n_head", "num_heads")
    if heads is None or any(re.search(_OTHER_HEADS, key) for key in config.fields):
        return
    queries = list(config.matching(r"(self_attn|attention|attn)\.q_proj\.weight$"))
    length = config.number("head_dim")
    if length is None:
        length = _derived_length(config, heads, queries)
    elif queries:
        for q in queries:
            kept = q.shape[0] in (heads * length, 2 * heads * length)
            yield Claim("num_attention_heads × head_dim", heads * length, q.shape[0], q.name, kept)
    groups = config.number("num_key_value_heads")
    if length is None or groups is None:
        return
    for k in config.matching(r"(self_attn|attention|attn)\.k_proj\.weight$"):
        kept = k.shape[0] == groups * length
        yield Claim("num_key_value_heads × head_dim", groups * length, k.shape[0], k.name, kept)


def _derived_length(
    config: Configuration, heads: int, queries: Sequence[TensorResult]
) -> int | None:
    """hidden_size / heads, where the queries have as many rows as the model is wide."""
    width = config.number("hidden_size", "n_embd", "d_model")
    plain = width and width % heads == 0 and queries and all(q.shape[0] == width for q in queries)
    return width // heads if width and plain else None


def _positions(config: Configuration) -> Iterator[Claim]:
    promised = config.number("max_position_embeddings", "n_positions", "n_ctx")
    if promised is None:
        return
    known = {promised, *config.others(r"position|n_ctx|seq_len|length")}
    for table in config.matching(r"(^|\.)(position_embeddings?|wpe|embed_positions)\.weight$"):
        rows = table.shape[0]
        kept = any(rows - offset in known for offset in (0, 1, 2))  # BART and OPT keep two more
        yield Claim("max_position_embeddings", promised, rows, table.name, kept)


#: Key -> a tensor's name, its number of dimensions, and the one that has the length.
_LENGTHS = {
    "max_target_positions": (r"(^|\.)decoder\.embed_positions\.weight$", 2, 0),
    "max_source_positions": (r"(^|\.)encoder\.embed_positions\.weight$", 2, 0),
    "type_vocab_size": (r"(^|\.)embeddings\.token_type_embeddings\.weight$", 2, 0),
    "num_mel_bins": (r"(^|\.)encoder\.conv1\.weight$", 3, 1),
}


def _lengths(config: Configuration) -> Iterator[Claim]:
    for key, (pattern, dims, axis) in _LENGTHS.items():
        promised = config.number(key)
        for tensor in config.matching(pattern, dims) if promised is not None else ():
            length = tensor.shape[axis]
            kept = length == promised or (axis == 0 and length - 2 == promised)
            yield Claim(key, promised or 0, length, tensor.name, kept)
