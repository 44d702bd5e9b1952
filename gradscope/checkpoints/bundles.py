"""Folders whose own documents or layout say which files make up one model.

Each function takes a folder, the names of its files and of its folders, and returns what to read;
None where the folder is of another kind.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence

from gradscope.checkpoints.choice import (
    Choice,
    Part,
    candidates,
    holds_checkpoints,
    is_index_name,
    names_in,
)
from gradscope.checkpoints.tensors import Failure
from gradscope.containers.files import read_start, stamp
from gradscope.containers.strict_json import MalformedError, parse
from gradscope.errors import InputError, UsageError
from gradscope.text import listed, plural, quoted

_CAP = 10_000_000

ChooseFiles = Callable[[str], Choice]


def bundled(path: str, choose_files: ChooseFiles) -> Choice | None:
    """What a folder of several parts says of itself; None for a folder of plain files."""
    files = names_in(path)
    folders = sorted(set(names_in(path, folders=True)) - set(files))
    return (
        _pipeline(path, files)
        or _modules(path, files, choose_files)
        or _hub_cache(path, files, folders)
        or _deepspeed(path, files)
        or _tagged(path, files, folders)
        or _megatron(path, files, folders)
    )


def _json(path: str, name: str, files: Sequence[str]) -> object:
    """A document of the folder; None where it is absent or no JSON."""
    if name not in files:
        return None
    try:
        return parse(read_start(os.path.join(path, name), _CAP), name)
    except (InputError, MalformedError):
        return None


# Diffusers.

#: Classes without weights: what their names end in.
_WEIGHTLESS = ("Tokenizer", "TokenizerFast", "Scheduler", "Extractor", "Processor", "Guider")


def _pipeline(path: str, files: Sequence[str]) -> Choice | None:
    """Diffusers: ``model_index.json`` names each component's library and class."""
    described = _json(path, "model_index.json", files)
    if not isinstance(described, dict):
        return None
    named = {k: v for k, v in described.items() if isinstance(v, list) and not k.startswith("_")}
    parts = [name for name in named if _is_plain(name) and _has_weights(path, name)]
    if not parts:
        return None
    lost = [
        name
        for name, (_, kind, *_) in ((n, (*v, "", "")) for n, v in named.items())
        if name not in parts and isinstance(kind, str) and not kind.endswith(_WEIGHTLESS) and kind
    ]
    note = f"the {plural(len(parts), 'component')} of model_index.json were read: {_some(parts)}"
    beside = candidates(files)
    notes = [note, *([f"not read, beside them: {_some(beside)}"] if beside else [])]
    return Choice(
        tuple(Part(name, name) for name in parts),
        tuple(notes),
        tuple(_lost("model_index.json", lost)),
        prefixed=True,
    )


def _has_weights(path: str, folder: str) -> bool:
    inside = os.path.join(path, folder)
    return os.path.isdir(inside) and holds_checkpoints(names_in(inside))


def _is_plain(name: object) -> bool:
    """Whether a name stays inside the folder: a path could make us read, and show, any file."""
    return (
        isinstance(name, str)
        and name not in ("", ".", "..")
        and not any(char in name for char in "/\\\0:")
    )


def _lost(document: str, names: Sequence[str]) -> Iterator[Failure]:
    if names:
        what = f"{document} names {_some(names)}, whose weights are not in the folder"
        yield Failure("missing", f"{what}; fetch the whole folder again")


def _some(names: Sequence[str]) -> str:
    return listed(map(quoted, names), len(names), 8)


# Sentence transformers.

#: Modules that cannot be without weights, as the last word of their type.
_WEIGHTED = ("Transformer", "Dense", "LSTM", "CNN", "WordEmbeddings", "WeightedLayerPooling",
             "LayerNorm", "StaticEmbedding", "CLIPModel")  # fmt: skip


def _modules(path: str, files: Sequence[str], choose_files: ChooseFiles) -> Choice | None:
    """Sentence transformers: ``modules.json`` lists the modules and their folders."""
    described = _json(path, "modules.json", files)
    modules = _listed_modules(described)
    inside = [folder for folder in modules if folder and _has_weights(path, folder)]
    if not inside:
        lost = _unweighted(modules, inside, files)
        if not modules or not lost or not holds_checkpoints(files):
            return None
    own = choose_files(path) if holds_checkpoints(files) else Choice(())
    parts = (*map(_unprefixed, own.parts), *(Part(folder, folder) for folder in inside))
    named = [*(["the folder itself"] if own.parts else []), *map(quoted, inside)]
    note = f"the modules of modules.json were read: {listed(named, len(named), 8)}"
    failures = tuple(_lost("modules.json", _unweighted(modules, inside, files)))
    return Choice(parts, (*own.notes, note), (*own.failures, *failures), prefixed=True)


def _unprefixed(part: Part) -> Part:
    return Part(part.name)


def _listed_modules(described: object) -> Mapping[str, str]:
    """The folder of each module (the empty one is this folder) and its type."""
    if not isinstance(described, list):
        return {}
    items = [item for item in described if isinstance(item, dict)]
    found = {item.get("path"): str(item.get("type", "")) for item in items}
    return {str(k): v for k, v in found.items() if k == "" or _is_plain(k)}


