"""What the operators of a recorded pass do, for methods that have a rule for each kind.

A recorded pass (``gradscope.models.tape``) has a few dozen operators, whatever the model is written
in. Those that no kind names are refused by name: a rule that does not fit would be a wrong map.
"""

from __future__ import annotations

from enum import StrEnum

from gradscope.errors import NotApplicableError
from gradscope.models.tape import Step


class Kind(StrEnum):
    """What an operator does with the tensors that depend on the image."""

    #: Puts elements elsewhere, repeats, drops or picks them: each result is one element.
    MOVE = "move"
    #: The same function of every element.
    ACTIVATION = "activation"
    #: Linear in the tensors taken, up to a constant.
    LINEAR = "linear"
    #: Linear with weights that rules may change: convolutions and dense layers.
    LAYER = "layer"
    #: Bilinear in two tensors taken, or their quotient.
    PRODUCT = "product"
    #: Centres and scales by statistics of what it takes.
    NORM = "norm"
    #: A batch norm, linear in evaluation mode.
    BATCH_NORM = "batch norm"
    #: The length of what it takes.
    LENGTH = "length"
    SOFTMAX = "softmax"


_MOVES = frozenset((
    "_adaptive_max_pool2d", "_reshape_alias", "_to_copy", "_unsafe_view", "adaptive_max_pool2d",
    "alias", "amax", "as_strided", "cat", "channel_shuffle", "clone", "constant_pad_nd", "copy",
    "detach", "diagonal", "expand", "flip", "gather", "im2col", "index", "index_select", "max",
    "masked_fill", "max_pool2d_with_indices", "maximum", "minimum", "native_channel_shuffle",
    "native_dropout", "permute", "pixel_shuffle", "pixel_unshuffle", "reflection_pad2d", "repeat",
    "replication_pad2d", "roll", "select", "slice", "split", "split_with_sizes", "squeeze",
    "stack", "t", "transpose", "unbind", "unfold", "unsqueeze", "upsample_nearest2d", "view",
    "where",
))  # fmt: skip
_ACTIVATIONS = frozenset((
    "_prelu_kernel", "abs", "celu", "clamp", "clamp_max", "clamp_min", "cos", "elu", "erf", "exp",
    "gelu", "hardsigmoid", "hardswish", "hardtanh", "leaky_relu", "log", "log_sigmoid_forward",
    "mish", "pow", "reciprocal", "relu", "relu6", "rrelu_with_noise", "rsqrt", "selu", "sigmoid",
    "silu", "sin", "softplus", "sqrt", "square", "tanh", "threshold",
))  # fmt: skip
_LINEAR = frozenset((
    "_adaptive_avg_pool2d", "add", "avg_pool2d", "col2im", "mean", "neg", "rsub", "sub", "sum",
    "upsample_bicubic2d", "upsample_bilinear2d",
))  # fmt: skip
_ADDING = frozenset(("addmm", "baddbmm"))
#: The second is TorchScript's; it ends with flags of libraries.
CONVOLUTIONS = frozenset(("convolution", "_convolution"))
_LAYERS = _ADDING | CONVOLUTIONS | {"bmm", "mm", "mv"}
_NORMS = frozenset(("_fused_rms_norm", "native_group_norm", "native_layer_norm"))
_LENGTHS = frozenset(("linalg_vector_norm",))
_SOFTMAX = frozenset(("_safe_softmax", "_softmax"))

#: Each gets its arguments in the order input, weight, bias, mean, variance, …, epsilon.
BATCH_NORMS = frozenset((
    "_native_batch_norm_legit_no_training", "cudnn_batch_norm", "miopen_batch_norm",
    "native_batch_norm",
))  # fmt: skip


def is_layer(step: Step) -> bool:
    """Whether it is a convolution or a dense layer, whose weights do not depend on the image."""
    return step.name in _LAYERS and _of_layer(step) is Kind.LAYER


def moves(step: Step) -> bool:
    """Whether each of its results is one of the elements that it takes."""
    return step.name in _MOVES


def kind(step: Step) -> Kind:
    """What a step does. Raises NotApplicableError for an operator that no kind names."""
    name, taken = step.name, len(step.inputs)
    if name in ("mul", "div"):
        # A constant over an image's values is a function of each of them.
        single = Kind.LINEAR if name == "mul" or 0 in step.inputs else Kind.ACTIVATION
        return Kind.PRODUCT if taken == 2 else single
    if name in _LAYERS:
        return _of_layer(step)
    if name == "addcmul" and not {1, 2} <= step.inputs.keys():
        return Kind.LINEAR
    for names, found in (
        (_MOVES, Kind.MOVE), (_ACTIVATIONS, Kind.ACTIVATION), (_LINEAR, Kind.LINEAR),
        (_NORMS, Kind.NORM), (BATCH_NORMS, Kind.BATCH_NORM), (_LENGTHS, Kind.LENGTH),
        (_SOFTMAX, Kind.SOFTMAX),
    ):  # fmt: skip
        if name in names:
            return found
    raise NotApplicableError(
        f"no rule for the operator {name}, which the model uses; use integrated-gradients, a CAM "
        "method or rise"
    )


def _of_layer(step: Step) -> Kind:
    """A layer where weights are constants, a product where both factors depend on the image."""
    factors = {1, 2} if step.name in _ADDING else {0, 1}
    dependent = factors & step.inputs.keys()
    alone = len(dependent) == len(step.inputs)
    if len(dependent) == 2:
        return Kind.PRODUCT
    # Where the bias depends on the image, or the sum is weighted, it is linear all the same.
    scaled = step.name in _ADDING and len(step.leaves) > 3
    kernel = step.name in CONVOLUTIONS and 0 not in dependent
    return Kind.LAYER if dependent and alone and not scaled and not kernel else Kind.LINEAR
