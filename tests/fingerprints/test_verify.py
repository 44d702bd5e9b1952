"""Manifests: what is recorded of a checkpoint, and what differs from it later."""

from __future__ import annotations

import json
import subprocess
import sys
from hashlib import blake2b
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import gradscope
from gradscope.cli.schema import report_schema
from gradscope.errors import InputError
from gradscope.fingerprints.document import read_manifest, written
from gradscope.report.model import as_json

State = dict[str, torch.Tensor]


def model() -> State:
    """A few tensors of every kind that is hashed."""
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(40, 30, generator=generator)
    return {
        "a.weight": w,
        "b.weight": w.bfloat16(),
        "c.weight": w.half(),
        "d.weight": w.to(torch.float8_e4m3fn),
        "e.weight": w.double(),
        "ids": torch.arange(50),
        "mask": w > 0,
        "step": torch.tensor(3),
        "none": torch.zeros(0, 4),
    }


def saved(folder: Path, state: State, name: str = "model") -> str:
    path = folder / f"{name}.safetensors"
    save_file({n: t.contiguous() for n, t in state.items()}, path)
    return str(path)


def recorded(folder: Path, path: str, name: str = "model") -> str:
    """The manifest of a checkpoint, as a file."""
    made = folder / f"{name}.manifest.json"
    made.write_text(written(gradscope.manifest(path)))
    return str(made)


def differing(report: Any) -> dict[str, str]:
    return {t.name: t.status for t in report.result.tensors if t.status != "match"}


def test_a_checkpoint_matches_its_own_manifest(tmp_path: Path) -> None:
    path = saved(tmp_path, model())

    report = gradscope.verify(path, manifest=recorded(tmp_path, path))

    assert (report.gate.exit_code, report.findings) == (0, ())
    assert report.result.counts == {"match": len(model())}
    jsonschema.validate(as_json(report), report_schema())


