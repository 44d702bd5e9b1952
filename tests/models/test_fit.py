"""Which stored tensor becomes which of the module's: versions, prefixes, and what is missing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from gradscope.errors import InputError, UsageError
from gradscope.models.fit import alike
from gradscope.models.load import load_model

SOURCE = """
import torch
from torch import nn

class Versioned(nn.Module):
    # As torchvision's MNASNet refuses unknown versions, and its ViT renames the layers of old ones.
    _version = 2

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2))

    def _load_from_state_dict(self, state, prefix, metadata, *rest):
        version = metadata.get("version")
        if version not in (1, 2):
            raise ValueError(f"version should be 1 or 2 instead of {version}")
        if version == 1:
            state[prefix + "weight"] = state.pop(prefix + "old_weight") * 10
        super()._load_from_state_dict(state, prefix, metadata, *rest)

class Net(nn.Module):
    def __init__(self, depth=3, tied=False):
        super().__init__()
        self.conv = nn.Conv2d(3, 2, 1)
        self.blocks = nn.ModuleList(nn.Linear(2, 2) for _ in range(depth))
        self.part = Versioned()
        self.head = nn.Linear(2, 2)
        if tied:
            self.head.weight = self.blocks[0].weight

    def forward(self, x):
        x = self.conv(x).mean((2, 3)) * self.part.weight
        for block in self.blocks:
            x = block(x)
        return self.head(x)
