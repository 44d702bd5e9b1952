"""The file format ``gradscope.grads`` version 1: its keys, its meta, and how one is written."""

from __future__ import annotations

import io
import json
import os
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.lib import format as npy
from pydantic import BaseModel, ConfigDict, Field

from gradscope.text import quoted

FORMAT = "gradscope.grads"
VERSION = (1, 0)


@dataclass(frozen=True, slots=True)
class Key:
    """One array of the file, of T records, L layers, E edges, O optimizers, S sketches of k."""

    kinds: str
    shape: tuple[str, ...]
    note: str
    required: bool = False
    #: The field of ``History`` that it becomes, where it is one.
    field: str | None = None


#: Every key but ``meta``. ``kinds`` are NumPy's kinds of dtype.
KEYS: Mapping[str, Key] = {
    "steps": Key("iu", ("T",), "optimizer steps, strictly increasing", required=True),
    "loss": Key("f", ("T",), "NaN where unknown", field="loss"),
    "total_l2": Key("f", ("T",), "norm of all gradients before clipping", field="total_l2"),
    "clip_coef": Key("f", ("T",), "what clipping multiplied by", field="clip_coefficient"),
    "loss_scale": Key("f", ("T",), "of mixed precision", field="loss_scale"),
    "lr": Key("f", ("T", "G"), "learning rate of each parameter group", field="lr"),
    "skipped": Key("bui", ("T",), "1: mixed precision skipped the step", field="skipped"),
    "layer/name": Key("U", ("L",), "parameters, or modules", required=True),
    "layer/module": Key("U", ("L",), "the module that owns the parameter"),
    "layer/kind": Key("U", ("L",), "matrix, conv, bias, norm, embedding or other"),
    "layer/numel": Key("iu", ("L",), "elements; below 0 unknown"),
    "layer/group": Key("iu", ("L",), "column of lr; below 0 unknown"),
    "layer/optimizer": Key("iu", ("L",), "which of several optimizers has it; -1 none"),
    "optimizer/loss": Key("f", ("T", "O"), "of the step that each of several optimizers took",
                          field="optimizer_loss"),
    "layer/order": Key("iu", ("L",), "place in the forward pass; below 0 unknown"),
    "layer/tied_to": Key("iu", ("L",), "row that shares the storage; -1 none"),
    "grad/status": Key("ui", ("T", "L"), "0 not recorded, 1 recorded, 2 None, 3 frozen"),
    "grad/l2": Key("f", ("T", "L"), "L2 norm", required=True),
    "grad/max_abs": Key("f", ("T", "L"), "greatest magnitude", field="max_abs"),
    "grad/mean_abs": Key("f", ("T", "L"), "mean magnitude", field="mean_abs"),
    "grad/mean": Key("f", ("T", "L"), "mean", field="mean"),
    "grad/zero_frac": Key("f", ("T", "L"), "share of exact zeros", field="zero_fraction"),
    "grad/pos_frac": Key("f", ("T", "L"), "share of positive elements"),
    "grad/n_nan": Key("iu", ("T", "L"), "NaN elements; -1 unknown", field="n_nan"),
    "grad/n_inf": Key("iu", ("T", "L"), "infinite elements; -1 unknown", field="n_inf"),
    "grad/sketch": Key("f", ("S", "L", "k"), "count-sketch of the unit gradient"),
    "grad/sketch_index": Key("iu", ("S",), "record of each sketch"),
    "grad/prev_cos": Key("f", ("T", "L"), "cosine to an earlier gradient"),
    "grad/prev_lag": Key("iu", ("T", "L"), "how many records earlier; 0 none"),
    "param/l2": Key("f", ("T", "L"), "norm of the weights", field="param_l2"),
    "update/l2": Key("f", ("T", "L"), "norm of the step's change", field="update_l2"),
    "update/grad_cos": Key("f", ("T", "L"), "cosine of the change to the negative gradient",
                           field="update_cosine"),
    "micro/mean_sq": Key("f", ("T", "L"), "mean squared norm of micro-batch gradients",
                         field="micro_mean_square"),
    "micro/count": Key("iu", ("T",), "micro-batches", field="micro_count"),
    "graph/edges": Key("iu", ("E", "2"), "forward u, v; -1 the input, L the loss"),
    "edge/flow": Key("f", ("T", "E"), "RMS of v's share of the gradient at u's output",
                     field="edge_flow"),
    "unit/offset": Key("iu", ("L+1",), "first unit of each layer", field="unit_offset"),
    "unit/last_nonzero": Key("iu", ("N",), "last step with a gradient; -1 never",
                             field="unit_last_nonzero"),
}  # fmt: skip


