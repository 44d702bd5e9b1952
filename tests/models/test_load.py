"""Models as people save them; nothing in a file runs before it is trusted."""

from __future__ import annotations

import contextlib
import io
import json
import pickle
import re
import sys
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

from gradscope.errors import InputError, UsageError
from gradscope.models.load import load_model
from gradscope.models.probe import held, run
from gradscope.models.program_check import check_program, is_size
from gradscope.models.sizes import image_size

SOURCE = """
import torch
from torch import nn

class Tiny(nn.Module):
    def __init__(self, num_classes=4, width=3):
        super().__init__()
        self.conv = nn.Conv2d(3, width, 3)
        self.norm = nn.BatchNorm2d(width)
        self.head = nn.Linear(width, num_classes)
    def forward(self, x):
        return self.head(torch.relu(self.norm(self.conv(x))).mean((2, 3)))

def tiny(num_classes=4, width=3):
    return Tiny(num_classes, width)

def broken():
    raise KeyError("weights")

def nothing():
    return 3

half = 2
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One network in every form, with its own answers."""
    made = tmp_path_factory.mktemp("models")
    (made / "tinynet.py").write_text(SOURCE)
    namespace: dict[str, Any] = {"__name__": "tinynet"}
    exec(SOURCE, namespace)
    torch.manual_seed(0)
    net = namespace["tiny"]().eval()
    x = torch.randn(2, 3, 16, 16)
    torch.save((x, net(x).detach()), made / "answer")
    state = net.state_dict()
    torch.save(state, made / "state.pt")
    torch.save({"epoch": 3, "state_dict": {f"module.{k}": v for k, v in state.items()}},
               made / "wrapped.pt")  # fmt: skip
    torch.save({k: v.half() if v.is_floating_point() else v for k, v in state.items()},
               made / "half.pt")  # fmt: skip
    save_file(state, made / "state.safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.trace(net, x), made / "traced.pt")
        torch.export.save(torch.export.export(net, (x,)), made / "fixed.pt2")
        plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    torch.save(plain, made / "whole.pt")
    torch.save({"model": plain}, made / "inside.pt", _use_new_zipfile_serialization=False)
    return made


def arch(folder: Path, call: str = "tiny") -> str:
    return f"{folder / 'tinynet.py'}:{call}"


@pytest.mark.parametrize(
    ("name", "kind"),
    [("state.pt", "state-dict"), ("state.safetensors", "state-dict"), ("wrapped.pt", "state-dict"),
     ("traced.pt", "torchscript"), ("fixed.pt2", "export")],
)  # fmt: skip
def test_every_form_answers_as_the_network_did(folder: Path, name: str, kind: str) -> None:
    x, wanted = torch.load(folder / "answer")

    found = load_model(str(folder / name), arch=arch(folder) if kind == "state-dict" else None)

    assert found.format == kind
    with held(found.model.module):
        torch.testing.assert_close(run(found.model, x).logits, wanted)


def test_content_decides_and_not_the_suffix(folder: Path, tmp_path: Path) -> None:
    for name, kind in (("traced.pt", "torchscript"), ("fixed.pt2", "export")):
        (tmp_path / "model.safetensors").write_bytes((folder / name).read_bytes())
        assert load_model(str(tmp_path / "model.safetensors")).format == kind


def test_half_precision_weights_are_read_as_float32(folder: Path) -> None:
    found = load_model(str(folder / "half.pt"), arch=arch(folder))

    assert next(found.model.module.parameters()).dtype == torch.float32
    assert any("float16" in note for note in found.notes)


def test_the_factory_takes_options_and_lies_in_the_working_directory(
    folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(folder)
    path = str(tmp_path / "wide.pt")
    monkeypatch.syspath_prepend(str(folder))
    import tinynet  # type: ignore[import-not-found]

    torch.save(tinynet.tiny(7, width=5).state_dict(), path)

    found = load_model(path, arch="tinynet:tiny(7, width=5)")

    assert found.model.module.head.out_features == 7
    assert found.architecture == "tinynet:tiny(7, width=5)"


@pytest.mark.parametrize(
    ("call", "said"),
    [
        ("tiny(num_classes=9)", r"2 of another shape: head.weight \(file \[4, 3\].*num_classes=4"),
        ("tiny(width=8)", "of another shape"),
        ("tinny", "did you mean tiny"),
        ("broken", "KeyError: 'weights'"),
        ("nothing", "returns a int, not an nn.Module"),
        ("half", "cannot be called"),
        ("tiny(__import__('os'))", "options are literals"),
        ("tiny(**{})", "options are literals"),
        ("tiny(", "options are literals"),
    ],
)
def test_a_wrong_architecture_says_what_is_wrong(folder: Path, call: str, said: str) -> None:
    with pytest.raises((UsageError, InputError), match=said):
        load_model(str(folder / "state.pt"), arch=arch(folder, call))


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        (None, "holds 9 tensors and no code"),
        ("nothing.here:model", "module nothing not found"),
        ("torch.nn:GRUCell(2, 2)", "4 missing from the file: weight_ih.*; 9 not in the arch"),
        ("nofile.py:model", "file nofile.py not found"),
        ("justaname", "package.module:factory"),
    ],
)
def test_a_state_dict_needs_its_code(folder: Path, spec: str | None, said: str) -> None:
    with pytest.raises((UsageError, InputError), match=said):
        load_model(str(folder / "state.pt"), arch=spec)


