"""The names in torch's pickles: which are plain data, which run programs, which mean tensors.

Nothing is ever built or called, so these lists protect nobody; they are for what is said of a file.
"""

from __future__ import annotations

import builtins
import re

from gradscope.containers.pickles import PYTHON_CALLS, PYTHON_INERT

# --- plain data -----------------------------------------------------------------------------------

_PLAIN = PYTHON_INERT | frozenset(PYTHON_CALLS) | frozenset(
    {
        "torch.Size", "torch.Tensor", "torch.device", "torch.memory_format",
        "torch.serialization._get_layout",
        "torch.nn.parameter.Buffer", "torch.nn.parameter.Parameter",
        "torch.channels_last", "torch.contiguous_format", "torch.preserve_format",
        "torch.strided", "torch.per_tensor_affine", "torch.per_tensor_symmetric",
        "torch.per_channel_affine", "torch.per_channel_symmetric",
        "torch.per_channel_affine_float_qparams", "torch.torch_version.TorchVersion",
    }
)  # fmt: skip
_PLAIN_PATTERN = re.compile(
    r"torch\.((cuda\.|storage\.)?\w{1,32}Storage|(cuda\.)?\w{1,16}Tensor"
    r"|u?int\d{1,2}|float\d{1,2}|float[48]_\w{1,16}|bfloat16|complex\d{2,3}|bool|half|double"
    r"|float|long|int|short|q?u?int\d{1,2}|quint\dx\d|bits\d{1,2}(x\d)?"
    r"|(_utils|_tensor|jit\._pickle)\.\w{1,64})"
    r"|numpy\.(dtype|ndarray|bool_?|u?int\d{1,2}|float\d{1,3}|complex\d{2,3}|str_|bytes_"
    r"|dtypes\.\w{1,32}DType|_?core\.(multiarray|numeric)\.\w{1,32})"
    r"|__torch__\..*"
)


def is_plain(name: str) -> bool:
    """Whether a name belongs to tensors, numbers, text and containers: no class of a program."""
    return name in _PLAIN or _PLAIN_PATTERN.fullmatch(name) is not None


# --- programs -------------------------------------------------------------------------------------

#: Modules whose functions reach beyond the pickle; no checkpoint keeps their objects.
_MACHINE = re.compile(
    r"(os|posix|nt|subprocess|sys|shutil|socket|_socket|runpy|importlib|_imp|imp|pty|ctypes|_ctypes"
    r"|code|codeop|pickle|_pickle|marshal|webbrowser|pip|pkgutil|zipimport|pydoc|pdb|bdb|timeit"
    r"|cProfile|profile|trace|doctest|asyncio|signal|ftplib|smtplib|telnetlib|urllib\.request"
    r"|http\.client|http\.server|requests|httpx|aiohttp|linecache|commands)\..+"
    # The same through a module that imports them: torch.serialization.os.system.
    r"|.*\.(os|posix|nt|subprocess|sys|shutil|socket|runpy|importlib|pty|ctypes|builtins)\..+"
    r"|_?io\.(open|open_code|FileIO)|tempfile\..+"
    r"|pathlib\..*\.(touch|unlink|write_\w+|open|rmdir|mkdir|rename|replace|chmod|\w+_to)"
    r"|torch\.(load|hub\..+|jit\.load|serialization\.load|utils\.cpp_extension\..+)"
    r"|numpy\.(load|testing\..*runstring)"
)


def runs_programs(name: str) -> bool:
    """Whether a pickle that names this was made to do something when it is loaded."""
    module, _, attribute = name.partition(".")
    if module == "builtins" and attribute != "getattr":  # as enumerations and methods are saved
        return not isinstance(getattr(builtins, attribute.partition(".")[0], None), type)
    return _MACHINE.fullmatch(name) is not None


# --- tensors without plain elements ---------------------------------------------------------------

_TENSOR_LIKE = re.compile(
    r"(.*\.)?_rebuild_\w+|(.*\.)?\w*(Tensor|Parameter|Params4bit|Int8Params|Array)"
)
_ADVICE: tuple[tuple[str, str], ...] = (
    (
        r".*\.(DTensor|ShardedTensor)",
        "a part of a tensor that is distributed over processes ({}): gather it before saving "
        "(tensor.full_tensor(), or a full state dict), or save with torch.distributed.checkpoint",
    ),
    (r"torchao\..*", "a tensor quantised by torchao ({}): dequantize() and save it"),
    (r"bitsandbytes\..*", "a tensor quantised by bitsandbytes ({}): dequantise it, then save it"),
    (
        r".*\.Uninitialized(Parameter|Buffer)",
        "a lazy parameter without values ({}): run the model once before saving",
    ),
    (r"jax.*", "an array of JAX ({}): save it with numpy.savez or safetensors"),
    (r"paddle.*", "a tensor of Paddle ({}): save it with safetensors"),
)


def is_tensor_like(name: str) -> bool:
    """Whether an object of this class stands in the place of a tensor."""
    return _TENSOR_LIKE.fullmatch(name) is not None


def object_in_place(name: str) -> str:
    """Why an object of this class, where a tensor belongs, is not analysed; and what to do."""
    for pattern, said in _ADVICE:
        if re.fullmatch(pattern, name):
            return said.format(name)
    return (
        f"an object ({name}), which only executing the pickle could turn into a tensor: save its "
        "values as a plain tensor where it was made"
    )
