"""A fake accelerator that computes: finds cpu/device mixing on machines without a GPU.

``register()`` adds a torch device ``fakegpu`` written in Python on the PrivateUse1 dispatch key.
Its tensors are empty shells; their values are CPU tensors kept aside under the shell's storage.
Every operation comes to ``_fallback``, which checks that its tensors are on one device as CUDA
does, runs it on the values, and wraps the results. ``numpy()`` fails on a shell, ``to`` and
``cpu`` copy, and ``torch.accelerator`` reports the device.

The API is experimental and registration is for good: use it in a process of its own
(see test_fakegpu.py). What it does not have: TorchScript, torch.Generator, torch.quantile, and
loading straight onto it (``torch.load(map_location=...)`` crashes), so load on the CPU first.
"""

from __future__ import annotations

import contextlib
import threading
from collections import Counter
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map_only

NAME = "fakegpu"

#: How often each operation ran on the device, under names such as ``aten::add``. Copies count as
#: SENT or FETCHED, by direction.
CALLS: Counter[str] = Counter()
SENT, FETCHED = "to the device", "to the host"

#: Operations that make the host wait for the device on CUDA, transfers to the host aside.
WAITING = frozenset(
    {"aten::_local_scalar_dense", "aten::nonzero", "aten::bincount", "aten::masked_select"}
    | {"aten::equal", "aten::is_nonzero", "aten::_unique2", "aten::unique_consecutive"}
)

#: Operations that take tensors of both devices: copies, and indexing by CPU indices.
_MIXING = frozenset(
    {"aten::copy_", "aten::_copy_from", "aten::index"}
    | {"aten::index_put", "aten::index_put_", "aten::_index_put_impl_"}
)

# Storage of a shell -> its values, and the storage itself. Holding the storage keeps its address
# from being used again, and its use count above one, which stops autograd from accumulating into
# tensors in place whose values others share.
_values: dict[int, tuple[Tensor, Any]] = {}
_lock = threading.RLock()
_libraries: list[torch.library.Library] = []


def missing() -> str | None:
    """Why this torch cannot have the device, or None."""
    try:
        from torch.utils.backend_registration import (  # noqa: F401
            _setup_privateuseone_for_python_backend,
        )
    except ImportError as error:
        return f"torch {torch.__version__} has no Python backends: {error}"
    accelerator = getattr(torch._C, "_acc", None)
    if not hasattr(accelerator, "create_empty_tensor"):
        return f"torch {torch.__version__} has no torch._C._acc.create_empty_tensor"
    return None


def register() -> None:
    """Add the device to this process."""
    from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

    _setup_privateuseone_for_python_backend(NAME, backend_module=_backend())
    library: Any = torch.library.Library  # its methods are untyped
    everything = library("_", "IMPL", "PrivateUse1")
    everything.fallback(_fallback, "PrivateUse1")
    aten = library("aten", "IMPL")
    for name, function in {
        "_copy_from": _copy_from,
        "empty.memory_format": _empty,
        "empty_strided": _empty_strided,
        "convolution_overrideable": _convolution,
        "convolution_backward_overrideable": _convolution_backward,
    }.items():
        aten.impl(name, function, "PrivateUse1")
    autocast = library("_", "IMPL", "AutocastPrivateUse1")
    autocast.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    _libraries.extend([everything, aten, autocast])  # they unregister when collected


def _backend() -> Any:
    """What stands at ``torch.fakegpu``: the functions that torch.accelerator and autocast ask."""
    from torch.utils.backend_registration import _DummyBackendModule

    class Backend(_DummyBackendModule):
        class device(contextlib.nullcontext[None]):  # noqa: N801
            def __init__(self, _: object) -> None:
                super().__init__()
                self.idx = 0

        def synchronize(self, *_: object) -> None:
            pass

        def empty_cache(self) -> None:
            pass

        def memory_allocated(self, *_: object) -> int:
            return 0

        def max_memory_allocated(self, *_: object) -> int:
            return 0

        def reset_peak_memory_stats(self, *_: object) -> None:
            pass

        def get_device_name(self, *_: object) -> str:
            return "Fake GPU"

        def get_amp_supported_dtype(self) -> list[torch.dtype]:
            return [torch.bfloat16, torch.float16]

        def manual_seed(self, seed: int) -> None:
            pass

    return Backend()


# -- shells and their values -----------------------------------------------------------------------


def _is_shell(tensor: Tensor) -> bool:
    return tensor.device.type == NAME


def _wrap(values: Tensor) -> Tensor:
    accelerator: Any = torch._C._acc
    shell: Tensor = accelerator.create_empty_tensor(tuple(values.shape), values.dtype)
    storage: Any = shell.untyped_storage()
    with _lock:
        _values[storage._cdata] = (values.detach(), storage)
        if len(_values) % 256 == 0:
            _collect()
    return shell