def test_missing_and_unexpected_tensors_are_listed(folder: Path, tmp_path: Path) -> None:
    state = torch.load(folder / "state.pt")
    del state["norm.weight"]
    state["extra.weight"] = torch.zeros(2)
    torch.save(state, tmp_path / "m.pt")

    with pytest.raises(InputError, match=r"1 missing .*norm\.weight; 1 not .*extra\.weight"):
        load_model(str(tmp_path / "m.pt"), arch=arch(folder))


# --- code in files --------------------------------------------------------------------------------


class _Bomb:
    """Unpickling it writes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("name", ["whole.pt", "inside.pt"])
def test_a_pickled_module_is_refused_until_it_is_trusted(folder: Path, name: str) -> None:
    with pytest.raises(InputError, match="--trust pickle") as error:
        load_model(str(folder / name))
    assert error.value.kind == "unsafe"

    found = load_model(str(folder / name), trust=frozenset({"pickle"}))

    assert found.format == "module"
    assert found.model.layers == ("0", "1", "2")


class Forgetful(nn.Module):
    """As torch's quantised modules: what it pickles is not all that it needs."""

    def __getstate__(self) -> dict[str, Any]:
        return {"training": False}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state


@pytest.mark.parametrize("inside", [Forgetful(), nn.ReLU()])
def test_a_module_that_was_not_restored_whole_is_malformed(
    tmp_path: Path, inside: nn.Module
) -> None:
    torch.save(nn.Sequential(nn.Conv2d(3, 4, 3), inside), tmp_path / "m.pt")

    def load() -> Any:
        return load_model(str(tmp_path / "m.pt"), trust=frozenset({"pickle"}))

    if isinstance(inside, Forgetful):
        with pytest.raises(InputError, match=r"was not restored .*_modules.*save its state dict"):
            load()
    else:
        assert load().format == "module"


def test_nothing_of_a_refused_pickle_is_run(tmp_path: Path) -> None:
    torch.save({"model": _Bomb(tmp_path / "ran")}, tmp_path / "m.pt")

    with pytest.raises(InputError, match=r"runs any code that the file names.*Path\.touch"):
        load_model(str(tmp_path / "m.pt"), arch="torch.nn:Flatten")
    assert not (tmp_path / "ran").exists()