@pytest.mark.parametrize("name", [n for n, t in model().items() if t.numel()])
@pytest.mark.parametrize("bit", [0, 7])
def test_any_flipped_bit_names_its_tensor(tmp_path: Path, name: str, bit: int) -> None:
    path = saved(tmp_path, model())
    made = recorded(tmp_path, path)
    content = bytearray(Path(path).read_bytes())
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    begin, end = header[name]["data_offsets"]
    content[8 + length + (begin + end) // 2] ^= 1 << bit
    Path(path).write_bytes(content)

    report = gradscope.verify(path, manifest=made)

    assert differing(report) == {name: "changed"}
    assert [f.subject for f in report.findings] == [name]
    assert report.gate.exit_code == 1


def test_the_hash_is_that_of_the_elements_whatever_holds_them(tmp_path: Path) -> None:
    state = {n: t for n, t in model().items() if t.dtype != torch.bfloat16 and n != "d.weight"}
    state["turned"] = model()["a.weight"].T  # not contiguous in the torch file
    torch.save(state, tmp_path / "model.pt")
    np.savez(tmp_path / "model.npz", **{n: t.numpy() for n, t in state.items()})
    made = recorded(tmp_path, saved(tmp_path, state))

    for name in ("model.pt", "model.npz"):
        report = gradscope.verify(tmp_path / name, manifest=made)
        assert differing(report) == {}


def test_the_hash_is_documented(tmp_path: Path) -> None:
    weight = torch.arange(6, dtype=torch.float32).reshape(2, 3)
    found = gradscope.manifest(saved(tmp_path, {"w": weight})).tensors["w"]

    part = blake2b(weight.numpy().astype("<f4").tobytes(), digest_size=16).digest()
    assert found.hash == blake2b(b"F32[2, 3]" + part, digest_size=32).hexdigest()


def test_kinds_of_difference_are_told_apart(tmp_path: Path) -> None:
    made = recorded(tmp_path, saved(tmp_path, model()))
    new = model()
    new["a.weight"] = new["a.weight"].double()
    new["b.weight"] = new["b.weight"].flip(0)
    new["c.weight"] = new["c.weight"].reshape(30, 40)
    new["ids"] = new["ids"] + 1
    del new["mask"]
    new["more"] = torch.ones(3)

    report = gradscope.verify(saved(tmp_path, new), manifest=made)

    assert differing(report) == {
        "a.weight": "retyped", "b.weight": "rearranged", "c.weight": "reshaped",
        "ids": "changed", "mask": "missing", "more": "added",
    }  # fmt: skip
    assert {f.name for f in report.findings} == {"manifest-mismatch"}
    assert len(report.findings) == 6


def test_another_version_of_a_model_is_one_finding(tmp_path: Path) -> None:
    state = {f"layers.{n}.weight": torch.full((4, 4), float(n)) for n in range(40)}
    made = recorded(tmp_path, saved(tmp_path, state))

    report = gradscope.verify(saved(tmp_path, {n: t + 1 for n, t in state.items()}), manifest=made)

    assert len(report.findings) == 1
    assert "another version" in report.findings[0].recommendation


def test_a_change_of_a_long_tensor_is_placed(tmp_path: Path) -> None:
    state = {"long": torch.zeros((16 << 20) * 2 + 5, dtype=torch.int8)}
    made = recorded(tmp_path, saved(tmp_path, state))
    state["long"][(16 << 20) + 3] = 1

    report = gradscope.verify(saved(tmp_path, state), manifest=made)

    assert report.result.tensors[0].between == ((16 << 20, 32 << 20),)
    assert "between elements 16,777,216 and 33,554,432" in report.findings[0].message


def test_ranks_compare_by_their_manifests(tmp_path: Path) -> None:
    paths = []
    for rank in range(3):
        state = model()
        if rank == 2:
            state["b.weight"][7, 7] += 1
        paths.append(recorded(tmp_path, saved(tmp_path, state, f"rank{rank}"), f"rank{rank}"))

    report = gradscope.verify(*paths[1:], manifest=paths[0])

    assert [(f.subject, f.input) for f in report.findings] == [("b.weight", paths[2])]


@pytest.mark.parametrize("content", [b"", b"{}", b"[1]", b'{"format": "gradscope.manifest"}'])
def test_what_is_no_manifest_is_exit_3(tmp_path: Path, content: bytes) -> None:
    path = saved(tmp_path, model())
    bad = tmp_path / "bad.json"
    bad.write_bytes(content)

    report = gradscope.verify(path, manifest=bad)

    assert report.gate.exit_code == 3
    assert "not a manifest" in report.errors[0].message


def test_a_newer_manifest_is_refused(tmp_path: Path) -> None:
    made = Path(recorded(tmp_path, saved(tmp_path, model())))
    made.write_text(made.read_text().replace('"version": "1.0"', '"version": "2.0"', 1))

    with pytest.raises(InputError, match="version 2"):
        read_manifest(made)


def test_a_bad_checkpoint_does_not_hide_a_good_one(tmp_path: Path) -> None:
    path = saved(tmp_path, model())

    report = gradscope.verify(tmp_path / "absent.pt", path, manifest=recorded(tmp_path, path))

    assert report.gate.exit_code == 3
    assert report.result.counts == {"match": len(model())}


def test_the_commands_speak_to_each_other(tmp_path: Path) -> None:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "gradscope", *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=120)

    path = saved(tmp_path, model())
    made = run("manifest", path)
    (tmp_path / "m.json").write_text(made.stdout)

    assert (made.returncode, made.stderr) == (0, "")
    assert run("verify", path, "--manifest", str(tmp_path / "m.json")).returncode == 0
    assert run("verify", path).returncode == 2
    assert run("manifest", str(tmp_path / "absent.pt")).returncode == 3


def test_the_manifest_does_not_depend_on_jobs(tmp_path: Path) -> None:
    path = saved(tmp_path, model())

    assert gradscope.manifest(path, jobs=1) == gradscope.manifest(path, jobs=3)
