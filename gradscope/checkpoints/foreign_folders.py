"""Folders that hold a model which cannot be read as it lies there, and the command that helps."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence

from gradscope.checkpoints.bundles import zero_to_fp32
from gradscope.checkpoints.choice import candidates, is_dcp, is_index_name, names_in
from gradscope.checkpoints.foreign import is_stable_baselines, refuse_folder, unzip_policy
from gradscope.containers.beginning import Beginning
from gradscope.errors import InputError
from gradscope.text import listed, plural, quoted


def refuse_parts(path: str, names: Sequence[str]) -> None:
    """Raise InputError for a folder in whose files a model lies in another form than tensors.

    ``names`` are those of its files and folders. A whole model beside such parts is read.
    """
    if any(name.endswith(".distcp") for name in names) and not _has_model(names):
        refuse_folder(path, list(names))
    _zero3(path, names)
    if not (_has_model(names) or candidates(names)):
        _sharded_beside(path, names)
        _zipped(path, names)
        _tensorflow(path, names)
        _orbax(path, names)


def _has_model(names: Sequence[str]) -> bool:
    whole = ("model.safetensors", "pytorch_model.bin")
    return any(is_index_name(name) or name in whole for name in names)


def _zero3(path: str, names: Sequence[str]) -> None:
    """ZeRO-3 cuts every weight over the ranks, and leaves placeholders in the model states."""
    parts = [n for n in names if re.fullmatch(r"zero_pp_rank_\d+_mp_rank_\d+_model_states\.pt", n)]
    whole = any(re.fullmatch(r"mp_rank_\d+_model_states\.pt", name) for name in names)
    only_optimizer = any(name.endswith("_optim_states.pt") for name in names)
    if whole or _has_model(names) or not (parts or only_optimizer):
        return
    what = (
        f"a DeepSpeed ZeRO-3 checkpoint: each weight is cut over {plural(len(parts), 'rank')}"
        if parts
        else "the optimizer's states of a DeepSpeed checkpoint without the model's"
    )
    raise InputError(path, "unsupported", f"{what}; {zero_to_fp32(path)}")


def _sharded_beside(path: str, names: Sequence[str]) -> None:
    """A training checkpoint whose model lies in a folder of shards of its own."""
    for name in names:
        inside = os.path.join(path, name)
        if re.fullmatch(r"(pytorch_model|model)_fsdp(_\d+)?|sharded_model|dist_ckpt", name):
            where = f"the model lies in {quoted(name)}"
            held = names_in(inside, folders=True)
            try:
                if not is_dcp(held):
                    refuse_folder(inside, held)
            except InputError as error:
                raise InputError(path, error.kind, f"{where}, {error.message}") from None
            message = f"{where}; give that folder: `gradscope weights {inside}`"
            raise InputError(path, "unsupported", message)


def _zipped(path: str, names: Sequence[str]) -> None:
    zips = [name for name in names if name.endswith(".zip")]
    ours = [name for name in zips if is_stable_baselines(Beginning(os.path.join(path, name)))]
    if ours:
        what = f"holds Stable-Baselines3 models: {listed(map(quoted, ours), len(ours))}"
        raise InputError(
            path, "unsupported", f"{what}; {unzip_policy(os.path.join(path, ours[0]))}"
        )


def _tensorflow(path: str, names: Sequence[str]) -> None:
    data = [name for name in names if re.fullmatch(r".+\.data-\d{5}-of-\d{5}", name)]
    if data:
        what = f"a folder of TensorFlow checkpoints ({quoted(data[0])})"
        remedy = "TensorFlow is not read: load it where it was made and save with safetensors"
        raise InputError(path, "unsupported", f"{what}; {remedy}")


def _orbax(path: str, names: Sequence[str]) -> None:
    told = {"_CHECKPOINT_METADATA", "_METADATA", "_sharding", "manifest.ocdbt"} & set(names)
    if told or any(name.startswith("ocdbt.process_") for name in names):
        remedy = "restore it with orbax and save its arrays with safetensors.flax.save_file"
        raise InputError(path, "unsupported", f"an Orbax (JAX) checkpoint folder; {remedy}")