def rewritten(source: Path, target: Path, change: dict[str, Any]) -> None:
    """A zip archive with members changed: bytes, or a function of the JSON."""
    with zipfile.ZipFile(source) as before, zipfile.ZipFile(target, "w") as after:
        for name in before.namelist():
            data: bytes | str = before.read(name)
            for end, new in change.items():
                if name.endswith(end):
                    data = json.dumps(new(json.loads(data))) if callable(new) else new
            after.writestr(name, data)


def test_an_export_whose_sample_inputs_would_run_code_is_refused(
    folder: Path, tmp_path: Path
) -> None:
    buffer = io.BytesIO()
    torch.save(_Bomb(tmp_path / "ran"), buffer)
    rewritten(
        folder / "fixed.pt2", tmp_path / "m.pt2", {"sample_inputs/model.pt": buffer.getvalue()}
    )

    with pytest.raises(InputError, match="sample_inputs") as error:
        load_model(str(tmp_path / "m.pt2"))
    assert error.value.kind == "unsafe"
    assert not (tmp_path / "ran").exists()


def test_an_export_whose_weights_would_run_code_is_refused(folder: Path, tmp_path: Path) -> None:
    def pickled(config: Any) -> Any:
        next(iter(config["config"].values()))["use_pickle"] = True
        return config

    change = {
        "model_weights_config.json": pickled,
        "weights/weight_0": pickle.dumps(_Bomb(tmp_path)),
    }
    rewritten(folder / "fixed.pt2", tmp_path / "m.pt2", change)

    with pytest.raises(InputError, match="weight_0"):
        load_model(str(tmp_path / "m.pt2"))


def test_an_export_whose_sizes_are_code_is_refused(folder: Path, tmp_path: Path) -> None:
    def coded(model: Any) -> Any:
        model["graph_module"]["hidden"] = {"expr_str": "__import__('os').system('true')"}
        return model

    rewritten(folder / "fixed.pt2", tmp_path / "m.pt2", {"models/model.json": coded})

    with pytest.raises(InputError, match="expression"):
        load_model(str(tmp_path / "m.pt2"))


@pytest.mark.parametrize(
    "expression",
    [
        "Symbol('s77', positive=True, integer=True)",
        "Add(Mul(Integer(2), Symbol('s0', integer=True)), Integer(-1))",
        "FloorDiv(Symbol('u1'), 2) + 3*s0",
        "Eq(Mod(s3, 8), 0)",
    ],
)
def test_torchs_own_expressions_are_plain(expression: str) -> None:
    assert is_size(expression)


@pytest.mark.parametrize(
    "expression",
    ["__import__('os')", "S('open(1)')", "Symbol.__class__", "[].append", "(lambda: 1)()",
     "Symbol('a b')", "Integer('__import__(1)')", "f'{1}'", "exec(1)", "Symbol(",
     "Symbol(name='x; y')", "a if b else c", "[i for i in s0]"],
)  # fmt: skip
def test_other_expressions_are_not(expression: str) -> None:
    assert not is_size(expression)


# --- damage ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["state.pt", "traced.pt", "fixed.pt2", "state.safetensors"])
@settings(
    max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(share=st.floats(0, 1), flips=st.lists(st.floats(0, 1), max_size=3))
def test_a_damaged_file_ends_in_an_error_for_its_user(
    folder: Path, tmp_path: Path, name: str, share: float, flips: list[float]
) -> None:
    data = bytearray((folder / name).read_bytes())
    for flip in flips:
        data[int(flip * (len(data) - 1))] ^= 0x10
    path = tmp_path / name
    path.write_bytes(data[: int(share * len(data))] if not flips else data)

    with contextlib.suppress(InputError, UsageError):
        load_model(str(path), arch=arch(folder))


@pytest.mark.parametrize(
    ("content", "said"),
    [(b"", "empty"), (b"<html>", "HTML"), (b"\x08\x07\x12\x07pytorch\x1a" + bytes(50), "ONNX")],
)
def test_what_is_no_model_is_named(tmp_path: Path, content: bytes, said: str) -> None:
    (tmp_path / "m.pt").write_bytes(content)

    with pytest.raises(InputError, match=said):
        load_model(str(tmp_path / "m.pt"))
    with pytest.raises(InputError, match="file not found"):
        load_model(str(tmp_path / "none.pt"))


def test_a_program_that_is_no_image_model_says_what_it_takes(tmp_path: Path) -> None:
    class Two(nn.Module):
        def forward(self, x: torch.Tensor, rate: int) -> torch.Tensor:
            return x * rate

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(Two()), tmp_path / "two.pt")

    with pytest.raises(UsageError, match=r"takes \(.*rate.*int\), not images as one tensor"):
        load_model(str(tmp_path / "two.pt"))


