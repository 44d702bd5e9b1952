"""What a tensor is for: judged by name, shape, siblings and dtype together, never by name alone.

A role decides which rules apply and with which limits: a norm gain, an embedding and a
convolution are not healthy in the same way.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from enum import StrEnum
from functools import lru_cache

from gradscope.checkpoints.tensors import Part, TensorRef
from gradscope.statistics.dtypes import INTEGERS, is_narrow
from gradscope.weights.adapters import Part as Factor
from gradscope.weights.adapters import part
from gradscope.weights.leaves import Leaf, in_fixed_layer, is_average, is_offset, leaf_of


class Role(StrEnum):
    """The roles, with the field's names."""

    LINEAR = "linear"
    CONV = "conv"
    DEPTHWISE = "depthwise-conv"
    RECURRENT = "recurrent"
    EXPERTS = "experts"
    EMBEDDING = "embedding"
    UNEMBEDDING = "unembedding"
    CODEBOOK = "codebook"
    LORA_A = "lora-a"
    LORA_B = "lora-b"
    ADAPTER = "adapter"
    BIAS = "bias"
    NORM_GAIN = "norm-gain"
    BATCH_NORM_GAIN = "batch-norm-gain"
    LAYER_SCALE = "layer-scale"
    RUNNING_MEAN = "running-mean"
    RUNNING_VAR = "running-var"
    SCALE = "scale"
    PACKED = "packed"
    QUANTIZED = "quantized"
    OPTIMIZER = "optimizer-state"
    MASTER = "master-weight"
    AVERAGE = "weight-average"
    BUFFER = "buffer"
    COUNTER = "counter"
    SCALAR = "scalar"
    VECTOR = "vector"
    OTHER = "other"


#: Roles whose values multiply activations: what the shape rules and unit rules are about.
MATRICES = frozenset(
    {
        Role.LINEAR, Role.CONV, Role.DEPTHWISE, Role.RECURRENT, Role.EXPERTS,
        Role.EMBEDDING, Role.UNEMBEDDING, Role.CODEBOOK, Role.LORA_A, Role.LORA_B,
    }
)  # fmt: skip
TABLES = frozenset({Role.EMBEDDING, Role.UNEMBEDDING, Role.CODEBOOK})
#: Factors of a product, each of which may be zero at the start of training; `idle-adapter` judges.
ADAPTERS = frozenset({Role.LORA_A, Role.LORA_B, Role.ADAPTER})
GAINS = frozenset({Role.NORM_GAIN, Role.BATCH_NORM_GAIN})
#: What training keeps beside the model.
TRAINING = frozenset({Role.OPTIMIZER, Role.MASTER, Role.AVERAGE})
#: Roles that were not trained: pooled statistics and health leave them out.
AUXILIARY = TRAINING | {
    Role.COUNTER, Role.BUFFER, Role.PACKED, Role.SCALE, Role.RUNNING_MEAN, Role.RUNNING_VAR,
}  # fmt: skip

#: What such a quantiser keeps beside it: moving counts and sums, whether it was initialised.
_CODE_STATE = r"_?(ema_)?cluster_(size|usage)|embed_avg|_?ema_d?w|codebook_used|init(ia|t)?[a-z]*ed"
#: Leaf names (or whole names) that decide alone, because nothing else is called so.
_BY_LEAF: tuple[tuple[Role, str], ...] = (
    (Role.COUNTER, r"num_batches_tracked|step|global_step"),
    (Role.RUNNING_MEAN, r"running_mean|moving_mean"),
    (Role.RUNNING_VAR, r"running_var|moving_variance|running_std"),
    (Role.OPTIMIZER, r"exp_avg(_sq)?|max_exp_avg_sq|momentum_buffer|square_avg|master_param"),
    (
        Role.SCALE,
        r"(weight|input|output|k|v|q|kv|act|activation|\w+_proj)_scale(_inv|_2)?|(\w+_)?scales|"
        r"scale_inv|scale_weight|(nested_)?absmax|(nested_)?quant_map|SCB|weight_global_scale",
    ),
    (
        Role.PACKED,
        r"qweight|qzeros|g_idx|weight_packed|weight_zero_point|zero_point|weight_shape|\w+_blocks|"
        r"quant_state.*|bitsandbytes__.*|_packed_params.*",
    ),
    (
        Role.BUFFER,
        r"position_ids|inv_freq|masked_bias|relative_position_index|relative_coords_table|"
        r"(\w+_)?mask|tril|triu|cos_cached|sin_cached|anchors|anchor_grid|mel_filters?|window|"
        r"rope_freqs\.weight",
    ),
    (Role.BUFFER, _CODE_STATE),
    (Role.LAYER_SCALE, r"gamma_?[12]?|lambda_?[12]?|ls[12]|layer_scale(_[12])?(_parameter)?"),
    (Role.SCALAR, r"logit_scale|logit_bias|temperature"),
    (Role.OTHER, r"A_log"),  # a state-space model's, initialised with equal rows
)
_OF_FACTOR = {"A": Role.LORA_A, "B": Role.LORA_B}
#: What tables of vectors are called, by the module that holds one or the parameter that is one.
_EMBEDDING = re.compile(
    r"wte|wpe|\w+_embd|\w*embed(ding|der)?s?|(\w+_)?emb|embed_(tokens|positions|in)\w*|"
    r"\w+_tokens?|tok|lut|relative_attention_bias",
    re.IGNORECASE,
)
#: Codebooks of vector quantisers: in a module of that name, or called so.
_CODEBOOK = re.compile(
    r"(^|.*\.)(_?codebooks?|codevectors)(\.\d+)?(\.weight)?|"
    r"(^|.*\.)\w*(vq|quantiz|codebook)\w*(\.\w+)?\."
    r"(_?embed(ding)?s?|embed(ding)?_sum|codebook)(\.weight)?",
    re.IGNORECASE,
)
#: Matrices of experts, stacked; JetMoE calls them by what they do alone.
_EXPERTS = re.compile(r"(experts?|moe)(\.|_|$)|(^|\.)(in|out)put_linear\.weight$")
_UNEMBEDDING = re.compile(
    r"(^|\.)(lm_head|embed_out|output_projection|unembed|predictions.decoder)$"
)
_NORM = re.compile(r"norm|(^|[._])(ln|bn|gn|rms)(_?\w*)?\d*$", re.IGNORECASE)
_ACTIVATION = re.compile(r"relu|(^|_)act(ivation)?(_fn)?_?\d*$", re.IGNORECASE)
_RECURRENT = re.compile(r"^(weight|bias)_(ih|hh)(_l\d+)?(_reverse)?$")