class Meta(BaseModel):
    """The JSON of the key ``meta``. Other entries are kept and ignored."""

    model_config = ConfigDict(extra="allow", title="gradscope.grads meta")

    format: str = Field(pattern="^gradscope\\.grads$")
    version: tuple[int, int] = Field(description="major, minor; another major cannot be read")
    writer: str | None = None
    torch: str | None = None
    created: str | None = None
    run_id: str | None = None
    stage: str | None = Field(None, description="pre_clip, or pre_step: after clipping")
    reduction: str | None = Field(None, description="global or rank")
    rank: int | None = None
    world_size: int | None = None
    sketch: dict[str, Any] | None = Field(None, description="k, hash, seed, subset")
    optimizer: dict[str, Any] | None = Field(None, description="class, eps, betas, momentum")
    optimizers: dict[str, Any] | None = Field(
        None, description="the same of each of several, by name, in the order of layer/optimizer"
    )
    captures: int | None = Field(None, description="calls of the recorder so far")
    optimizer_steps: int | None = Field(
        None, description="steps that followed a call; fewer when gradients were unfinished"
    )
    started: str | None = Field(None, description="when the run began, ISO 8601")
    precision: dict[str, Any] | None = Field(None, description="param, grad, amp")
    batch_size: float | None = None
    accumulation: int | None = None
    topology: dict[str, Any] | None = Field(
        None, description="source: recorded, given or assumed-chain"
    )


def meta_schema() -> dict[str, Any]:
    """The JSON Schema of ``meta``, draft 2020-12."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": f"urn:{FORMAT}:{VERSION[0]}.{VERSION[1]}",
    } | Meta.model_json_schema()


def fault(arrays: Mapping[str, np.ndarray[Any, Any]], *, sorted_: bool = True) -> str | None:
    """What is wrong with the arrays of a file, by kind, shape and order; None when nothing is.

    Not ``sorted_``: steps may come in any order, though each once; they are sorted when read.
    """
    for name, key in KEYS.items():
        if key.required and name not in arrays:
            return f"has no {name}, which every {FORMAT} file must have"
    sizes = {"2": 2, "L": len(arrays["layer/name"]) if arrays["layer/name"].ndim else 0}
    for name, array in arrays.items():
        if name in KEYS and (reason := _misfit(KEYS[name], array, sizes)):
            return f"{name} {reason}"
    return _disorder(arrays, sorted_) or _broken_reference(arrays, sizes) or _impossible(arrays)


def _misfit(key: Key, array: np.ndarray[Any, Any], sizes: dict[str, int]) -> str | None:
    if array.dtype.kind not in key.kinds:
        return f"has dtype {array.dtype}, which does not fit what it holds ({key.note})"
    if array.ndim != len(key.shape):
        return f"has {array.ndim} dimensions instead of {len(key.shape)} ({', '.join(key.shape)})"
    for size, name in zip(array.shape, key.shape, strict=True):
        wanted = sizes["L"] + 1 if name == "L+1" else sizes.setdefault(name, size)
        if size != wanted:
            return f"has shape {list(array.shape)}, but elsewhere {name} is {wanted}"
    return None


def _broken_reference(
    arrays: Mapping[str, np.ndarray[Any, Any]], sizes: Mapping[str, int]
) -> str | None:
    layers = sizes["L"]
    for name, low, high in (
        ("graph/edges", -1, layers),
        ("layer/tied_to", -1, layers - 1),
        ("grad/sketch_index", 0, len(arrays["steps"]) - 1),
        ("grad/status", 0, 3),
    ):
        array = arrays.get(name)
        if (
            array is not None
            and array.size
            and not low <= int(array.min()) <= int(array.max()) <= high
        ):
            return f"{name} has values outside {low} to {high}"
    if len(set(arrays["layer/name"].tolist())) != layers:
        return "layer/name repeats a name"
    if ("grad/sketch" in arrays) != ("grad/sketch_index" in arrays):
        return "grad/sketch and grad/sketch_index must come together"
    return None


#: What must increase from entry to entry, and by at least how much.
_RISING = {"steps": 1, "grad/sketch_index": 1, "unit/offset": 0}


def _disorder(arrays: Mapping[str, np.ndarray[Any, Any]], sorted_: bool) -> str | None:
    for name, least in _RISING.items():
        found = arrays.get(name, np.empty(0, np.int64))
        if found.size and int(found.max()) > np.iinfo(np.int64).max:
            return f"{name} has {found.max()}, which is beyond 64-bit integers"
        found = found.astype(np.int64)
        any_order = name == "steps" and not sorted_
        order = np.argsort(found, kind="stable") if any_order else np.arange(len(found))
        found = found[order]
        falls = np.flatnonzero(found[1:] < found[:-1] + least)
        if len(falls):
            at = int(falls[0]) + 1
            place = "record" if name == "steps" else "entry"
            fall = f"{place} {order[at]} has {found[at]} after {found[at - 1]}"
            return f"{name} must increase, but {fall}"
    return None


def _impossible(arrays: Mapping[str, np.ndarray[Any, Any]]) -> str | None:
    """Norms below zero, and units that do not fit the layers."""
    for name in ("grad/l2", "grad/max_abs", "param/l2", "update/l2"):
        if name in arrays and bool(np.any(arrays[name] < 0)):
            at = np.argwhere(arrays[name] < 0)[0]
            return (
                f"{name} of {quoted(arrays['layer/name'][at[1]])} is below zero in record {at[0]}"
            )
    offsets, units = arrays.get("unit/offset"), arrays.get("unit/last_nonzero")
    if (offsets is None) != (units is None):
        return "unit/offset and unit/last_nonzero must come together"
    if offsets is not None and units is not None and (offsets[0], offsets[-1]) != (0, len(units)):
        return f"unit/offset must run from 0 to {len(units)}, the number of units"
    return None


def write(
    path: str | os.PathLike[str],
    arrays: Mapping[str, np.ndarray[Any, Any]],
    meta: Mapping[str, Any],
) -> None:
    """Write one file of the format: whole or not at all, and the same bytes for the same data.

    ``format`` and ``version`` of the meta are added. Raises ValueError for arrays that break the
    format.
    """
    with _staged(os.path.dirname(os.path.abspath(path)), arrays, meta) as temporary:
        os.replace(temporary, path)


def write_next(
    folder: str | os.PathLike[str],
    number: int,
    arrays: Mapping[str, np.ndarray[Any, Any]],
    meta: Mapping[str, Any],
) -> int:
    """As ``write``, to the first of ``number``.npz and those after it that nobody has.

    Never over another file, whoever writes to the folder at the same time. Returns the number.
    """
    with _staged(os.fspath(folder), arrays, meta) as temporary:
        while not _claimed(temporary, os.path.join(folder, f"{number:05d}.npz")):
            number += 1
    return number


def _claimed(temporary: str, path: str) -> bool:
    """Whether a file could be moved to a name that was free; its content is there at once."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        return False
    except OSError:  # a file system without links: the name first, then what is in it
        try:
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        except FileExistsError:
            return False
        try:
            os.replace(temporary, path)
        except OSError:
            os.unlink(path)
            raise
    return True