def _collect() -> None:
    """Forget the values of shells that are gone, whose storage nothing but ``_values`` uses."""
    count: Any = torch._C._storage_Use_Count
    for key in [key for key in _values if count(key) <= 1]:
        del _values[key]


def _unwrap(shell: Tensor) -> Tensor:
    storage: Any = shell.untyped_storage()
    values = _values[storage._cdata][0]
    if values.dtype != shell.dtype:  # view(dtype) makes a shell of the same storage by itself
        values = values.contiguous().view(shell.dtype)
    if values.shape != shell.shape and values.numel() == shell.numel():
        return values.reshape(shell.shape)
    return values


def _refit(shell: Tensor) -> None:
    """Give a shell the shape that its values took, by ``out=`` or ``resize_``."""
    values = _unwrap(shell)
    if shell.numel() != values.numel():
        shell.data = _wrap(values)


def _check(name: str, tensors: list[Tensor]) -> None:
    """Refuse what CUDA refuses: tensors of both devices, CPU scalars aside."""
    if any(map(_is_shell, tensors)) and any(not _is_shell(t) and t.dim() > 0 for t in tensors):
        raise RuntimeError(
            f"{name}: Expected all tensors to be on the same device, but found at least two "
            f"devices, {NAME}:0 and cpu!"
        )


# -- operations ------------------------------------------------------------------------------------


def _fallback(operation: Any, *args: Any, **kwargs: Any) -> Any:
    """Run any operation on the values of its arguments."""
    name: str = operation._schema.name
    CALLS[name] += 1
    tensors = [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, Tensor)]
    if name not in _MIXING:
        _check(name, tensors)
    shells: dict[int, Tensor] = {}

    def unwrap(tensor: Tensor) -> Tensor:
        if not _is_shell(tensor):
            return tensor
        values = _unwrap(tensor)
        shells[id(values)] = tensor
        return values

    def rewrap(tensor: Tensor) -> Tensor:
        return shells[id(tensor)] if id(tensor) in shells else _wrap(tensor)

    inner_args, inner_kwargs = tree_map_only(Tensor, unwrap, (args, kwargs))
    inner_args, inner_kwargs = tree_map_only(torch.device, _cpu, (inner_args, inner_kwargs))
    with torch.no_grad():
        result = _run(operation, inner_args, inner_kwargs)
    for shell in shells.values():
        _refit(shell)
    return tree_map_only(Tensor, rewrap, result)


def _run(operation: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Shells look contiguous whatever their values are, so what relies on strides needs help."""
    name = operation._schema.name
    if name in ("aten::view", "aten::_unsafe_view", "aten::_reshape_alias"):
        return args[0].reshape(args[1])
    if name == "aten::as_strided":
        return args[0].contiguous().as_strided(*args[1:], **kwargs)
    kinds = [str(argument.type) for argument in operation._schema.arguments]
    args = tuple(map(_as_tensor, args, kinds))
    return operation(*args, **kwargs)


def _as_tensor(value: Any, kind: str) -> Any:
    """Undo torch's unpacking of numbers that stand for tensors, as in ``x % 3``."""
    return torch.tensor(value) if kind == "Tensor" and isinstance(value, (int, float)) else value


def _cpu(device: torch.device) -> torch.device:
    return torch.device("cpu") if device.type == NAME else device


def _copy_from(source: Tensor, target: Tensor, non_blocking: bool = False) -> Tensor:
    if not _is_shell(source):
        CALLS[SENT] += 1
    elif not _is_shell(target):
        CALLS[FETCHED] += 1
    values = _unwrap(source) if _is_shell(source) else source
    (_unwrap(target) if _is_shell(target) else target).copy_(values)
    return target


def _empty(size: Any, *, dtype: torch.dtype | None = None, **_: Any) -> Tensor:
    return _wrap(torch.empty(size, dtype=dtype or torch.get_default_dtype()))


def _empty_strided(size: Any, stride: Any, *, dtype: torch.dtype | None = None, **_: Any) -> Tensor:
    return _wrap(torch.empty_strided(size, stride, dtype=dtype or torch.get_default_dtype()))


def _convolution(x: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> Tensor:
    _check("aten::convolution", [t for t in (x, weight, bias) if t is not None])
    values = None if bias is None else _unwrap(bias)
    return _wrap(torch.ops.aten.convolution(_unwrap(x), _unwrap(weight), values, *rest))


def _convolution_backward(
    gradient: Tensor, x: Tensor, weight: Tensor, *rest: Any
) -> tuple[Tensor | None, ...]:
    stride, padding, dilation, transposed, output_padding, groups, mask = rest
    bias_sizes = [weight.shape[1] * groups if transposed else weight.shape[0]]
    gradients = torch.ops.aten.convolution_backward(
        _unwrap(gradient), _unwrap(x), _unwrap(weight), bias_sizes,
        stride, padding, dilation, transposed, output_padding, groups, mask,
    )  # fmt: skip
    return tuple(None if g is None else _wrap(g) for g in gradients)