def roles(refs: Iterable[TensorRef]) -> dict[str, Role]:
    """The role of every tensor of one checkpoint, by name."""
    siblings: dict[str, dict[str, TensorRef]] = defaultdict(dict)
    places = []
    for ref in refs:
        factor = part(ref.name)
        module, leaf = _placed(ref.name, factor)
        siblings[module][leaf] = ref
        role = None if factor is None else _OF_FACTOR.get(factor.factor, Role.ADAPTER)
        places.append((ref, module, leaf, role))
    return {
        ref.name: _of_training(ref) or role or _role(ref, module, leaf, siblings[module])
        for ref, module, leaf, role in places
    }


def split(name: str) -> tuple[str, str]:
    """A tensor's module path and leaf name; an adapter's part is one leaf, however deep."""
    return _placed(name, part(name))


def _placed(name: str, factor: Factor | None) -> tuple[str, str]:
    if factor is not None:
        return factor.module, name[len(factor.module) :].strip(".")
    module, _, leaf = name.rpartition(".")
    return module, leaf


#: Roles of what training keeps, whatever it is called.
_BY_PART: Mapping[Part, Role] = {
    "optimizer": Role.OPTIMIZER,
    "master": Role.MASTER,
    "average": Role.AVERAGE,
    "other": Role.BUFFER,
}


def _of_training(ref: TensorRef) -> Role | None:
    """The role of what training keeps; None for a part of the model."""
    if ref.part not in _BY_PART:
        return None
    return _BY_PART[ref.part] if ref.numel > 1 else Role.COUNTER


def _role(ref: TensorRef, module: str, leaf: str, siblings: Mapping[str, TensorRef]) -> Role:
    for role in _called(leaf):
        if _fits(role, ref, siblings):
            return role
    if len(ref.shape) == 4 and re.search(r"(^|\.)(attn|attention)\.bias$", ref.name):
        return Role.BUFFER
    if ref.dtype in INTEGERS:
        return Role.PACKED if len(ref.shape) >= 2 and ref.numel > 4096 else Role.BUFFER
    if not ref.shape:
        return Role.SCALAR
    if leaf.startswith(("weight_", "bias_")) and _RECURRENT.match(leaf):
        return Role.RECURRENT if len(ref.shape) >= 2 else Role.BIAS
    if _is_vector(ref, leaf):
        return _vector(module, leaf, siblings)
    return _matrix(ref, module, leaf, siblings)


@lru_cache(4096)
def _called(leaf: str) -> tuple[Role, ...]:
    """The roles that a leaf's name can mean by itself; a large model has few leaf names."""
    return tuple(role for role, pattern in _BY_LEAF if re.fullmatch(pattern, leaf))


def _fits(role: Role, ref: TensorRef, siblings: Mapping[str, TensorRef]) -> bool:
    """Whether a name that means a role is borne by a tensor that can have it."""
    if role is Role.LAYER_SCALE:  # TensorFlow calls norm gains gamma, too
        return _long_dimensions(ref) <= 1 and "beta" not in siblings
    if role in (Role.RUNNING_MEAN, Role.RUNNING_VAR):
        return ref.dtype not in INTEGERS
    if role is Role.SCALE:
        return ref.dtype not in INTEGERS or ref.dtype == "U8"
    if role is Role.PACKED:
        return ref.dtype in INTEGERS
    return role is not Role.COUNTER or ref.numel == 1


def _long_dimensions(ref: TensorRef) -> int:
    return sum(n != 1 for n in ref.shape)


