"""The published schema holds for the report of any checkpoint: every dtype, every odd value."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path

import jsonschema
import numpy as np
import numpy.typing as npt
import pytest

from gradscope.checkpoints.safetensors_header import DTYPES
from gradscope.cli.schema import report_schema
from gradscope.report.formats import renderer
from gradscope.weights.analysis import analyze_weights

SCHEMA = jsonschema.Draft202012Validator(report_schema())
#: dtype, shape, bytes.
Stored = tuple[str, list[int], bytes]


def write(path: Path, tensors: Mapping[str, Stored]) -> str:
    """A safetensors file of any dtype of the format, which its library writes only in part."""
    header, at = {}, 0
    for name, (dtype, shape, raw) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + len(raw)]}
        at += len(raw)
    text = json.dumps(header).encode()
    data = b"".join(raw for _, _, raw in tensors.values())
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return str(path)


def holds(*paths: str, **options: object) -> dict:
    """The report of some checkpoints, after it was found to be strict JSON of the schema."""

    def refuse(token: str) -> None:
        raise ValueError(f"{token} is no JSON")

    text = renderer("json")(analyze_weights(*paths, **options))
    report: dict = json.loads(text, parse_constant=refuse)
    SCHEMA.validate(report)
    return report


def stored(dtype: str, values: npt.NDArray) -> Stored:
    return dtype, list(values.shape), values.tobytes()


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_of_the_format_gives_a_report_of_the_schema(tmp_path: Path, dtype: str) -> None:
    random = np.random.default_rng(0)
    size = 32 * DTYPES[dtype]  # bytes of 16 x 16
    tensors = {
        "random.weight": random.integers(0, 256, size, dtype=np.uint8).tobytes(),
        "zeros.weight": bytes(size),
        "ones.weight": b"\xff" * size,
    }
    kinds = {name: (dtype, [16, 16], raw) for name, raw in tensors.items()}
    kinds["empty.weight"] = (dtype, [0, 3], b"")
    if DTYPES[dtype] >= 8:
        kinds["scalar"] = (dtype, [], b"\x81" * (DTYPES[dtype] // 8))
    path = write(tmp_path / "model.safetensors", kinds)
    assert len(holds(path)["result"]["tensors"]) == len(kinds)
    holds(path, headers_only=True)


ODD = {
    "ends of float64": np.array([[1.7e308, -1.7e308, 1e308], [1e-300, 5e-324, 0]]),
    "huge": np.random.default_rng(0).standard_normal((64, 64)) * 1e300,
    "one huge": np.array([[1e308]]),
    "subnormal": np.full((64, 64), 5e-324),
    "NaN alone": np.full((4, 4), np.nan),
    "Inf alone": np.full((4, 4), -np.inf),
    "mixed": np.array([np.inf, -np.inf, np.nan, 1.0]),
    "one far out": np.where(np.arange(4096).reshape(64, 64) == 7, 1e308, 1e-3),
}


@pytest.mark.parametrize("dtype", ["F64", "F32", "C64"])
@pytest.mark.parametrize("kind", ODD)
def test_values_that_json_has_no_numbers_for_are_of_the_schema(
    tmp_path: Path, kind: str, dtype: str
) -> None:
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        values = ODD[kind].astype({"F64": "f8", "F32": "f4", "C64": "c8"}[dtype])
    names = ("m.weight", "m.running_var", "m.bias")
    path = write(tmp_path / "m.safetensors", {name: stored(dtype, values) for name in names})
    holds(path)


def test_integers_beyond_float64_are_written_exactly(tmp_path: Path) -> None:
    values = {
        "u": np.array([2**64 - 1, 2**53 + 1], np.uint64),
        "i": np.array([-(2**63), 2**63 - 1]),
    }
    tensors = {"u": stored("U64", values["u"]), "i": stored("I64", values["i"])}
    report = holds(write(tmp_path / "m.safetensors", tensors))
    found = {t["name"]: t["statistics"]["max"] for t in report["result"]["tensors"]}
    assert found == {"u": 2**64 - 1, "i": 2**63 - 1}


def test_what_could_not_be_read_is_of_the_schema(tmp_path: Path) -> None:
    whole = write(tmp_path / "a.safetensors", {"w": stored("F32", np.ones((4, 4), np.float32))})
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(Path(whole).read_bytes()[:-2])
    absent = str(tmp_path / "absent")
    assert holds(absent)["result"] is None
    assert len(holds(whole, str(cut), absent)["errors"]) == 2
    assert holds(whole, include=["none"])["gate"]["exit_code"] == 4
    assert holds(whole, include=["none"], allow_empty=True)["gate"]["exit_code"] == 0
    assert holds(whole, whole, exclude=["w"])["coverage"]["skipped"]


def test_the_schema_refuses_what_a_report_is_not(tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", {"w": stored("F32", np.ones((4, 4), np.float32))})
    for place, wrong in (("std", "Inf"), ("std", "1.0"), ("count", 1.5), ("count", None)):
        report = holds(path)
        report["result"]["tensors"][0]["statistics"][place] = wrong
        with pytest.raises(jsonschema.ValidationError):
            SCHEMA.validate(report)