class Writes(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        torch.save(x, "written")
        return x.flatten(1)


def test_a_program_that_touches_files_is_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(Writes()), "m.pt")

    with pytest.raises(UsageError, match="aten::save, which accesses files"):
        load_model("m.pt")
    assert not (tmp_path / "written").exists()


# --- sizes ----------------------------------------------------------------------------------------


def test_the_size_is_tried_out_where_it_is_not_written_down(folder: Path) -> None:
    fixed = load_model(str(folder / "fixed.pt2")).model
    from gradscope.models.forms import as_model

    assert image_size(fixed) == (3, 16, 16)
    assert image_size(load_model(str(folder / "traced.pt")).model) == (3, 224, 224)
    flat = nn.Sequential(nn.Flatten(), nn.Linear(28 * 28, 10))
    assert image_size(as_model(flat), 1) == (1, 28, 28)
    with pytest.raises(UsageError, match="none of the sizes"):
        image_size(as_model(nn.Sequential(nn.Flatten(), nn.Linear(12345, 3))))


# --- exported programs that would run code --------------------------------------------------------


@pytest.fixture
def planted(folder: Path, tmp_path: Path) -> Callable[..., Path]:
    """An exported program with changes planted; what they would run makes ``tmp_path/ran``."""

    def made(change: dict[str, Any], *more: tuple[str, bytes]) -> Path:
        target = tmp_path / "planted.pt2"
        rewritten(folder / "fixed.pt2", target, change)
        with warnings.catch_warnings(), zipfile.ZipFile(target, "a") as archive:
            warnings.simplefilter("ignore")
            for name, data in more:
                archive.writestr(f"fixed/{name}", data)
        return target

    return made


def payload(tmp_path: Path) -> str:
    return f"__import__('pathlib').Path({str(tmp_path / 'ran')!r}).touch()"


def spelled(code: str) -> str:
    """Python that builds a text and evaluates it, without a quote or an underscore of its own."""
    return f"sympify({'+'.join(f'chr({ord(char)})' for char in code)})"


def graph(change: Callable[[Any], None]) -> Callable[[Any], Any]:
    def changed(model: Any) -> Any:
        change(model["graph_module"])
        return model

    return changed


def sized(code: str) -> Callable[[Any], Any]:
    def change(module: Any) -> None:
        module["graph"]["tensor_values"]["x"]["sizes"][0] = {
            "as_expr": {"expr_str": code, "hint": None}
        }

    return graph(change)


def node(**fields: Any) -> Callable[[Any], Any]:
    return graph(lambda module: module["graph"]["nodes"][1].update(fields))


def renamed(old: str, new: str) -> Callable[[Any], Any]:
    return lambda model: json.loads(json.dumps(model).replace(json.dumps(old), json.dumps(new)))


def in_spec(kind: str, context: str) -> Callable[[Any], Any]:
    leaf: dict[str, Any] = {"type": None, "context": None, "children_spec": []}
    inner = {"type": kind, "context": context, "children_spec": [leaf]}
    spec = {"type": "builtins.tuple", "context": "null", "children_spec": [inner, inner]}

    def change(module: Any) -> None:
        module["module_call_graph"][0]["signature"]["in_spec"] = json.dumps([1, spec])

    return graph(change)


