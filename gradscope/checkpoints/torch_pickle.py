"""The pickles of torch: what their names stand for, and the records that tensors become."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

from gradscope.containers.pickle_machine import Arguments, Dialect, Global, Machine
from gradscope.containers.pickles import (
    PYTHON_CALLS,
    PYTHON_INERT,
    Unpickled,
    read_pickle,
    tuple_of,
)

MAX_DIMENSIONS = 64
_INT64 = 1 << 63
_ADVICE = (
    "save just the state dict: torch.save(model.state_dict(), 'weights.pt') or "
    "safetensors.torch.save_file(model.state_dict(), 'weights.safetensors')"
)


@dataclass(frozen=True, slots=True)
class StorageRecord:
    """A persistent id of torch: which storage, of which class, with how many elements."""

    kind: str
    key: str
    numel: int
    #: ``(key, offset, numel)`` of a view, in legacy files of old versions.
    view: tuple[str, int, int] | None = None


@dataclass(frozen=True, slots=True)
class TensorRecord:
    """A strided tensor over a storage; ``unreadable`` says why there are no plain elements."""

    storage: StorageRecord | None
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: str | None = None
    unreadable: str | None = None


def read_torch_pickle(
    data: bytes | BinaryIO,
    path: str | Path,
    where: str,
    *,
    end: int | None = None,
    allow: Callable[[str], bool] = lambda _name: False,
) -> Unpickled:
    """Read one pickle of torch's as data: tensors become TensorRecords.

    ``allow`` widens the closed list of names that may occur; all become inert records. Raises
    InputError as ``containers.pickles.read_pickle`` does.
    """
    dialect = Dialect(_CALLS, lambda name: _is_inert(name) or allow(name), _storage)
    return read_pickle(data, path, where, dialect, end=end, advice=_ADVICE)


def storages_of(pickled: Unpickled) -> dict[str, StorageRecord]:
    """Every storage that a pickle refers to, by key; the first reference to one counts."""
    found: dict[str, StorageRecord] = {}
    for record in pickled.persisted:
        if isinstance(record, StorageRecord):
            found.setdefault(record.key, record)
    return found


# --- names that may occur -------------------------------------------------------------------------

_STORAGE = re.compile(r"torch\.(cuda\.|storage\.)?\w{1,32}Storage")
_TENSOR_TYPE = re.compile(r"torch\.(cuda\.)?\w{1,16}Tensor")
_DTYPE = re.compile(
    r"torch\.(u?int\d{1,2}|float\d{1,2}|float[48]_\w{1,16}|bfloat16|complex\d{2,3}|bool|half|double"
    r"|float|long|int|short|q?u?int\d{1,2}|quint\dx\d|bits\d{1,2}(x\d)?)"
)
_NUMPY = re.compile(
    r"numpy\.(dtype|ndarray|bool_?|u?int\d{1,2}|float\d{1,3}|complex\d{2,3}|str_|bytes_"
    r"|dtypes\.\w{1,32}DType|_?core\.multiarray\.(scalar|_reconstruct)"
    r"|_?core\.numeric\._frombuffer)"
)
_INERT = PYTHON_INERT | frozenset(
    {
        "torch.Tensor", "torch.device", "torch.memory_format", "torch.serialization._get_layout",
        "torch.nn.parameter.Buffer", "torch.nn.parameter.Parameter",
        "torch.channels_last", "torch.contiguous_format", "torch.preserve_format",
        "torch.strided", "torch.per_tensor_affine", "torch.per_tensor_symmetric",
        "torch.per_channel_affine", "torch.per_channel_symmetric",
        "torch.per_channel_affine_float_qparams", "torch.torch_version.TorchVersion",
    }
)  # fmt: skip


def _is_inert(name: str) -> bool:
    return name in _INERT or any(
        pattern.fullmatch(name) for pattern in (_STORAGE, _TENSOR_TYPE, _DTYPE, _NUMPY)
    )


# --- tensors and storages -------------------------------------------------------------------------


def _whole(value: object) -> int:
    if type(value) is not int or not 0 <= value < _INT64:
        raise ValueError("a tensor's offset, size or stride is not a whole number of 64 bits")
    return value


def _extents(value: object) -> tuple[int, ...]:
    if not isinstance(value, (tuple, list)) or len(value) > MAX_DIMENSIONS:
        raise ValueError("a tensor's shape or strides are not a short tuple")
    return tuple(_whole(item) for item in value)


def _strided(storage: object, offset: object, shape: object, strides: object) -> TensorRecord:
    if not isinstance(storage, StorageRecord):
        raise ValueError("a tensor is built over something that is not a storage")
    record = TensorRecord(storage, _whole(offset), _extents(shape), _extents(strides))
    if len(record.shape) != len(record.strides):
        raise ValueError("a tensor has a different number of sizes and strides")
    return record


def _without_elements(shape: tuple[int, ...], why: str) -> TensorRecord:
    return TensorRecord(None, 0, shape, (), unreadable=why)


def _tensor(_machine: Machine, args: Arguments) -> TensorRecord:
    storage, offset, shape, strides = args[:4]
    return _with_bits(_strided(storage, offset, shape, strides), args[6:7])


def _tensor_v3(_machine: Machine, args: Arguments) -> TensorRecord:
    storage, offset, shape, strides = args[:4]
    dtype = args[6]
    if not isinstance(dtype, Global):
        raise ValueError("a tensor's dtype is not a dtype")
    record = _with_bits(_strided(storage, offset, shape, strides), args[7:8])
    return TensorRecord(
        record.storage, record.offset, record.shape, record.strides, dtype.name, record.unreadable
    )


def _with_bits(record: TensorRecord, metadata: Arguments) -> TensorRecord:
    """Conjugation and negation may be pending: what is stored is then not the tensor's values."""
    bits = metadata[0] if metadata else None
    if not isinstance(bits, dict) or not (bits.get("conj") or bits.get("neg")):
        return record
    return _without_elements(record.shape, "a lazily conjugated or negated view")


