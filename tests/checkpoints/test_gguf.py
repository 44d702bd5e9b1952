"""GGUF files: what is read of them, and what damaged and hostile ones end in."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gradscope
from gradscope.checkpoints.ggml_types import BLOCKS, PLAIN
from gradscope.checkpoints.gguf import read_gguf
from gradscope.checkpoints.open import open_checkpoint
from gradscope.checkpoints.tensors import DTYPE_BITS
from gradscope.checkpoints.tiles import read_range
from gradscope.errors import InputError, UsageError

#: name, shape as we write it, number of the type, bytes.
Tensor = tuple[str, Sequence[int], int, bytes]


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def made(
    tensors: Sequence[Tensor],
    pairs: Mapping[str, bytes] | None = None,
    version: int = 3,
    alignment: int = 32,
) -> bytes:
    """A file by the letter of ggml's docs/gguf.md."""
    pairs = pairs or {}
    header = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(pairs))
    header += b"".join(text(key) + value for key, value in pairs.items())
    data = b""
    for name, shape, kind, content in tensors:
        data += bytes(-len(data) % alignment)
        dims = struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape))
        header += text(name) + dims + struct.pack("<IQ", kind, len(data))
        data += content
    return header + bytes(-len(header) % alignment) + data


def saved(folder: Path, content: bytes) -> str:
    (folder / "model.gguf").write_bytes(content)
    return str(folder / "model.gguf")


W = np.arange(12, dtype="<f4").reshape(3, 4)
PLAIN_FILE = made([("w", (3, 4), 0, W.tobytes()), ("b", (5,), 1, bytes(10))])
NUMBER, STRING, ARRAY = (struct.pack("<I", k) for k in (4, 8, 9))


def test_elements_lie_in_the_order_that_other_programs_mean(tmp_path: Path) -> None:
    found = open_checkpoint(saved(tmp_path, PLAIN_FILE))

    assert [(r.name, r.dtype, r.shape) for r in found.tensors] == [
        ("w", "F32", (3, 4)), ("b", "F16", (5,))
    ]  # fmt: skip
    assert found.format == "gguf"
    assert np.array_equal(read_range(found.tensors[0], 0, 12), W.reshape(-1))


@pytest.mark.parametrize("kind", sorted(PLAIN))
def test_plain_types_are_read(tmp_path: Path, kind: int) -> None:
    size = DTYPE_BITS[PLAIN[kind]] // 8

    report = gradscope.analyze_weights(
        saved(tmp_path, made([("w", (2, 3), kind, bytes(6 * size))]))
    )

    assert report.gate.exit_code != 3
    assert report.result is not None
    assert report.result.tensors[0].dtype == PLAIN[kind]


def test_facts_are_kept_and_arrays_of_tokens_passed_over(tmp_path: Path) -> None:
    tokens = ARRAY + struct.pack("<IQ", 8, 2) + text("<s>") + text("a")
    scores = ARRAY + struct.pack("<IQ2f", 6, 2, 0.5, 1.5)
    pairs = {"general.architecture": STRING + text("llama"), "tokens": tokens, "scores": scores,
             "llama.block_count": NUMBER + struct.pack("<I", 2)}  # fmt: skip

    found = read_gguf(saved(tmp_path, made([("w", (3, 4), 0, W.tobytes())], pairs)))

    assert found.metadata["general.architecture"] == "llama"
    assert found.metadata["llama.block_count"] == 2
    assert found.metadata["tokens"] is found.metadata["scores"] is None
    assert found.tensors[0].offset % 32 == 0


@pytest.mark.parametrize("alignment", [8, 64, 4096])
def test_another_alignment_is_followed(tmp_path: Path, alignment: int) -> None:
    pairs = {"general.alignment": NUMBER + struct.pack("<I", alignment)}
    content = made([("a", (3,), 0, bytes(12)), ("w", (3, 4), 0, W.tobytes())], pairs, 3, alignment)

    found = read_gguf(saved(tmp_path, content))

    assert np.array_equal(read_range(found.tensors[1], 0, 12), W.reshape(-1))


