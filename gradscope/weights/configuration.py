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
from gradscope.weights.names import series
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


#: Where a composed model keeps the configuration of its language model.
_TEXT = ("text_config", "llm_config", "language_config")
#: Parts of a composed model that its language model's configuration is not about.
_OTHER_PART = re.compile(
    r"(^|\.)(vision|visual|image|vit|audio|speech|talker|token2wav|code2wav|codec|depth_decoder|"
    r"mm|multi_modal|connector|qformer|projector|perceiver|mtp|ngram)\w*(\.|$)"
)
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
    nested = next((config[k] for k in _TEXT if isinstance(config.get(k), Mapping)), None)
    composed = any(isinstance(v, Mapping) and k.endswith("_config") for k, v in config.items())
    tensors: Sequence[TensorResult] = examined.tensors
    if composed:
        tensors = [t for t in tensors if not _OTHER_PART.search(t.name)]
    if isinstance(nested, Mapping):
        own = [t for t in tensors if _TEXT_PART.search(t.name)]
        return Configuration(nested, own or tensors, composed)
    return Configuration(config, tensors, composed)


Claims = Callable[[Configuration], Iterator[Claim]]


def broken(config: Configuration) -> dict[str, list[Claim]]:
    """The claims by key where no tensor keeps what the configuration promises."""
    found: dict[tuple[str, str], list[Claim]] = defaultdict(list)
    for claims in (_vocabulary, _width, _inner_width, _heads, _positions):
        for claim in claims(config):
            found[claims.__name__, claim.key].append(claim)
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
    for norm in config.matching(r"(^|\.)(input_layernorm|ln_1)\.weight$", 1):
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
    for pattern, axis in _INNER.items():
        for tensor in config.matching(pattern):
            length = tensor.shape[axis]
            kept = bool(others & {length, 2 * length, length // 2})
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


# -- what is missing, or too many ------------------------------------------------------------------

_GENERATES = re.compile(r"(CausalLM|LMHeadModel|ForConditionalGeneration)$")
#: What output layers are called, whatever their tensors are called when they are quantised.
_OUTPUT = re.compile(
    r"(^|\.)(\w*lm_heads?|embed_out|output_layer|output_projection|output|unembed|proj_out|ff_out|"
    r"head|classifier|score|predictions\.decoder|final_linear)(\.|$)"
)


def lacks_head(examined: Examined) -> bool:
    """Whether the output layer is promised to be a matrix of its own, and is not there."""
    config = examined.document("config")
    nested = [config[k] for k in _TEXT if isinstance(config.get(k), Mapping)]
    tied = [f.get("tie_word_embeddings") for f in (config, *nested) if isinstance(f, Mapping)]
    made = config.get("architectures")
    generates = made is None or (
        isinstance(made, list) and any(isinstance(a, str) and _GENERATES.search(a) for a in made)
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