def _quantized(_machine: Machine, args: Arguments) -> TensorRecord:
    record = _strided(args[0], args[1], args[2], args[3])
    return _without_elements(record.shape, "quantized tensor")


def _sparse(_machine: Machine, _args: Arguments) -> TensorRecord:
    return _without_elements((), "sparse tensor")


def _nested(_machine: Machine, _args: Arguments) -> TensorRecord:
    return _without_elements((), "nested tensor")


def _meta(_machine: Machine, args: Arguments) -> TensorRecord:
    return _without_elements(_extents(args[1]), "meta tensor: saved without values")


def _wrapper(_machine: Machine, _args: Arguments) -> TensorRecord:
    return _without_elements((), "tensor subclass without a storage")


def _first(_machine: Machine, args: Arguments) -> object:
    return args[0]


def _from_type(machine: Machine, args: Arguments) -> object:
    function, _type, arguments, _state = args
    if not isinstance(function, Global) or not isinstance(arguments, tuple):
        raise ValueError("a tensor with attributes is not built by a function")
    return machine.call(function, arguments)


def _storage(pid: object) -> object:
    """The storage that a persistent id names; a legacy file also marks its module classes."""
    if isinstance(pid, tuple) and len(pid) == 4 and pid[0] == "module":
        return pid[1]
    if (
        not isinstance(pid, tuple)
        or len(pid) not in (5, 6)
        or pid[0] not in ("storage", b"storage")
    ):
        raise ValueError("a persistent id is not that of a torch storage")
    kind, key, numel = pid[1], pid[2], pid[4]
    if not isinstance(kind, Global) or not isinstance(key, (str, int)):
        raise ValueError("a persistent id is not that of a torch storage")
    view = _view(pid[5]) if len(pid) == 6 and pid[5] is not None else None
    return StorageRecord(kind.name.rpartition(".")[2], str(key), _whole(numel), view)


def _view(metadata: object) -> tuple[str, int, int]:
    key, offset, numel = cast("tuple[object, object, object]", metadata)
    if not isinstance(key, (str, int)):
        raise ValueError("a storage view has no key")
    return str(key), _whole(offset), _whole(numel)


def _numpy_array(_machine: Machine, _args: Arguments) -> TensorRecord:
    return _without_elements((), "NumPy array inside the pickle")


_CALLS: Mapping[str, Callable[[Machine, Arguments], object]] = {
    **PYTHON_CALLS,
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor_v3,
    "torch._utils._rebuild_parameter": _first,
    "torch._utils._rebuild_parameter_with_state": _first,
    "torch._utils._rebuild_device_tensor_from_cpu_tensor": _first,
    "torch._utils._rebuild_device_tensor_from_numpy": _first,
    "torch._utils._rebuild_xla_tensor": _first,
    "torch._utils._rebuild_qtensor": _quantized,
    "torch._utils._rebuild_sparse_tensor": _sparse,
    "torch._utils._rebuild_sparse_csr_tensor": _sparse,
    "torch._utils._rebuild_nested_tensor": _nested,
    "torch._utils._rebuild_meta_tensor_no_storage": _meta,
    "torch._utils._rebuild_wrapper_subclass": _wrapper,
    "torch._tensor._rebuild_from_type_v2": _from_type,
    "torch._tensor._rebuild_from_type": _from_type,
    "torch.Size": tuple_of,
    "torch.jit._pickle.build_intlist": _first,
    "torch.jit._pickle.build_doublelist": _first,
    "torch.jit._pickle.build_boollist": _first,
    "torch.jit._pickle.build_tensorlist": _first,
    "torch.jit._pickle.restore_type_tag": _first,
    "numpy.core.multiarray._reconstruct": _numpy_array,
    "numpy._core.multiarray._reconstruct": _numpy_array,
    "numpy.core.numeric._frombuffer": _numpy_array,
    "numpy._core.numeric._frombuffer": _numpy_array,
}