@pytest.mark.parametrize("cut", [1, 20, 47, 60])
def test_what_is_complete_of_a_truncated_file_is_read(tmp_path: Path, cut: int) -> None:
    report = gradscope.analyze_weights(saved(tmp_path, PLAIN_FILE[:-cut]))

    assert report.gate.exit_code == 3
    assert [e.kind for e in report.errors] == ["truncated"]
    complete = 1 if cut <= 26 else 0  # 10 bytes of b, 16 of padding
    assert f"{complete} of 2 tensors are complete" in report.errors[0].message
    assert [f.name for f in report.findings if f.name == "truncated-file"]


@pytest.mark.parametrize("end", [4, 8, 20, 24, 30, 40])
def test_a_header_that_is_cut_off_is_truncated(tmp_path: Path, end: int) -> None:
    with pytest.raises(InputError, match="list of tensors is not complete") as caught:
        read_gguf(saved(tmp_path, PLAIN_FILE[:end]))

    assert caught.value.kind == "truncated"


def overlapping() -> bytes:
    """Two tensors of which the second begins inside the first."""
    content = made([("a", (16,), 0, bytes(64)), ("b", (4,), 0, bytes(16))])
    return content.replace(struct.pack("<IQ", 0, 64), struct.pack("<IQ", 0, 32))


HUGE = 1 << 62
HOSTILE: list[tuple[str, bytes, str]] = [
    ("version 1", made([], version=1), "of version 1"),
    ("big endian", made([], version=3 << 24), "of the other byte order"),
    ("a name twice", made([("w", (1,), 0, bytes(4))] * 2), "'w' is described twice"),
    ("a huge shape", made([("w", (HUGE, 4), 0, b"")]), "has shape"),
    ("many dimensions", made([("w", (1,) * 9, 0, bytes(4))]), "has 9 dimensions"),
    ("an overlap", overlapping(), "'b' overlaps 'a'"),
    ("half a block", made([("w", (2, 48), 8, bytes(102))]), "not whole blocks of 32"),
    ("a long name", b"GGUF" + struct.pack("<IQQQ", 3, 1, 0, HUGE), "a text of"),
    ("no UTF-8", b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1) + b"\xff", "not UTF-8"),
    ("an unknown value", made([], {"k": struct.pack("<I", 99)}), "value of type 99"),
    ("nested arrays", made([], {"k": ARRAY + struct.pack("<IQ", 9, 1) * 9}), "value of type 9"),
    ("no alignment", made([], {"general.alignment": NUMBER + bytes(4)}), "general.alignment is 0"),
    ("alignment of text", made([], {"general.alignment": STRING + text("x")}), "alignment is 'x'"),
]  # fmt: skip


@pytest.mark.parametrize(("content", "said"), [c[1:] for c in HOSTILE], ids=[c[0] for c in HOSTILE])
def test_what_cannot_be_is_malformed(tmp_path: Path, content: bytes, said: str) -> None:
    report = gradscope.analyze_weights(saved(tmp_path, content))

    assert report.gate.exit_code == 3
    assert said in report.errors[0].message


def test_claims_of_many_tensors_end_with_the_file(tmp_path: Path) -> None:
    content = b"GGUF" + struct.pack("<IQQ", 3, 1 << 60, 0) + bytes(200)

    with pytest.raises(InputError):
        read_gguf(saved(tmp_path, content))


def test_a_type_that_is_not_known_costs_its_tensor(tmp_path: Path) -> None:
    content = made([("new", (4,), 77, b""), ("w", (3, 4), 0, W.tobytes())])

    report = gradscope.analyze_weights(saved(tmp_path, content))

    assert report.gate.exit_code == 3
    assert "number 77 of ggml" in report.errors[0].message
    assert report.coverage.analyzed == 1


def test_blocks_need_the_package_for_values_and_not_for_headers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    path = saved(tmp_path, made([("w", (2, 32), 8, bytes(68))]))

    assert gradscope.analyze_weights(path, headers_only=True).gate.exit_code == 0
    with pytest.raises(UsageError, match=r"blocks of Q8_0 .*gradscope-diagnostics\[gguf\]"):
        gradscope.analyze_weights(path)