"""


@pytest.fixture(scope="module")
def code(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("code") / "fitnet.py"
    path.write_text(SOURCE)
    return path


@pytest.fixture(scope="module")
def net(code: Path) -> Any:
    namespace: dict[str, Any] = {"__name__": "fitnet"}
    exec(SOURCE, namespace)
    torch.manual_seed(0)
    made = namespace["Net"]()
    nn.init.normal_(made.part.weight)
    return made


def loaded(path: Path, code: Path, call: str = "Net", **how: Any) -> tuple[Any, tuple[str, ...]]:
    found = load_model(str(path), arch=f"{code}:{call}", **how)
    return found.model.module.state_dict(), found.notes


def same(found: Any, wanted: Any) -> bool:
    return all(torch.equal(found[name], value) for name, value in wanted.items())


# --- versions -------------------------------------------------------------------------------------


def of_version_one(net: nn.Module) -> Any:
    state: Any = net.state_dict()
    state["part.old_weight"] = state.pop("part.weight") / 10
    state._metadata["part"]["version"] = 1
    return state


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"epoch": 1, "state_dict": s}])
def test_a_state_dict_keeps_the_versions_of_its_modules(
    net: nn.Module, code: Path, tmp_path: Path, wrap: Any, legacy: bool
) -> None:
    path, zipped = tmp_path / "m.pt", not legacy
    torch.save(wrap(of_version_one(net)), path, _use_new_zipfile_serialization=zipped)
    old, _ = loaded(path, code)
    torch.save(wrap(net.state_dict()), path, _use_new_zipfile_serialization=zipped)
    new, _ = loaded(path, code)

    torch.testing.assert_close(old["part.weight"], net.state_dict()["part.weight"])
    assert same(new, net.state_dict())


def test_versions_are_kept_below_a_wrappers_prefix_and_in_what_is_trusted(
    net: nn.Module, code: Path, tmp_path: Path
) -> None:
    wrapper = nn.ModuleDict({"module": net})
    state: Any = wrapper.state_dict()
    state["module.part.old_weight"] = state.pop("module.part.weight") / 10
    state._metadata["module.part"]["version"] = 1
    torch.save(state, tmp_path / "plain.pt")
    torch.save({"state_dict": state, "note": Path("x")}, tmp_path / "trusted.pt")

    for name, trust in (("plain.pt", ()), ("trusted.pt", ("pickle",))):
        found, _ = loaded(tmp_path / name, code, trust=frozenset(trust))
        torch.testing.assert_close(found["part.weight"], net.state_dict()["part.weight"])


def test_a_file_without_versions_is_taken_for_todays(
    net: nn.Module, code: Path, tmp_path: Path
) -> None:
    save_file(net.state_dict(), tmp_path / "m.safetensors")

    found, _ = loaded(tmp_path / "m.safetensors", code)

    assert same(found, net.state_dict())


def test_what_a_modules_own_hook_refuses_is_quoted(
    net: nn.Module, code: Path, tmp_path: Path
) -> None:
    state: Any = net.state_dict()
    state._metadata["part"]["version"] = 3
    torch.save(state, tmp_path / "m.pt")

    with pytest.raises(InputError, match=r"refuses them \(version should be 1 or 2 instead of 3\)"):
        loaded(tmp_path / "m.pt", code)


# --- prefixes -------------------------------------------------------------------------------------


def under(prefix: str, net: nn.Module, times: float = 1) -> dict[str, torch.Tensor]:
    return {prefix + name: value * times for name, value in net.state_dict().items()}


@pytest.mark.parametrize(
    "prefix", ["module.", "_orig_mod.", "model.", "net.0.", "module._orig_mod."]
)
def test_what_wrappers_put_before_every_name_is_looked_through(
    net: nn.Module, code: Path, tmp_path: Path, prefix: str
) -> None:
    save_file(under(prefix, net), tmp_path / "m.safetensors")

    assert same(loaded(tmp_path / "m.safetensors", code)[0], net.state_dict())


@pytest.mark.parametrize("form", ["m.safetensors", "m.pt"])
def test_of_student_and_teacher_the_teacher_is_taken_and_key_takes_the_other(
    net: nn.Module, code: Path, tmp_path: Path, form: str
) -> None:
    both = under("student.module.", net, 2) | under("teacher.", net)
    save = save_file if form.endswith("safetensors") else torch.save
    save(both | {"center": torch.zeros(1)}, tmp_path / form)

    teacher, notes = loaded(tmp_path / form, code)
    student, _ = loaded(tmp_path / form, code, key="student.module")

    assert same(teacher, net.state_dict())
    assert same(student, under("", net, 2))
    assert any("took teacher; student.module would fit too (--key student.module" in n
               for n in notes)  # fmt: skip
    assert any("outside the model" in n and "student.module.blocks.… (6)" in n and "center" in n
               for n in notes)  # fmt: skip


def test_a_key_may_end_inside_the_names_of_an_entry(
    net: nn.Module, code: Path, tmp_path: Path
) -> None:
    saved = {"student": under("backbone.", net, 2), "teacher": under("backbone.", net)}
    torch.save(saved, tmp_path / "m.pt")

    for key in ("teacher", "teacher.backbone"):
        assert same(loaded(tmp_path / "m.pt", code, key=key)[0], net.state_dict())
    assert same(loaded(tmp_path / "m.pt", code, key="student")[0], under("", net, 2))


def test_of_a_model_and_its_average_the_model_is_taken(
    net: nn.Module, code: Path, tmp_path: Path
) -> None:
    save_file(under("model_ema.", net, 2) | under("model.", net), tmp_path / "m.safetensors")

    found, notes = loaded(tmp_path / "m.safetensors", code)

    assert same(found, net.state_dict())
    assert any("model_ema would fit too" in note for note in notes)


def test_a_key_that_nothing_begins_with_says_what_there_is(
    net: nn.Module, code: Path, tmp_path: Path
) -> None:
    save_file(under("teacher.", net), tmp_path / "m.safetensors")

    with pytest.raises(UsageError, match="names of tensors begin with teacher"):
        loaded(tmp_path / "m.safetensors", code, key="pupil")


# --- what does not fit ----------------------------------------------------------------------------


def test_missing_tensors_are_listed_by_what_they_share(
    net: nn.Module, code: Path, tmp_path: Path
) -> None:
    torch.save(net.state_dict(), tmp_path / "m.pt")

    with pytest.raises(
        InputError,
        match=r"14 missing from the file: blocks\.\*\.weight \(7\), blocks\.\*\.bias \(7\)$",
    ):
        loaded(tmp_path / "m.pt", code, "Net(depth=10)")
    with pytest.raises(InputError, match=r"4 not in the architecture: blocks\.\*\.weight \(2\)"):
        loaded(tmp_path / "m.pt", code, "Net(depth=1)")


def test_of_tied_weights_a_file_may_hold_one(net: nn.Module, code: Path, tmp_path: Path) -> None:
    state = {**net.state_dict()}
    del state["head.weight"]
    save_file(state, tmp_path / "m.safetensors")

    found, _ = loaded(tmp_path / "m.safetensors", code, "Net(tied=True)")

    assert torch.equal(found["head.weight"], state["blocks.0.weight"])
    with pytest.raises(InputError, match=r"1 missing from the file: head\.weight"):
        loaded(tmp_path / "m.safetensors", code)


@pytest.mark.parametrize(
    ("names", "wanted"),
    [
        (["cls"], "cls"),
        (["a.0.w", "a.1.w", "a.10.w", "b1.w"], "a.*.w (3), b1.w"),
        ([f"e.{i}.{p}.{q}" for i in range(2) for p in "abc" for q in "xyz"],
         "e.*.a.… (6), e.*.b.… (6), e.*.c.… (6)"),
        ([f"layer{i}.conv1.w" for i in range(7)], "layer*.conv*.w (7)"),
        ([f"{c}.w" for c in "abcdefg"], "a.w, b.w, c.w, d.w, e.w and 2 more"),
        (["x.\n"], r"x.\n"),
    ],
)  # fmt: skip
def test_names_are_told_by_what_they_share(names: list[str], wanted: str) -> None:
    assert alike(names) == wanted