FACTORY = {
    "default_factory_module": "antigravity",
    "default_factory_name": "fly",
    "dict_context": [],
}
PLANTS: dict[str, Callable[[str], Callable[[Any], Any]]] = {
    "a size that spells a text": lambda code: sized(spelled(code)),
    "a size that calls": lambda _: sized("print(1)"),
    "a size with a class": lambda _: sized("Symbol('x', cls=open)"),
    "an argument's name": lambda code: renamed("x", f"x={code}"),
    "a node's name": lambda code: node(name=f"y={code}"),
    "an operator of Python": lambda _: node(target="torch.serialization.os.system"),
    "an operator that gets attributes": lambda _: node(target="_operator.attrgetter"),
    "an operator that writes files": lambda _: node(target="torch.ops.aten.from_file.default"),
    "a parameter's name": lambda code: renamed("conv.bias", f'conv.bias"+{code}+"'),
    "a line end in a remark": lambda code: node(metadata={"stack_trace": f"x\r    {code}"}),
    "an escaped line end": lambda code: node(metadata={"custom": json.dumps({"a": f"\r{code}"})}),
    "a tree that imports": lambda _: in_spec("collections.defaultdict", json.dumps(FACTORY)),
    "a tree with an enumeration": lambda _: in_spec(
        "builtins.dict", json.dumps([{"__enum__": True, "fqn": "antigravity:A", "name": "B"}])
    ),
    "a tree with code for a name": lambda code: in_spec("builtins.dict", json.dumps([code])),
}


@pytest.mark.parametrize("plant", PLANTS)
def test_an_export_with_code_planted_is_refused(
    planted: Callable[..., Path], tmp_path: Path, plant: str
) -> None:
    path = planted({"models/model.json": PLANTS[plant](payload(tmp_path))})

    with pytest.raises(InputError, match="--trust pickle") as error:
        load_model(str(path))
    assert error.value.kind == "unsafe"
    assert not (tmp_path / "ran").exists()
    assert "antigravity" not in sys.modules


@pytest.mark.parametrize(
    "member",
    ["models/other!json", "data/aotinductor/model/code.so", "data/constants/opaque_obj_0",
     "data/sample_inputs/other.PT", "MODELS/other.json"],
)  # fmt: skip
def test_an_export_with_a_member_that_would_be_run_is_refused(
    planted: Callable[..., Path], member: str
) -> None:
    with pytest.raises(InputError, match="not data that") as error:
        load_model(str(planted({}, (member, b"code"))))
    assert error.value.kind == "unsafe"


@pytest.mark.parametrize("name", ["data/sample_inputs/model.pt", "data/sample_inputs/Model.pt"])
def test_an_export_with_a_second_member_of_a_name_is_refused(
    planted: Callable[..., Path], tmp_path: Path, name: str
) -> None:
    buffer = io.BytesIO()
    torch.save(_Bomb(tmp_path / "ran"), buffer)
    empty = io.BytesIO()
    torch.save(((), {}), empty)

    path = planted({"sample_inputs/model.pt": buffer.getvalue()}, (name, empty.getvalue()))

    with pytest.raises(InputError, match=r"two members named|differ in case"):
        load_model(str(path))
    assert not (tmp_path / "ran").exists()


def document(folder: Path) -> bytes:
    with zipfile.ZipFile(folder / "fixed.pt2") as archive:
        return archive.read("fixed/models/model.json")


def test_an_export_with_a_key_given_twice_is_refused(
    planted: Callable[..., Path], folder: Path
) -> None:
    twice = b'{"graph_module": {},' + document(folder).lstrip()[1:]
    with pytest.raises(InputError, match="'graph_module' twice") as error:
        check_program(str(planted({"models/model.json": twice})))
    assert error.value.kind == "malformed"