# -- blocks, as llama.cpp's package has them -------------------------------------------------------


def package() -> Any:
    return pytest.importorskip("gguf", reason="needs the extra `gguf`")


def test_headers_tell_the_type_and_shape_of_blocks(tmp_path: Path) -> None:
    """A row of 512 elements is two blocks of 256, of 144 bytes each."""
    path = saved(tmp_path, made([("blk.0.ffn_up.weight", (3, 512), 12, bytes(3 * 2 * 144))]))

    report = gradscope.analyze_weights(path, headers_only=True)

    assert report.result is not None
    (tensor,) = report.result.tensors
    assert tensor.dequantized is not None
    assert (tensor.dequantized.scheme, tensor.dequantized.stored_shape) == ("gguf Q4_K", (3, 288))
    assert (tensor.shape, tensor.numel, str(tensor.role)) == ((3, 512), 3 * 512, "linear")


def test_one_part_says_that_there_are_more(tmp_path: Path) -> None:
    path = tmp_path / "m-00002-of-00003.gguf"
    path.write_bytes(PLAIN_FILE)

    assert any("one of 3 numbered shards" in note for note in open_checkpoint(str(path)).notes)
    assert open_checkpoint(saved(tmp_path, PLAIN_FILE)).notes == ()


def test_the_table_of_types_is_that_of_the_package() -> None:
    gguf = package()
    theirs = {kind.value: (kind.name, *gguf.GGML_QUANT_SIZES[kind])
              for kind in gguf.GGMLQuantizationType}  # fmt: skip
    ours = {k: (b.name, b.elements, b.nbytes) for k, b in BLOCKS.items()}
    ours |= {k: (name, 1, DTYPE_BITS[name] // 8) for k, name in PLAIN.items()}

    assert theirs.items() <= ours.items()


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q6_K", "IQ4_NL"])
def test_values_of_blocks_are_measured(tmp_path: Path, kind: str) -> None:
    gguf = package()
    qtype = gguf.GGMLQuantizationType[kind]
    elements, size = gguf.GGML_QUANT_SIZES[qtype]
    random = np.random.default_rng(1)
    stored = random.integers(0, 256, (6, 512 // elements, size), np.uint8)
    stored[..., :2] = np.frombuffer(np.float16(0.01).tobytes(), np.uint8)  # scales come first
    if kind == "Q6_K":
        stored[..., -2:] = stored[..., :2]
    if kind in ("Q4_1", "Q5_1", "Q4_K"):
        stored[..., 2:4] = stored[..., :2]
    values = gguf.quants.dequantize(stored.reshape(6, -1), qtype).astype(np.float64)

    report = gradscope.analyze_weights(
        saved(tmp_path, made([("w", (6, 512), qtype.value, stored.tobytes())]))
    )

    assert report.result is not None
    (tensor,) = report.result.tensors
    assert (tensor.shape, tensor.dequantized and tensor.dequantized.scheme) == (
        (6, 512), f"gguf {kind}"
    )  # fmt: skip
    assert tensor.statistics is not None
    assert tensor.statistics.mean == pytest.approx(values.mean(), rel=1e-6, abs=1e-9)
    assert tensor.statistics.std == pytest.approx(values.std(), rel=1e-6)
    assert tensor.statistics.max == pytest.approx(values.max(), rel=1e-6)


def test_eight_bits_are_a_scale_and_integers(tmp_path: Path) -> None:
    package()
    codes = np.arange(-16, 16, dtype=np.int8)
    block = np.float16(0.25).tobytes() + codes.tobytes()

    found = gradscope.analyze_weights(saved(tmp_path, made([("w", (2, 32), 8, block * 2)])))

    assert found.result is not None
    statistics = found.result.tensors[0].statistics
    assert statistics is not None
    assert (statistics.min, statistics.max, statistics.mean) == (-4.0, 3.75, -0.125)