def _is_vector(ref: TensorRef, leaf: str) -> bool:
    """One dimension, or a parameter that was given others of length 1 to broadcast."""
    matrix = leaf in ("weight", "kernel", "w") or is_narrow(ref.dtype)
    return len(ref.shape) == 1 or (not matrix and _long_dimensions(ref) <= 1)


def _vector(module: str, leaf: str, siblings: Mapping[str, TensorRef]) -> Role:
    if "running_var" in siblings or "moving_variance" in siblings:
        return Role.BIAS if leaf in ("bias", "beta") else Role.BATCH_NORM_GAIN
    if leaf in ("bias", "beta", "b", "in_proj_bias") or leaf.endswith("_bias"):
        return Role.BIAS
    own = module.rpartition(".")[2]
    if _is_slope(own) or own == "lora_magnitude_vector":  # norms of columns
        return Role.VECTOR
    if leaf == "gamma" and "beta" in siblings:
        return Role.NORM_GAIN
    if leaf in ("weight", "g", "scale") and (_is_norm(own) or _alone(siblings)):
        return Role.NORM_GAIN
    return Role.NORM_GAIN if _is_norm(leaf) else Role.VECTOR


@lru_cache(4096)
def _is_norm(own: str) -> bool:
    return _NORM.search(own) is not None


@lru_cache(4096)
def _is_slope(own: str) -> bool:
    return _ACTIVATION.search(own) is not None


def _alone(siblings: Mapping[str, TensorRef]) -> bool:
    """A one-dimensional weight without a matrix beside it can only scale its input."""
    return all(len(s.shape) <= 1 for s in siblings.values()) and "weight" in siblings


def _matrix(ref: TensorRef, module: str, leaf: str, siblings: Mapping[str, TensorRef]) -> Role:
    if is_narrow(ref.dtype):
        return Role.QUANTIZED
    if len(ref.shape) in (2, 3) and _CODEBOOK.fullmatch(ref.name):
        return Role.CODEBOOK
    if len(ref.shape) == 3 and _EXPERTS.search(ref.name):
        return Role.EXPERTS
    if "bias" in leaf or is_offset(leaf):
        return Role.BIAS
    if role := _untrained_or_raw(ref, leaf, siblings):
        return role
    if len(ref.shape) == 2:
        return _two_dimensional(ref, module, leaf, siblings)
    if _EMBEDDING.fullmatch(leaf):
        return Role.EMBEDDING
    if len(ref.shape) in (3, 4, 5):
        return Role.DEPTHWISE if ref.shape[1] == 1 and ref.shape[0] > 1 else Role.CONV
    return Role.OTHER


def _untrained_or_raw(ref: TensorRef, leaf: str, siblings: Mapping[str, TensorRef]) -> Role | None:
    """The role of what no layer multiplies by, None for what one does.

    A leaf of unknown name is the matrix of its layer only where a bias of one of its lengths stands
    beside it and nothing else can be the matrix.
    """
    said = leaf_of(ref.name)
    if said is Leaf.LAYER:
        fixed = in_fixed_layer(ref.name) and not _biased(ref, siblings)
        return Role.BUFFER if fixed else None
    named = _EMBEDDING.fullmatch(leaf) or _UNEMBEDDING.search(ref.name) or leaf == "shared"
    if named and not is_average(leaf):
        return None
    if said is Leaf.UNKNOWN and _biased(ref, siblings):
        names = (n for n in siblings if n != leaf and "bias" not in n)
        return Role.BUFFER if any(leaf_of(n) is Leaf.LAYER for n in names) else None
    return Role.OTHER if said is Leaf.RAW else Role.BUFFER


def _biased(ref: TensorRef, siblings: Mapping[str, TensorRef], most: int = 64) -> bool:
    """Whether its layer has a bias of one of its lengths; names without modules are no layer."""
    if len(siblings) > most:
        return False
    return any(s.numel in ref.shape for name, s in siblings.items() if "bias" in name)


def _two_dimensional(
    ref: TensorRef, module: str, leaf: str, siblings: Mapping[str, TensorRef]
) -> Role:
    """A table of vectors or a matrix that multiplies; what has a bias beside it is not a table."""
    path = module if leaf in ("weight", "kernel", "w") else ref.name
    if re.search(r"(^|\.)experts\.mlp\.(w1|v1|w2)$", path):  # stacked along the rows
        return Role.EXPERTS
    if _UNEMBEDDING.search(path):
        return Role.UNEMBEDDING
    own = path.rpartition(".")[2]
    named = _EMBEDDING.fullmatch(own) or (own == "shared" and ref.shape[0] > ref.shape[1])
    if "bias" not in siblings and (named or (leaf == "weight" and _vocabulary_like(ref))):
        return Role.EMBEDDING
    return Role.LINEAR


def _vocabulary_like(ref: TensorRef) -> bool:
    """Far more rows than columns, and as many as vocabularies have."""
    return ref.shape[0] >= 16_000 and ref.shape[0] >= 16 * ref.shape[1]
