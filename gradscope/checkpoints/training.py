"""What training keeps beside a model: an optimizer's state, master weights, averages."""

from __future__ import annotations

import re
from collections.abc import Iterable

from gradscope.checkpoints.tensors import Part
from gradscope.checkpoints.torch_pickle import TensorRecord
from gradscope.checkpoints.tree import NamedTensors, is_optimizer

_OPTIMIZER = re.compile(r"(^|_)optim|optimizer", re.IGNORECASE)
#: Running averages of the weights; where a model is beside them, they are not the model.
_AVERAGE = re.compile(
    r"(^|_)(ema|swa|polyak|averaged?|shadow|moving_average)(?=[_\d.A-Z]|$)"
    r"|(^|[a-z_])(EMA|Ema)(?=[A-Z_]|$)"
)
#: The weights in full precision that a mixed-precision optimizer updates.
_MASTER = re.compile(r"(^|_)(fp32|master)(_|$)")
_MOMENT = re.compile(
    r"(max_)?exp_avg(_sqs?)?(_row|_col)?|momentum_buffer|square_avg|acc_delta|exp_inf|state[12]"
    r"|sum|step"
)
_RANDOM = re.compile(r"rng|random|seed|cuda|cpu|generator")
#: Of the state of torch's generators, on the CPU and on GPUs.
_RANDOM_STATE = (5056, 16)


def is_optimizer_name(name: str) -> bool:
    """Whether an entry's name is that of an optimizer."""
    return _OPTIMIZER.search(name) is not None


def is_average(name: str) -> bool:
    """Whether an entry's name is that of averaged weights."""
    return _AVERAGE.search(name) is not None


def is_optimizer_state(name: str, node: object, tensors: NamedTensors) -> bool:
    """Whether an entry is the state of one or several optimizers, by structure or by name."""
    if is_optimizer(node) or (is_optimizer_name(name) and isinstance(node, (dict, list, tuple))):
        return True
    children: Iterable[object] = ()
    if isinstance(node, dict):
        children = node.values()
    elif isinstance(node, (list, tuple)):
        children = node
    found = list(children)
    return (bool(found) and all(map(is_optimizer, found))) or _are_moments(tensors)


def _are_moments(tensors: NamedTensors) -> bool:
    """What Megatron's distributed optimizer saves: tensors called like moments and nothing else."""
    leaves = [name.rpartition(".")[2] for name, _ in tensors]
    telling = any(leaf.startswith(("exp_avg", "momentum_buffer")) for leaf in leaves)
    return telling and all(leaf == "param" or _MOMENT.fullmatch(leaf) for leaf in leaves)


def part_in_optimizer(name: str) -> Part:
    """What a tensor inside an optimizer's entry is, by the keys that lead to it."""
    *above, leaf = name.split(".")
    if _MOMENT.fullmatch(leaf):
        return "optimizer"
    if leaf == "param" or any(_MASTER.search(key) for key in (*above, leaf)):
        return "master"
    return "average" if any(map(is_average, above)) else "optimizer"


def part_beside_model(name: str) -> Part:
    """What a tensor beside a model is, by the keys that lead to it."""
    return "average" if any(map(is_average, name.split("."))) else "other"


def is_random_state(name: str, record: TensorRecord) -> bool:
    """Whether a tensor is the state of one of torch's random number generators."""
    storage = record.storage
    return (
        storage is not None
        and _RANDOM.search(name) is not None
        and storage.kind == "ByteStorage"
        and len(record.shape) == 1
        and record.shape[0] in _RANDOM_STATE
    )