def _unweighted(modules: Mapping[str, str], read: Sequence[str], files: Sequence[str]) -> list[str]:
    here = holds_checkpoints(files)
    return [
        folder or "the folder itself"
        for folder, kind in modules.items()
        if kind.endswith(_WEIGHTED) and folder not in read and not (folder == "" and here)
    ]


# The Hugging Face cache.


def _hub_cache(path: str, files: Sequence[str], folders: Sequence[str]) -> Choice | None:
    """``models--org--name``: the snapshot that ``refs/main`` names, or the only one."""
    if "snapshots" not in folders or holds_checkpoints(files):
        return None
    inside = names_in(os.path.join(path, "snapshots"), folders=True)
    main = _line(os.path.join(path, "refs", "main"))
    if not inside:
        raise InputError(path, "missing", "its folder snapshots is empty: download the model again")
    if main not in inside and len(inside) > 1:
        places = [os.path.join(path, "snapshots", name) for name in inside]
        raise UsageError(f"{path}: has {len(inside)} snapshots; name one of them: {_some(places)}")
    chosen = main if main in inside else inside[0]
    why = ", which refs/main names" if main == chosen else ""
    return Choice((Part(f"snapshots/{chosen}"),), (f"snapshots/{chosen}{why}, was read",))


def _line(path: str) -> str:
    """The first line of a small file; nothing where there is none."""
    try:
        stamp(path)
        return read_start(path, 200).decode("utf-8", "replace").strip().partition("\n")[0]
    except InputError:
        return ""


# DeepSpeed and Megatron.

_MODEL_STATES = re.compile(r"mp_rank_(\d+)_model_states\.pt")
_RANK_FOLDER = re.compile(r"mp_rank_\d+(_\d+)*")
_RANK_FILES = ("model_optim_rng.pt", "model_rng.pt")


def _deepspeed(path: str, files: Sequence[str]) -> Choice | None:
    """One step of DeepSpeed below ZeRO-3: whole weights, a file for each model-parallel rank."""
    ranks = [name for name in files if _MODEL_STATES.fullmatch(name)]
    layers = [n for n in files if re.fullmatch(r"layer_\d+.*-?model_states\.pt", n)]
    if not ranks:
        return None
    parts = [*ranks, *layers]
    notes = [f"a DeepSpeed checkpoint; read: {_some(parts)}"]
    if any("optim_states" in name for name in files):
        notes.append(
            "the optimizer's states, with the weights in float32 that it updates, were not read; "
            f"{zero_to_fp32(path)}"
        )
    return Choice(tuple(Part(n, n.removesuffix("_model_states.pt")) for n in parts), tuple(notes))


def zero_to_fp32(path: str) -> str:
    """How to join what DeepSpeed's ranks hold into one file."""
    run = os.path.dirname(os.path.abspath(path)) if _is_step(path) else os.path.abspath(path)
    script = "python zero_to_fp32.py"
    if not os.path.exists(os.path.join(run, "zero_to_fp32.py")):
        script = "python -m deepspeed.utils.zero_to_fp32"
    shown = os.path.relpath(run) if not os.path.relpath(run).startswith("..") else run
    return (
        f"`cd {shown} && {script} . pytorch_model.bin` joins them, then "
        f"`gradscope weights pytorch_model.bin`"
    )


def _is_step(path: str) -> bool:
    return any(name.endswith("_states.pt") for name in names_in(path))


def _tagged(path: str, files: Sequence[str], folders: Sequence[str]) -> Choice | None:
    """A run whose file ``latest`` (DeepSpeed) or tracker (Megatron) names the folder of a step."""
    if candidates(files) or any(map(is_index_name, files)):
        return None
    for name in ("latest", "latest_checkpointed_iteration.txt"):
        if name in files:
            tag = _line(os.path.join(path, name))
            step = f"iter_{int(tag):07d}" if tag.isdecimal() and len(tag) < 10 else tag
            if step in folders and _is_plain(step):
                return Choice((Part(step),), (f"{step} was read, which {name} names",))
    return None


def _megatron(path: str, files: Sequence[str], folders: Sequence[str]) -> Choice | None:
    """One iteration of Megatron-LM: a folder for each model-parallel rank."""
    ranks = [f for f in folders if _RANK_FOLDER.fullmatch(f)]
    held = [(f, n) for f in ranks for n in _RANK_FILES if _exists(path, f, n)]
    if not held or holds_checkpoints(files):
        return None
    parts = tuple(Part(f"{folder}/{name}", folder) for folder, name in held)
    lost = [folder for folder in ranks if folder not in dict(held)]
    note = (
        f"a Megatron-LM checkpoint of {plural(len(held), 'rank')}; read: {_some(list(dict(held)))}"
    )
    return Choice(parts, (note,), tuple(_lost("the numbering of ranks", lost)))


def _exists(*path: str) -> bool:
    return os.path.isfile(os.path.join(*path))
