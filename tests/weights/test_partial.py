"""What was left out unasked ends in 3 with its reason, and nothing analysed never in 0."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import gradscope

from .checkpoints import gaussian, write


def odd(kind: str) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return {
            "meta": torch.ones(3, 3, device="meta"),
            "quantised": torch.quantize_per_tensor(torch.ones(3, 3), 0.1, 0, torch.qint8),
            "nested": torch.nested.nested_tensor([torch.ones(2)]),
            "conjugated": torch.ones(3, dtype=torch.complex64).conj(),
            "array": np.ones(3),
        }[kind]


@pytest.mark.parametrize("kind", ["meta", "quantised", "nested", "conjugated", "array"])
@pytest.mark.parametrize("headers_only", [False, True])
def test_a_tensor_that_cannot_be_read_ends_in_3_and_is_named(tmp_path, kind, headers_only):
    path = tmp_path / "a.pt"
    torch.save({"w": torch.randn(4, 4), "odd": odd(kind)}, path)
    report = gradscope.analyze_weights(path, headers_only=headers_only)
    assert report.gate.exit_code == 3
    assert (report.coverage.analyzed, report.coverage.total) == (1, 2)
    (error,) = report.errors
    assert error.input == str(path)
    assert "1 of 2 tensors could not be analysed: 'odd'" in error.message
    assert error.message in report.gate.reasons[0]
    assert report.result.tensors[0].name == "w"


def test_the_same_without_it_passes(tmp_path: Path) -> None:
    torch.save({"w": torch.randn(4, 4)}, tmp_path / "a.pt")
    report = gradscope.analyze_weights(tmp_path / "a.pt")
    assert (report.gate.exit_code, report.errors) == (0, ())


def test_reasons_are_told_once_each_and_not_without_end(tmp_path: Path) -> None:
    many = {f"m{i}": torch.ones(2, device="meta") for i in range(20)}
    views = {f"v{i}": torch.ones(1).expand(2**40 + i) for i in range(9)}
    torch.save({**many, **views, "w": torch.ones(2)}, tmp_path / "a.pt")
    (error,) = gradscope.analyze_weights(tmp_path / "a.pt").errors
    assert "29 of 30 tensors" in error.message
    assert "'m0', 'm1', 'm2' and 17 more" in error.message
    assert "6 more reasons" in error.message


def test_what_was_asked_to_be_left_out_does_not_count(tmp_path: Path) -> None:
    torch.save({"w": torch.randn(4, 4), "v": torch.randn(4, 4)}, tmp_path / "a.pt")
    report = gradscope.analyze_weights(tmp_path / "a.pt", exclude=["v"])
    assert (report.gate.exit_code, report.errors) == (0, ())


def test_another_model_in_the_file_is_named_and_costs_nothing(tmp_path: Path) -> None:
    state = {"w": torch.randn(4, 4)}
    torch.save({"generator": state, "critic": {"c": torch.randn(4, 4)}}, tmp_path / "a.pt")
    report = gradscope.analyze_weights(tmp_path / "a.pt")
    assert report.gate.exit_code == 0
    assert "--key critic" in report.coverage.skipped[0].reason


def test_raw_bytes_of_an_npz_end_in_3(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", w=np.ones((3, 3)), fp8=np.zeros(9, "V1"))
    report = gradscope.analyze_weights(tmp_path / "a.npz")
    assert report.gate.exit_code == 3
    assert "float8" in report.errors[0].message


def test_a_failure_tells_what_was_lost_with_it_once(tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", {"a": gaussian(8, 8), "b": gaussian(8, 8)})
    path.write_bytes(path.read_bytes()[:-8])
    report = gradscope.analyze_weights(path)
    assert report.gate.exit_code == 3
    assert [e.kind for e in report.errors] == ["truncated"]


@pytest.mark.parametrize("headers_only", [False, True])
def test_tensors_without_elements_alone_are_inconclusive(tmp_path, headers_only):
    empty = {f"l.{i}.weight": torch.zeros(0) for i in range(3)}
    save_file(empty, tmp_path / "a.safetensors")
    torch.save(empty, tmp_path / "a.pt")
    for name in ("a.safetensors", "a.pt"):
        report = gradscope.analyze_weights(tmp_path / name, headers_only=headers_only)
        assert report.gate.exit_code == 4, name
        assert (report.coverage.analyzed, report.coverage.total) == (0, 3)


def test_one_empty_tensor_among_others_is_analysed_as_before(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(0), "w": torch.randn(4, 4)}, tmp_path / "a.safetensors")
    report = gradscope.analyze_weights(tmp_path / "a.safetensors")
    assert report.gate.exit_code == 0
    assert report.coverage.analyzed == report.coverage.total == 2