def test_an_export_may_spell_infinity_as_python_does(
    planted: Callable[..., Path], folder: Path
) -> None:
    constant = b'{"more": -Infinity,' + document(folder).lstrip()[1:]
    check_program(str(planted({"models/model.json": constant})))


def test_guards_that_an_export_brings_along_are_never_compiled(
    planted: Callable[..., Path], tmp_path: Path
) -> None:
    def guarded(model: Any) -> Any:
        return {**model, "guards_code": [f"{payload(tmp_path)} is None"]}

    found = load_model(str(planted({"models/model.json": guarded})))

    with held(found.model.module):
        run(found.model, torch.zeros(2, 3, 16, 16))
    assert not (tmp_path / "ran").exists()


class _Everything(nn.Module):
    """Odd names, keywords, a tree of outputs, attention, branches and sizes that are computed."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({"a-b": nn.Conv2d(3, 4, 3, 2), "é": nn.Linear(4, 3)})
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, *, pixels: torch.Tensor) -> dict[str, Any]:
        x = nn.functional.avg_pool2d(self.layers["a-b"](pixels), 2, ceil_mode=True)
        tokens = x.flatten(2).transpose(1, 2) + torch.tensor([0.5])
        tokens = tokens + self.attention(tokens, tokens, tokens)[0]
        y = self.layers["é"](tokens.mean(1))
        y = torch.cond(y.sum() > 0, lambda z: z * 2, lambda z: z - 1, (y,))
        return {"logits": y, "hidden": (x, [tokens])}


def test_what_torch_itself_writes_into_an_export_is_allowed(tmp_path: Path) -> None:
    auto = torch.export.Dim.AUTO
    sizes = {"pixels": {0: torch.export.Dim("n"), 2: auto, 3: auto}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        x = torch.randn(2, 3, 17, 19)
        program = torch.export.export(_Everything().eval(), (), {"pixels": x}, dynamic_shapes=sizes)
        torch.export.save(program, tmp_path / "everything.pt2")

    check_program(str(tmp_path / "everything.pt2"))


@pytest.mark.parametrize(
    "text",
    ["Symbol('s77', positive=True, integer=True)", "FloorDiv(Symbol('u1'), 2) + 3*s0",
     "Max(Integer(1), Add(Symbol('s16'), Integer(-2)))", "Float('2.5', precision=53)",
     "Eq(Mod(s3, 8), 0)"],
)  # fmt: skip
def test_sizes_are_built_of_torchs_own_classes(text: str) -> None:
    assert is_size(text)


@given(text=st.text("SymbolIntegrchaf()'1+,.x= ", max_size=30))
def test_no_size_calls_what_is_no_class_of_a_size(text: str) -> None:
    called = set(re.findall(r"(\w+)\s*\(", text))

    assert not is_size(text) or called <= {"Symbol", "Integer"}


# --- what people's checkpoints hold beside the model ----------------------------------------------


def test_a_trusted_checkpoint_gives_its_state_dict_and_key_another(
    folder: Path, tmp_path: Path
) -> None:
    import argparse

    state = torch.load(folder / "state.pt")
    average = {name: torch.zeros_like(value) for name, value in state.items()}
    saved = {"ema": average, "state_dict": state, "args": argparse.Namespace(lr=1)}
    torch.save(saved, tmp_path / "m.pt")
    path, trust = str(tmp_path / "m.pt"), frozenset({"pickle"})

    found = load_model(path, arch=arch(folder), trust=trust)
    other = load_model(path, arch=arch(folder), trust=trust, key="ema")

    torch.testing.assert_close(found.model.module.state_dict(), state)
    assert not any(parameter.any() for parameter in other.model.module.parameters())
    with pytest.raises(UsageError, match=r"no such entry in .*ema \(9 tensors\), state_dict"):
        load_model(path, arch=arch(folder), trust=trust, key="emma")


def test_tensors_outside_the_models_prefix_are_noted(folder: Path, tmp_path: Path) -> None:
    state = {f"model.{name}": value for name, value in torch.load(folder / "state.pt").items()}
    torch.save({"state_dict": {**state, "loss.weight": torch.ones(4)}}, tmp_path / "m.ckpt")

    found = load_model(str(tmp_path / "m.ckpt"), arch=arch(folder))

    assert any("1 outside the model: loss.weight" in note for note in found.notes)


def test_quantised_weights_are_refused_in_words(folder: Path, tmp_path: Path) -> None:
    state = torch.load(folder / "state.pt")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        state["head.weight"] = torch.quantize_per_tensor(state["head.weight"], 0.1, 0, torch.qint8)
        torch.save(state, tmp_path / "m.pt")

    with pytest.raises(
        InputError, match=r"head\.weight' .*quantised by torch\.ao.*float32"
    ) as error:
        load_model(str(tmp_path / "m.pt"), arch=arch(folder))
    assert error.value.kind == "unsupported"


# --- factories ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("library", "file", "code"),
    [
        ("timm", "timm/__init__.py", "def create_model(name, pretrained=True, **options):"),
        ("torchvision", "torchvision/models/__init__.py", "def get_model(name, **options):"),
    ],
)
def test_models_of_libraries_go_by_their_own_names_and_without_weights(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    library: str,
    file: str,
    code: str,
) -> None:
    """Stand-ins for the libraries, which are not installed where the tests run."""
    for name in [n for n in sys.modules if n.partition(".")[0] == library]:
        monkeypatch.delitem(sys.modules, name)
    (tmp_path / file).parent.mkdir(parents=True)
    (tmp_path / library / "__init__.py").touch()
    (tmp_path / file).write_text(
        f"{SOURCE}\n{code}\n"
        "    assert not options.pop('weights', None) and not locals().get('pretrained')\n"
        "    return {'tiny.v1': tiny}[name](**options)\n"
    )
    monkeypatch.chdir(tmp_path)

    found = load_model(str(folder / "state.pt"), arch=f"{library}:tiny.v1(num_classes=4)")

    for name in [n for n in sys.modules if n.partition(".")[0] == library]:
        del sys.modules[name]  # not by monkeypatch, which would put the stand-in back
    assert found.model.module.head.out_features == 4


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("import sys; sys.exit(3)", "importing .* failed: SystemExit: 3"),
        ("1 +", "importing .* failed: SyntaxError"),
        ("import nosuchthing", "No module named 'nosuchthing'"),
        ("def __getattr__(name): raise ImportError('no part')", "importing net failed.*no part"),
        ("def net(): raise SystemExit('bye')", "failed: SystemExit: bye"),
    ],
)
def test_a_file_of_code_that_fails_is_quoted_and_forgotten(
    folder: Path, tmp_path: Path, code: str, said: str
) -> None:
    (tmp_path / "failing_net.py").write_text(code)
    sys.modules.pop("failing_net", None)

    with pytest.raises(UsageError, match=said):
        load_model(str(folder / "state.pt"), arch=f"{tmp_path / 'failing_net.py'}:net")

    assert "failing_net" not in sys.modules or "def " in code
    (tmp_path / "failing_net.py").write_text("raise KeyError")
    with pytest.raises(UsageError, match="KeyError"):
        load_model(str(folder / "state.pt"), arch=f"{tmp_path / 'failing_net.py'}:net")


@pytest.mark.parametrize("call", ["tiny({[]: 1})", "tiny(" + "-" * 5000 + "1)", "tiny(*[4])"])
def test_options_that_are_no_literals_are_refused(folder: Path, call: str) -> None:
    with pytest.raises(UsageError, match="options are literals"):
        load_model(str(folder / "state.pt"), arch=arch(folder, call))
