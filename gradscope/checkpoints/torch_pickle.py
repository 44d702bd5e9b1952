"""The pickles of torch: what their names stand for, and the records that tensors become."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO, cast

from gradscope.checkpoints.torch_names import object_in_place, runs_programs
from gradscope.containers.pickle_machine import Arguments, Dialect, Global, Instance, Machine
from gradscope.containers.pickles import PYTHON_CALLS, Unpickled, read_pickle, tuple_of
from gradscope.text import escaped

MAX_DIMENSIONS = 64
_INT64 = 1 << 63
_PROGRAM = (
    "names functions of the system or of the interpreter ({}), which torch.load would call: no "
    "checkpoint needs them. Nothing of it was executed here; do not load it, and take the weights "
    "from another source"
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
    #: The layout of the sparse tensor of which this is a part.
    sparse: str | None = None


@dataclass(frozen=True, slots=True)
class SparseRecord:
    """A sparse tensor: the dense ones that it consists of, by torch's names for them."""

    parts: Mapping[str, TensorRecord]


def read_torch_pickle(
    data: bytes | BinaryIO, path: str | Path, where: str, *, end: int | None = None
) -> Unpickled:
    """Read one pickle of torch's as data: tensors become TensorRecords, other objects Instances.

    Raises InputError as ``containers.pickles.read_pickle`` does; ``unsafe`` for one that would run
    programs.
    """
    dialect = Dialect(_CALLS, lambda name: not runs_programs(name), _storage)
    return read_pickle(data, path, where, dialect, end=end, refusal=_PROGRAM)


def storages_of(pickled: Unpickled) -> dict[str, StorageRecord]:
    """Every storage that a pickle refers to, by key; the first reference to one counts."""
    found: dict[str, StorageRecord] = {}
    for record in pickled.persisted:
        if isinstance(record, StorageRecord):
            found.setdefault(record.key, record)
    return found


# --- tensors and storages -------------------------------------------------------------------------


def _whole(value: object) -> int:
    if type(value) is not int or not 0 <= value < _INT64:
        raise ValueError("a tensor's offset, size or stride is not a whole number of 64 bits")
    return value


def extents(value: object) -> tuple[int, ...]:
    """A shape, or strides. Raises ValueError for anything else."""
    if not isinstance(value, (tuple, list)) or len(value) > MAX_DIMENSIONS:
        raise ValueError("a tensor's shape or strides are not a short tuple")
    return tuple(_whole(item) for item in value)


def _strided(storage: object, offset: object, shape: object, strides: object) -> TensorRecord:
    if not isinstance(storage, StorageRecord):
        raise ValueError("a tensor is built over something that is not a storage")
    record = TensorRecord(storage, _whole(offset), extents(shape), extents(strides))
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
    return _without_elements(
        record.shape,
        "a view whose conjugation or negation is pending: save its resolve_conj().resolve_neg()",
    )


def _quantized(_machine: Machine, args: Arguments) -> TensorRecord:
    record = _strided(args[0], args[1], args[2], args[3])
    return _without_elements(
        record.shape,
        "a tensor quantised by torch.ao: save its dequantize(), or its int_repr() with its scales "
        "and zero points",
    )


def _sparse(_machine: Machine, args: Arguments) -> TensorRecord | SparseRecord:
    """``(layout, (indices, values, size, …))``, or with two arrays of indices."""
    layout, parts = args[0], args[1]
    if not isinstance(parts, tuple):
        raise ValueError("a sparse tensor has no parts")
    shape = next((p for p in parts if isinstance(p, tuple)), ())
    tensors = [p for p in parts if isinstance(p, TensorRecord)]
    names = _SPARSE_PARTS.get(len(tensors))
    if names is None:
        return _without_elements(shape, "a sparse tensor of an unknown layout: save its to_dense()")
    said = layout.args[0] if isinstance(layout, Instance) and layout.args else "torch.sparse"
    kind = escaped(str(said), 40).removeprefix("torch.")
    parts = (replace(tensor, sparse=kind) for tensor in tensors)
    return SparseRecord(dict(zip(names, parts, strict=True)))


_SPARSE_PARTS: Mapping[int, tuple[str, ...]] = {
    2: ("indices", "values"),
    3: ("compressed_indices", "plain_indices", "values"),
}


def _nested(_machine: Machine, _args: Arguments) -> TensorRecord:
    return _without_elements((), "a nested tensor: save it padded (to_padded_tensor), or its parts")


def _meta(_machine: Machine, args: Arguments) -> TensorRecord:
    return _without_elements(
        extents(args[1]),
        "a tensor on the meta device, saved without values: load the weights onto a real device "
        "before saving",
    )


def _wrapper(_machine: Machine, args: Arguments) -> TensorRecord:
    """A tensor subclass that keeps its values in tensors of its own."""
    shape = args[2] if len(args) > 2 else ()
    name = args[0].name if isinstance(args[0], Global) else "a subclass of torch.Tensor"
    return _without_elements(extents(shape), object_in_place(escaped(name, 120)))


def _first(_machine: Machine, args: Arguments) -> object:
    return args[0]


def _attribute(machine: Machine, args: Arguments) -> object:
    """What protocol 2 writes for a method or an enumeration's member; the name is as telling."""
    owner, name = args
    if isinstance(owner, (Global, Instance)):
        return machine.find(owner.name, name)
    return Instance("builtins.getattr", args)


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
    return _without_elements(
        (), "a NumPy array inside the pickle: save it as torch.from_numpy(array)"
    )


_CALLS: Mapping[str, Callable[[Machine, Arguments], object]] = {
    **PYTHON_CALLS,
    "builtins.getattr": _attribute,
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
