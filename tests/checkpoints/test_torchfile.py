"""Tensors of torch files are found where torch.load finds them, and nothing is executed."""

from __future__ import annotations

import argparse
import json
import os
import pickle
import struct
import subprocess
import sys
import tarfile
import time
import warnings
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gradscope.checkpoints.tensors import DTYPE_BITS, Checkpoint, TensorRef
from gradscope.checkpoints.torchfile import read_torch
from gradscope.errors import InputError, UsageError


def materialise(ref: TensorRef) -> bytes:
    """The elements of a tensor in row-major order, little-endian, read where the address says."""
    item = DTYPE_BITS[ref.dtype] // 8
    data = np.fromfile(ref.source, np.uint8)[ref.offset :]
    flat = data[: len(data) // item * item].view(f"V{item}")
    if ref.strides is None:
        return flat[: ref.numel].tobytes()
    strides = [item * stride for stride in ref.strides]
    return np.lib.stride_tricks.as_strided(flat, ref.shape, strides).tobytes()


def contents(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()


def assert_same(checkpoint: Checkpoint, expected: dict[str, torch.Tensor]) -> None:
    tied: Any = checkpoint.metadata.get("tied", {})
    refs = {ref.name: ref for ref in checkpoint.tensors}
    for alias, kept in tied.items():
        refs[alias] = refs[kept]
    assert refs.keys() == expected.keys()
    for name, tensor in expected.items():
        assert refs[name].shape == tuple(tensor.shape), name
        assert refs[name].dtype == SPELLED[tensor.dtype], name
        if tensor.numel():
            assert materialise(refs[name]) == contents(tensor), name


SPELLED = {
    torch.bool: "BOOL", torch.uint8: "U8", torch.int8: "I8", torch.int16: "I16",
    torch.int32: "I32", torch.int64: "I64", torch.uint16: "U16", torch.uint32: "U32",
    torch.uint64: "U64", torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32",
    torch.float64: "F64", torch.complex64: "C64", torch.complex128: "C128",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
    torch.float8_e4m3fnuz: "F8_E4M3FNUZ", torch.float8_e5m2fnuz: "F8_E5M2FNUZ",
    torch.float8_e8m0fnu: "F8_E8M0",
}  # fmt: skip


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 4, 3)
        self.norm = torch.nn.BatchNorm2d(4)
        self.blocks = torch.nn.ModuleList([torch.nn.Linear(4, 4)])
        self.head = torch.nn.Linear(4, 4)
        self.head.register_parameter("weight", self.blocks[0].get_parameter("weight"))
        self.register_buffer("scale", torch.arange(3.0))

    def forward(self, x):
        x = self.norm(self.conv(x)).mean((2, 3))
        return self.head(self.blocks[0](x)) + self.scale.sum()


def saved(path: Path, value: object, legacy: bool = False) -> str:
    torch.save(value, path, _use_new_zipfile_serialization=not legacy)
    return str(path)


@pytest.fixture(params=[False, True], ids=["zip", "legacy"])
def save(request, tmp_path):
    return lambda value: saved(tmp_path / "a.pt", value, request.param)


def refusal(path: str | Path, key: str | None = None) -> InputError:
    with pytest.raises(InputError) as caught:
        read_torch(str(path), key)
    assert str(path) not in caught.value.message
    return caught.value


# --- tensors --------------------------------------------------------------------------------------


def test_a_state_dict_is_listed_as_torch_loads_it(save):
    path = save(Net().state_dict())
    checkpoint = read_torch(path)
    assert checkpoint.format in ("torch-zip", "torch-legacy")
    assert checkpoint.nbytes == os.path.getsize(path)
    assert list(checkpoint.stamps) == [path]
    assert_same(checkpoint, torch.load(path, weights_only=True))


@pytest.mark.parametrize("dtype", SPELLED, ids=str)
def test_every_dtype_is_read(save, dtype):
    raw = torch.arange(1, 33, dtype=torch.uint8)
    tensor = (raw % 2).view(torch.bool) if dtype is torch.bool else raw.view(dtype)
    assert_same(read_torch(save({"w": tensor})), {"w": tensor})


VIEWS = {
    "transposed": lambda base: base.t(),
    "sliced": lambda base: base[2:5, 1:4],
    "stepped": lambda base: base[::2, ::3],
    "expanded": lambda base: base[0, :1].expand(5, 1, 3),
    "diagonal": lambda base: base.diagonal(),
    "scalar": lambda base: base[1, 1],
    "empty": lambda base: base[:0],
    "column": lambda base: base[:, :1].contiguous(),
    "row": lambda base: base[3],
    "channels last": lambda base: base.view(2, 2, 2, 6).to(memory_format=torch.channels_last),
}


@pytest.mark.parametrize("name", VIEWS)
def test_views_are_read_through_their_strides(save, name):
    view = VIEWS[name](torch.arange(48.0).view(6, 8))
    checkpoint = read_torch(save({"v": view}))
    assert_same(checkpoint, {"v": view})
    assert (checkpoint.tensors[0].strides is None) == view.is_contiguous()


def test_views_that_share_a_storage_are_all_read(save):
    base = torch.arange(48.0).view(6, 8)
    views = {name: make(base) for name, make in VIEWS.items()}
    assert_same(read_torch(save(views)), views)


def test_parameters_and_buffers_are_tensors(save):
    value = {"p": torch.nn.Parameter(torch.ones(2)), "b": torch.nn.Buffer(torch.zeros(3))}
    assert_same(read_torch(save(value)), {"p": torch.ones(2), "b": torch.zeros(3)})


def test_a_parameter_with_attributes_is_a_tensor(save):
    parameter: Any = torch.nn.Parameter(torch.ones(2))
    parameter.tag = "x"
    assert_same(read_torch(save({"p": parameter})), {"p": torch.ones(2)})


def test_tied_weights_are_counted_once(save):
    checkpoint = read_torch(save(Net().state_dict()))
    assert checkpoint.metadata["tied"] == {"head.weight": "blocks.0.weight"}
    assert "head.weight is tied to blocks.0.weight" in checkpoint.notes[-1]


def test_a_bare_tensor_is_named_tensor(save):
    assert_same(read_torch(save(torch.arange(3))), {"tensor": torch.arange(3)})


def test_nested_lists_get_dotted_indices(save):
    one, two = torch.ones(1), torch.ones(2)
    read = read_torch(save([{"a": one}, (two, {"b": [two + 1]})]), key="1")
    assert_same(read, {"0": two, "1.b.0": two + 1})


def test_a_file_without_tensors_is_an_empty_checkpoint(save):
    values: tuple[object, ...] = ({}, {"a": 1}, [], 3, None)
    for value in values:
        assert read_torch(save(value)).tensors == ()


def odd_tensors() -> dict[str, Any]:
    """Tensors without plain elements, by what must be said of them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        per_channel = torch.quantize_per_channel(
            torch.ones(3, 2), torch.ones(3), torch.zeros(3, dtype=torch.int64), 0, torch.qint8
        )
        return {
            "dequantize()": torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
            "its scales": per_channel,
            "meta device": torch.ones(3, device="meta"),
            "nested": torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
            "resolve_conj()": torch.ones(2, dtype=torch.complex64).conj(),
            "torch.from_numpy": np.arange(3),
            "bits8": torch.zeros(2, dtype=torch.uint8).view(torch.bits8),
        }


@pytest.mark.parametrize("said", odd_tensors())
def test_tensors_without_plain_elements_are_skipped_with_the_reason(tmp_path, said):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        value = {"odd": odd_tensors()[said], "w": torch.ones(2)}
        checkpoint = read_torch(saved(tmp_path / "a.pt", value))
    assert_same(checkpoint, {"w": torch.ones(2)})
    (skipped,) = checkpoint.skipped
    assert skipped.subject == "odd"
    assert said in skipped.reason
    assert not skipped.deliberate


SPARSE = {
    "coo": (torch.Tensor.to_sparse, ("indices", "values")),
    "csr": (torch.Tensor.to_sparse_csr, ("compressed_indices", "plain_indices", "values")),
    "csc": (torch.Tensor.to_sparse_csc, ("compressed_indices", "plain_indices", "values")),
    "bsr": (
        lambda w: w.to_sparse_bsr((2, 2)),
        ("compressed_indices", "plain_indices", "values"),
    ),
}


@pytest.mark.parametrize("layout", SPARSE)
def test_a_sparse_tensor_is_its_indices_and_values(tmp_path, layout):
    convert, parts = SPARSE[layout]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sparse = convert(torch.arange(16.0).view(4, 4))
        checkpoint = read_torch(saved(tmp_path / "a.pt", {"s": sparse, "w": torch.ones(2)}))
        values = sparse._values() if layout == "coo" else sparse.values()
    names = [ref.name for ref in checkpoint.tensors]
    assert names == [*(f"s.{part}" for part in parts), "w"]
    refs = {ref.name: ref for ref in checkpoint.tensors}
    assert materialise(refs["s.values"]) == contents(values)
    assert checkpoint.skipped == ()
    assert any(f"s ({layout}" in note or f"s (sparse_{layout}" in note for note in checkpoint.notes)


def test_storages_of_skipped_tensors_do_not_shift_a_legacy_file(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantized = torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint32)
        value = {f"{i}": torch.full((i + 1,), float(i)) for i in range(5)} | {"q": quantized}
        checkpoint = read_torch(saved(tmp_path / "a.pt", value, legacy=True))
    value.pop("q")
    assert_same(checkpoint, value)


def test_a_view_of_astronomical_size_is_skipped(save):
    checkpoint = read_torch(save({"v": torch.ones(1).expand(2**40), "w": torch.ones(1)}))
    assert [ref.name for ref in checkpoint.tensors] == ["w"]
    assert "expanded" in checkpoint.skipped[0].reason


def test_big_endian_archives_are_marked(tmp_path):
    path = saved(tmp_path / "a.pt", {"w": torch.ones(2)})
    swap = lambda n, d: (n, b"big" if n.endswith("byteorder") else d)  # noqa: E731
    assert read_torch(rezipped(path, tmp_path / "b.pt", swap)).tensors[0].big_endian


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_every_pickle_protocol_is_read(tmp_path, protocol):
    state = Net().state_dict()
    torch.save({"model": state}, tmp_path / "a.pt", pickle_protocol=protocol)
    assert_same(read_torch(str(tmp_path / "a.pt")), state)


# --- what scripts save around a state dict --------------------------------------------------------


@pytest.fixture
def state():
    return {"layer.weight": torch.ones(2, 3), "layer.bias": torch.zeros(2)}


@pytest.mark.parametrize(
    "name", ["state_dict", "model_state_dict", "model", "module", "params", "ema", "net"]
)
def test_a_known_name_is_taken_and_said(save, state, name):
    checkpoint = read_torch(save({"epoch": 3, name: state, "lr": 0.5, "tag": "x"}))
    assert_same(checkpoint, state)
    assert checkpoint.metadata == {"epoch": 3, "lr": 0.5}
    assert f"took {name} (2 tensors)" in checkpoint.notes[0]


def test_the_most_telling_name_wins_and_the_others_are_accounted_for(save, state):
    other = {"w": torch.ones(5)}
    checkpoint = read_torch(save({"critic": other, "model": state, "step": torch.tensor(4)}))
    assert_same(checkpoint.model(), state)
    assert "took model" in checkpoint.notes[0]
    assert "also there: critic (1 tensor) (--key NAME reads another)" in checkpoint.notes
    (skipped,) = checkpoint.skipped
    assert skipped.subject == "critic"
    assert skipped.deliberate
    assert_same(read_torch(checkpoint.path, key="critic"), other)


def test_a_state_dict_may_be_one_level_deeper(save, state):
    checkpoint = read_torch(save({"model": {"state_dict": state, "args": {"d": 2}}, "epoch": 1}))
    assert_same(checkpoint, state)
    assert "took model.state_dict" in checkpoint.notes[0]
    assert_same(read_torch(checkpoint.path, key="model.state_dict"), state)


def test_without_a_known_name_the_largest_entry_is_taken(save, state):
    checkpoint = read_torch(save({"a": {"w": torch.ones(5)}, "b": state}))
    assert_same(checkpoint, state)
    assert "took b" in checkpoint.notes[0]
    assert checkpoint.skipped[0].subject == "a"


def test_nested_modules_are_one_state_dict(save, state):
    checkpoint = read_torch(save({"model": {"encoder": state, "decoder": {"w": torch.ones(1)}}}))
    assert {ref.name for ref in checkpoint.tensors} == {
        "encoder.layer.weight",
        "encoder.layer.bias",
        "decoder.w",
    }


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_a_prefix_that_all_names_share_is_stripped(save, state, prefix):
    wrapped = {prefix + name: tensor for name, tensor in state.items()}
    checkpoint = read_torch(save(wrapped))
    assert_same(checkpoint, state)
    assert prefix in checkpoint.notes[0]


def test_a_prefix_of_some_names_is_kept(save, state):
    state = {"module.a": torch.ones(1), **state}
    assert_same(read_torch(save(state)), state)


def test_an_unknown_key_names_what_there_is(save, state):
    path = save({"model": state, "optimizer": {"x": torch.ones(1)}})
    with pytest.raises(UsageError, match=r"model \(2 tensors\), optimizer \(1 tensor\)"):
        read_torch(path, key="modle")


def test_a_key_may_name_one_tensor_with_dots(save, state):
    checkpoint = read_torch(save({"model": state}), key="model.layer.weight")
    assert [ref.shape for ref in checkpoint.tensors] == [(2, 3)]


def test_names_that_collide_after_flattening_are_kept_apart(save):
    checkpoint = read_torch(save({"a.b": torch.ones(1), "a": {"b": torch.ones(2)}}))
    assert [ref.name for ref in checkpoint.tensors] == ["a.b", "a.b#2"]
    assert checkpoint.problems[0].kind == "duplicate-tensor-name"


def test_many_collisions_are_told_apart_in_bounded_time(tmp_path):
    tensor = zip_pickle_of(tmp_path, {"a": torch.ones(1)})
    body = tensor[tensor.index(b"ctorch._utils") : tensor.rindex(b"s.")]
    pairs = b"".join(b"N\x85h\x63" for _ in range(20_000))
    data = b"\x80\x02}(K\x00" + body + b"q\x63" + pairs + b"u."
    start = time.process_time()
    checkpoint = read_torch(with_pickle(tmp_path, data, {"a": torch.ones(1)}))
    assert len(checkpoint.metadata["tied"]) == 20_000
    assert time.process_time() - start < 10


# --- TorchScript and torch.export -----------------------------------------------------------------


@pytest.fixture
def scripted(tmp_path):
    def build(kind: str, freeze: bool = False) -> str:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            net = Net().eval()
            compile_ = {
                "traced": lambda: torch.jit.trace(net, torch.randn(2, 3, 8, 8)),
                "scripted": lambda: torch.jit.script(net),
            }
            module = compile_[kind]()
            if freeze:
                module = torch.jit.freeze(module)
            module.save(str(tmp_path / "a.pt"))
        return str(tmp_path / "a.pt")

    return build


@pytest.mark.parametrize("kind", ["traced", "scripted"])
def test_torchscript_lists_its_state_dict(scripted, kind):
    path = scripted(kind)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = torch.jit.load(path).state_dict()
    checkpoint = read_torch(path)
    assert checkpoint.format == "torchscript"
    assert_same(checkpoint, expected)


def test_a_frozen_torchscript_module_lists_its_constants(scripted):
    checkpoint = read_torch(scripted("scripted", freeze=True))
    assert {ref.name.split(".")[0] for ref in checkpoint.tensors} == {"constants"}
    assert (4, 3, 3, 3) in {ref.shape for ref in checkpoint.tensors}


@pytest.fixture
def exported(tmp_path):
    net = Net().eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.export.save(
            torch.export.export(net, (torch.randn(2, 3, 8, 8),)), str(tmp_path / "a.pt2")
        )
    return str(tmp_path / "a.pt2"), net.state_dict()


def test_an_exported_program_lists_its_weights(exported):
    path, state = exported
    checkpoint = read_torch(path)
    assert checkpoint.format == "pt2"
    assert_same(checkpoint, state)


def test_pickled_weights_of_an_exported_program_are_skipped(exported, tmp_path):
    path, _ = exported
    config = "a/data/weights/model_weights_config.json"
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(tmp_path / "b.pt2", "w") as new:
        document = json.loads(old.read(config))
        document["config"]["scale"]["use_pickle"] = True
        document["config"]["conv.bias"]["tensor_meta"]["dtype"] = 99
        for info in old.infolist():
            changed = info.filename == config
            new.writestr(info.filename, json.dumps(document) if changed else old.read(info))
    checkpoint = read_torch(str(tmp_path / "b.pt2"))
    reasons = {skipped.subject: skipped.reason for skipped in checkpoint.skipped}
    assert reasons.keys() == {"scale", "conv.bias"}
    assert "pickled" in reasons["scale"]


def test_the_older_layout_of_exported_programs_is_read(tmp_path, state):
    """torch 2.2 to 2.7 kept a torch.save file inside the archive."""
    inner = Path(saved(tmp_path / "inner.pt", state)).read_bytes()
    with zipfile.ZipFile(tmp_path / "old.pt2", "w") as archive:
        archive.writestr("serialized_exported_program.json", "{}")
        archive.writestr("serialized_state_dict.pt", inner)
        archive.writestr("serialized_constants.pt", b"")
    checkpoint = read_torch(str(tmp_path / "old.pt2"))
    assert checkpoint.format == "pt2"
    assert_same(checkpoint, state)


# --- refusals -------------------------------------------------------------------------------------


class Runs:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_a_payload_does_not_run(save, tmp_path, state):
    error = refusal(save({"state_dict": state, "x": Runs(tmp_path / "ran")}))
    assert error.kind == "unsafe"
    assert f"{os.name}.system" in error.message
    assert not (tmp_path / "ran").exists()


def test_a_pickled_module_is_read_as_its_state_dict(save):
    net = Net()
    net.register_buffer("passing", torch.ones(2), persistent=False)
    net.loose = torch.ones(7)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        checkpoint = read_torch(save(net))
    assert_same(checkpoint, dict(net.state_dict()))
    assert checkpoint.module == f"{__name__}.Net"
    assert "torch.nn.modules.linear.Linear" in checkpoint.classes
    assert any("a pickled module" in note for note in checkpoint.notes)


def test_a_module_of_modules_called_model_is_read_whole(save):
    net = torch.nn.Module()
    net.model, net.head = torch.nn.Linear(2, 2), torch.nn.Linear(2, 3)
    checkpoint = read_torch(save(net))
    assert {ref.name for ref in checkpoint.tensors} == set(net.state_dict())


def test_a_pickled_module_beside_training_state_is_the_model(save):
    net = torch.nn.Sequential(torch.nn.Linear(2, 2))
    checkpoint = read_torch(save({"epoch": 3, "model": net, "ema": None, "optimizer": None}))
    assert_same(checkpoint, dict(net.state_dict()))
    assert "torch.nn.modules.container.Sequential" in checkpoint.notes[0]


class Attributes(dict[str, object]):
    """A dictionary of a class of its own."""


def test_objects_beside_a_state_dict_are_named_and_cost_nothing(save, state):
    value = {"args": argparse.Namespace(lr=1), "hparams": Attributes(a=1), "cls": Net}
    checkpoint = read_torch(save({"state_dict": state, **value}))
    assert_same(checkpoint, state)
    assert (checkpoint.skipped, checkpoint.failures) == ((), ())
    assert checkpoint.classes[0] == "argparse.Namespace"
    assert any("not built: argparse.Namespace" in note for note in checkpoint.notes)


def test_a_flat_state_dict_may_hold_objects_too(save, state):
    checkpoint = read_torch(save({**state, "config": argparse.Namespace(lr=1), "fn": torch.relu}))
    assert_same(checkpoint, state)
    assert checkpoint.skipped == ()


def test_a_state_dict_of_a_class_of_its_own_is_read(save, state):
    assert_same(read_torch(save(Attributes(state))), state)
    assert_same(read_torch(save({"model": Attributes(state), "epoch": 1})), state)


class QuantisedWeight:
    """What a library of its own might put in the place of a tensor."""


def test_an_object_in_the_place_of_a_tensor_is_missing(save, state):
    value = {**state, "other.weight": QuantisedWeight(), "other.note": QuantisedWeight()}
    checkpoint = read_torch(save(value))
    assert_same(checkpoint, state)
    (skipped,) = checkpoint.skipped
    assert skipped.subject == "other.weight"
    assert "QuantisedWeight" in skipped.reason
    assert not skipped.deliberate


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("torch.distributed.tensor.DTensor", "full_tensor()"),
        ("torch.distributed._shard.sharded_tensor.api.ShardedTensor", "gather it"),
        ("torchao.dtypes.affine_quantized_tensor.AffineQuantizedTensor", "dequantize()"),
        ("torchao.float8.Float8Tensor", "dequantize()"),
        ("bitsandbytes.nn.modules.Params4bit", "dequantise"),
        ("torch.nn.parameter.UninitializedParameter", "run the model once"),
        ("mine.OwnTensor", "as a plain tensor"),
    ],
)
def test_what_to_do_about_a_tensor_class_fits_it(tmp_path, state, name, advice):
    module, _, cls = name.rpartition(".")
    wrapper = (
        b"ctorch._tensor\n_rebuild_from_type_v2\n(ctorch._utils\n_rebuild_wrapper_subclass\n"
        + f"c{module}\n{cls}\n".encode()
        + b"(" + f"c{module}\n{cls}\n".encode() + b"ctorch\nfloat32\n(K\x03K\x02t(K\x02K\x01tK\x00"
        b"NN\x89t}tR"
    )  # fmt: skip
    data = b"\x80\x02}(X\x08\x00\x00\x00x.weight" + wrapper + b"u."
    checkpoint = read_torch(with_pickle(tmp_path, data, {"a": torch.ones(1)}))
    (skipped,) = checkpoint.skipped
    assert skipped.subject == "x.weight"
    assert name in skipped.reason
    assert advice in skipped.reason
    assert "state_dict()" not in skipped.reason


def test_torch_is_not_imported(tmp_path, state, exported):
    zipped = saved(tmp_path / "zip.pt", state)
    legacy = saved(tmp_path / "legacy.pt", state, legacy=True)
    code = (
        "import sys; from gradscope.checkpoints.torchfile import read_torch\n"
        "for path in sys.argv[1:]: assert read_torch(path).tensors\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, zipped, legacy, exported[0]], check=True)


def test_a_tar_file_of_old_torch_is_refused_by_name(tmp_path):
    (tmp_path / "storages").write_bytes(b"x")
    with tarfile.open(tmp_path / "a.pt", "w") as archive:
        archive.add(tmp_path / "storages", "storages")
    error = refusal(tmp_path / "a.pt")
    assert error.kind == "unsupported"
    assert "0.1.10" in error.message


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b"", "truncated"),
        (b"hello world", "malformed"),
        (pickle.dumps({"a": list(range(100))}), "unsupported"),
        (b"PK\x03\x04" + bytes(100), "truncated"),
        (b"\x80\x02\x8a\x0a", "truncated"),
    ],
)
def test_other_files_are_refused(tmp_path, content, kind):
    (tmp_path / "a.pt").write_bytes(content)
    assert refusal(tmp_path / "a.pt").kind == kind


def test_a_zip_that_is_not_of_torch_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.pt", "w") as archive:
        archive.writestr("readme.txt", "hello")
    assert refusal(tmp_path / "a.pt").kind == "unsupported"


def test_a_missing_file_is_missing(tmp_path):
    assert refusal(tmp_path / "none.pt").kind == "missing"


def rezipped(path: str, target: Path, change) -> str:
    """A copy of an archive whose members went through ``change(name, data)``."""
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(target, "w") as new:
        for info in old.infolist():
            name, data = change(info.filename, old.read(info))
            new.writestr(name, data)
    return str(target)


def test_a_storage_shorter_than_declared_is_malformed(tmp_path, state):
    path = saved(tmp_path / "a.pt", state)
    short = rezipped(path, tmp_path / "b.pt", lambda n, d: (n, d[:-1] if "/data/" in n else d))
    error = refusal(short)
    assert error.kind == "malformed"
    assert "data/" in error.message


def test_a_missing_storage_is_malformed(tmp_path, state):
    path = saved(tmp_path / "a.pt", state)
    moved = rezipped(path, tmp_path / "b.pt", lambda n, d: (n.replace("/data/0", "/data/x"), d))
    assert "data/0" in refusal(moved).message


def test_a_tensor_that_reaches_beyond_its_storage_is_named(tmp_path):
    path = saved(tmp_path / "a.pt", {"evil.w": torch.ones(3, 5)})

    def enlarge(name, data):
        return name, data.replace(b"K\x03K\x05\x86", b"K\x03K\x06\x86")

    error = refusal(rezipped(path, tmp_path / "b.pt", enlarge))
    assert error.kind == "malformed"
    assert "evil.w" in error.message


def test_compressed_archives_are_refused_with_the_remedy(tmp_path, state):
    path = saved(tmp_path / "a.pt", state)
    with (
        zipfile.ZipFile(path) as old,
        zipfile.ZipFile(tmp_path / "b.pt", "w", zipfile.ZIP_DEFLATED) as new,
    ):
        for info in old.infolist():
            new.writestr(info.filename, old.read(info))
    error = refusal(tmp_path / "b.pt")
    assert error.kind == "unsupported"
    assert "compress" in error.message


def test_a_member_given_twice_is_refused(tmp_path, state):
    path = saved(tmp_path / "a.pt", state)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with zipfile.ZipFile(path, "a") as archive:
            archive.writestr(archive.namelist()[0], b"other")
    assert "two members" in refusal(path).message


def central_record(data: bytearray, index: int) -> int:
    at = data.index(b"PK\1\2")
    for _ in range(index):
        at = data.index(b"PK\1\2", at + 4)
    return at


@pytest.mark.parametrize(
    ("field", "what"),
    [(8, "disagree|encrypted"), (10, "disagree"), (24, "disagree|stored"), (46, "another name")],
)
def test_a_directory_that_contradicts_the_local_headers_is_refused(tmp_path, state, field, what):
    path = saved(tmp_path / "a.pt", state)
    data = bytearray(Path(path).read_bytes())
    data[central_record(data, 1) + field] ^= 9
    Path(path).write_bytes(data)
    with pytest.raises(InputError, match=what):
        read_torch(path)


def test_overlapping_members_are_refused(tmp_path, state):
    path = saved(tmp_path / "a.pt", state)
    data = bytearray(Path(path).read_bytes())
    first, second = central_record(data, 0), central_record(data, 1)
    data[second + 42 : second + 46] = data[first + 42 : first + 46]
    Path(path).write_bytes(data)
    assert "overlap" in refusal(path).message


def test_an_archive_that_declares_millions_of_members_is_refused_at_once(tmp_path, state):
    path = saved(tmp_path / "a.pt", state)
    data = bytearray(Path(path).read_bytes())
    at = data.rindex(b"PK\6\6") + 32
    data[at : at + 8] = struct.pack("<Q", 10**12)
    Path(path).write_bytes(data)
    start = time.process_time()
    assert refusal(path).kind == "malformed"
    assert time.process_time() - start < 2


def zip_pickle_of(tmp_path: Path, value: object) -> bytes:
    with zipfile.ZipFile(saved(tmp_path / "a.pt", value)) as archive:
        return archive.read("a/data.pkl")


def with_pickle(tmp_path: Path, data: bytes, value: object = ()) -> str:
    """A torch archive of ``value`` whose pickle is replaced."""
    path = saved(tmp_path / "a.pt", value)
    swap = lambda n, d: (n, data if n.endswith("data.pkl") else d)  # noqa: E731
    return rezipped(path, tmp_path / "b.pt", swap)


def test_nested_sharing_ends_in_bounded_time(tmp_path):
    """Each list holds the one before twice: 2**60 paths lead to one tensor's worth of nothing."""
    laughs = b"](K\x01eq\x01" + b"".join(b"](h%ch%ceq%c" % (i, i, i + 1) for i in range(1, 60))
    start = time.process_time()
    assert refusal(with_pickle(tmp_path, b"\x80\x02" + laughs + b".")).kind == "malformed"
    assert time.process_time() - start < 5


def test_a_container_that_holds_itself_ends(tmp_path):
    assert read_torch(with_pickle(tmp_path, b"\x80\x02]q\x01h\x01a.")).tensors == ()


def test_deep_nesting_is_malformed(tmp_path):
    assert (
        refusal(with_pickle(tmp_path, b"\x80\x02)" + b"\x85" * 10_000 + b".")).kind == "malformed"
    )


FILES = ["zip", "legacy", "torchscript", "pt2"]


@pytest.fixture(scope="module")
def valid_files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("valid")
    net = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 1))
    example = torch.randn(1, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        value = {"model": net.state_dict(), "t": torch.ones(3, 2).t(), "epoch": 3}
        saved(folder / "zip", value)
        saved(folder / "legacy", value, legacy=True)
        torch.jit.trace(net, example).save(str(folder / "torchscript"))
        torch.export.save(torch.export.export(net, (example,)), str(folder / "pt2.pt2"))
    (folder / "pt2.pt2").rename(folder / "pt2")
    return {name: (folder / name).read_bytes() for name in FILES}


@pytest.mark.parametrize("name", FILES)
def test_a_file_cut_anywhere_gives_an_input_error(tmp_path, valid_files, name):
    whole, path = valid_files[name], tmp_path / "cut"
    step = max(1, len(whole) // 700)
    for cut in [*range(0, len(whole), step), *range(len(whole) - 60, len(whole))]:
        path.write_bytes(whole[:cut])
        assert refusal(path).kind in ("truncated", "malformed")


@pytest.mark.parametrize("name", FILES)
def test_damaged_files_give_a_checkpoint_or_an_input_error(tmp_path, valid_files, name):
    whole, path = valid_files[name], tmp_path / "damaged"
    interesting = st.integers(0, len(whole) - 1) | st.integers(0, min(1500, len(whole) - 1))
    edits = st.lists(st.tuples(interesting, st.integers(0, 255)), min_size=1, max_size=4)

    @settings(max_examples=200, deadline=3000, suppress_health_check=list(HealthCheck))
    @given(edits, st.sampled_from([None, "model", "model.0.weight", "t"]))
    def check(edits, key):
        data = bytearray(whole)
        for at, byte in edits:
            data[at] = byte
        path.write_bytes(data)
        try:
            checkpoint = read_torch(str(path), key)
        except (InputError, UsageError):
            return
        for ref in checkpoint.tensors:
            assert 0 <= ref.offset <= len(data)

    check()


@pytest.mark.parametrize("protocol", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("zipped", [True, False])
def test_every_pickle_protocol_that_torch_can_load_is_read(
    tmp_path: Path, protocol: int, zipped: bool
) -> None:
    path = tmp_path / "model.pt"
    state = {"weight": torch.arange(6.0).reshape(2, 3)}
    torch.save(state, path, pickle_protocol=protocol, _use_new_zipfile_serialization=zipped)

    tensors = read_torch(str(path)).tensors

    assert [(t.name, t.shape) for t in tensors] == [("weight", (2, 3))]