@contextmanager
def _staged(
    folder: str, arrays: Mapping[str, np.ndarray[Any, Any]], meta: Mapping[str, Any]
) -> Iterator[str]:
    """A whole file beside its place, under a name that readers pass over; gone afterwards."""
    if reason := fault(arrays):
        raise ValueError(reason)
    whole = {"format": FORMAT, "version": list(VERSION)} | dict(meta)
    Meta.model_validate(whole)
    text = json.dumps(whole, allow_nan=False).encode()
    handle, temporary = tempfile.mkstemp(prefix=".shard-", suffix=".npz", dir=folder)
    try:
        with os.fdopen(handle, "wb") as file:
            _write_zip(file, {"meta": np.frombuffer(text, np.uint8), **arrays})
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        yield temporary
    finally:
        with suppress(OSError):
            os.unlink(temporary)


#: Files of fewer bytes are put together in memory: the members' headers are many small writes.
_SMALL = 1 << 24


def _write_zip(file: Any, arrays: Mapping[str, np.ndarray[Any, Any]]) -> None:
    """As numpy.savez, but with a fixed time of day in every member; a small one in one go."""
    small = sum(array.nbytes for array in arrays.values()) < _SMALL
    target = io.BytesIO() if small else file
    with zipfile.ZipFile(target, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        for name, array in arrays.items():
            content = _npy_header(array.dtype, array.shape) + array.tobytes()
            archive.writestr(zipfile.ZipInfo(f"{name}.npy"), content)
    if small:
        file.write(target.getbuffer())


@lru_cache(maxsize=64)
def _npy_header(dtype: np.dtype[Any], shape: tuple[int, ...]) -> bytes:
    """What stands before an array's numbers; many arrays of a file have the same."""
    if dtype.hasobject:
        raise ValueError("arrays of Python objects cannot be written")
    header = io.BytesIO()
    facts = {"descr": npy.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    npy.write_array_header_1_0(header, facts)
    return header.getvalue()
