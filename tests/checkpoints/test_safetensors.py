"""The safetensors reader against the reference library, and against files made to hurt it."""

from __future__ import annotations

import json
import struct
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as made_by_numpy
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file, save_file

from gradscope.checkpoints.safetensors import read_safetensors
from gradscope.errors import GradscopeError, InputError

if TYPE_CHECKING:
    from gradscope.checkpoints.tensors import Checkpoint

FUZZ = settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def entry(dtype: object, shape: object, begin: object, end: object) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def text_entry(dtype: str, shape: str, offsets: str) -> str:
    return f'{{"dtype":"{dtype}","shape":{shape},"data_offsets":{offsets}}}'


def write(path: Path, header: object, data: bytes = b"") -> str:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + data)
    return str(path)


def refusal(path: str) -> InputError:
    with pytest.raises(InputError) as caught:
        read_safetensors(path)
    assert caught.value.path == path
    assert path not in caught.value.message
    return caught.value


def reference_accepts(path: str) -> bool:
    try:
        with safe_open(path, "np") as file:
            return file.keys() is not None
    except (SafetensorError, OSError):
        return False


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "model.safetensors"


# What a good file is.


def test_names_shapes_dtypes_and_bytes_are_those_of_the_reference(file: Path) -> None:
    arrays: dict[str, np.ndarray] = {
        "b.weight": np.arange(6, dtype=np.float32).reshape(2, 3),
        "a.bias": np.array([1, 2, 3], dtype=np.int64),
        "scalar": np.array(7, dtype=np.float16),
        "empty": np.zeros((0, 4), dtype=np.uint8),
        "flags": np.array([True, False]),
    }
    save_file(arrays, file, metadata={"format": "pt"})
    checkpoint = read_safetensors(str(file))
    raw = file.read_bytes()
    with safe_open(file, "np") as reference:
        assert {tensor.name for tensor in checkpoint.tensors} == set(reference.keys())
        for tensor in checkpoint.tensors:
            expected = reference.get_slice(tensor.name)
            assert list(tensor.shape) == expected.get_shape()
            assert tensor.dtype == expected.get_dtype()
            stored = raw[tensor.offset : tensor.offset + tensor.nbytes]
            assert stored == arrays[tensor.name].tobytes()
    assert checkpoint.metadata == {"format": "pt"}
    assert (checkpoint.format, checkpoint.nbytes) == ("safetensors", len(raw))
    assert (checkpoint.problems, checkpoint.skipped, checkpoint.failures) == ((), (), ())
    assert checkpoint.stamps[str(file)][0] == len(raw)


DTYPES = st.sampled_from(
    ["float64", "float32", "float16", "int64", "int32", "int16", "int8", "uint8", "uint16",
     "uint32", "uint64", "bool", "complex64"]
)  # fmt: skip


@FUZZ
@given(
    arrays=st.dictionaries(
        st.text(st.characters(exclude_categories=["Cs"]), max_size=12),
        made_by_numpy.arrays(DTYPES, made_by_numpy.array_shapes(min_dims=0, min_side=0)),
        max_size=6,
    ),
    # The library writes invalid JSON for empty metadata and no tensors.
    metadata=st.none() | st.dictionaries(st.text(max_size=5), st.text(max_size=5), min_size=1),
)
def test_any_dictionary_of_arrays_is_read_as_the_library_reads_it(
    tmp_path: Path, arrays: dict[str, np.ndarray], metadata: dict[str, str] | None
) -> None:
    path = tmp_path / "any.safetensors"
    save_file(arrays, path, metadata=metadata)
    checkpoint, raw = read_safetensors(str(path)), path.read_bytes()
    loaded = load_file(path)
    assert {tensor.name for tensor in checkpoint.tensors} == set(loaded)
    with safe_open(path, "np") as reference:
        assert dict(checkpoint.metadata) == (reference.metadata() or {})
        for tensor in checkpoint.tensors:
            assert tensor.dtype == reference.get_slice(tensor.name).get_dtype()
            assert tensor.shape == loaded[tensor.name].shape
            stored = raw[tensor.offset : tensor.offset + tensor.nbytes]
            assert stored == loaded[tensor.name].tobytes()


def test_tensors_come_in_file_order(file: Path) -> None:
    header = {"late": entry("U8", [2], 3, 5), "early": entry("U8", [3], 0, 3)}
    checkpoint = read_safetensors(write(file, header, bytes(5)))
    assert [tensor.name for tensor in checkpoint.tensors] == ["early", "late"]


@pytest.mark.parametrize(
    "name", ["", "\x1b[31mred", "a\nb", "[bold]x[/bold]", "<script>", "\0", "ü" * 300, "../../etc"]
)
def test_hostile_names_are_kept_verbatim(file: Path, name: str) -> None:
    checkpoint = read_safetensors(write(file, {name: entry("U8", [1], 0, 1)}, b"x"))
    assert [tensor.name for tensor in checkpoint.tensors] == [name]


def test_sub_byte_types_are_measured_in_bits(file: Path) -> None:
    header = {"f4": entry("F4", [3, 2], 0, 3), "f6": entry("F6_E2M3", [4], 3, 6)}
    checkpoint = read_safetensors(write(file, header, bytes(6)))
    assert [(t.numel, t.nbytes) for t in checkpoint.tensors] == [(6, 3), (4, 3)]


def test_misaligned_offsets_are_fine(file: Path) -> None:
    header = {"a": entry("U8", [1], 0, 1), "b": entry("F32", [1], 1, 5)}
    assert len(read_safetensors(write(file, header, bytes(5))).tensors) == 2


@pytest.mark.parametrize("dtype", ["f32", "F128", "C128", "", "🦀"])
def test_an_unknown_dtype_costs_only_its_own_tensor(file: Path, dtype: str) -> None:
    header = {"odd": entry(dtype, [1], 0, 4), "good": entry("F32", [1], 4, 8)}
    checkpoint = read_safetensors(write(file, header, bytes(8)))
    assert [tensor.name for tensor in checkpoint.tensors] == ["good"]
    assert [item.subject for item in checkpoint.skipped] == ["odd"]
    assert "unknown dtype" in checkpoint.skipped[0].reason
    assert "BF16" in checkpoint.skipped[0].reason


def test_more_dimensions_than_numpy_has_are_skipped(file: Path) -> None:
    checkpoint = read_safetensors(write(file, {"x": entry("U8", [1] * 65, 0, 1)}, b"x"))
    assert "65 dimensions" in checkpoint.skipped[0].reason


@pytest.mark.parametrize(
    ("header", "note"),
    [
        (b' {"a":%b}', "white space"),
        (b'{"__metadata__":null,"a":%b}', "null"),
        (b'{"__metadata__":{"k":"1","k":"2"},"a":%b}', "'k' twice"),
        (b'{"a":{"device":"cuda",%b}', "'device' of 'a'"),
    ],
)
def test_what_is_against_the_format_but_harmless_is_noted(
    file: Path, header: bytes, note: str
) -> None:
    described = text_entry("U8", "[1]", "[0,1]").encode()
    body = described[1:] if b"device" in header else described
    path = write(file, header % body, b"x")
    assert reference_accepts(path)
    checkpoint = read_safetensors(path)
    assert len(checkpoint.tensors) == 1
    assert any(note in text for text in checkpoint.notes)


# Truncation.


def test_a_truncated_file_yields_its_complete_tensors(file: Path) -> None:
    header = {f"t{i}": entry("U8", [1000], 1000 * i, 1000 * (i + 1)) for i in range(5)}
    path = write(file, header, bytes(3200))
    checkpoint = read_safetensors(path)
    assert [tensor.name for tensor in checkpoint.tensors] == ["t0", "t1", "t2"]
    assert [item.subject for item in checkpoint.skipped] == ["t3", "t4"]
    assert "800 of its 1,000 bytes" in checkpoint.skipped[0].reason
    (failure,) = checkpoint.failures
    assert failure.kind == "truncated"
    assert "1.8 kB of 5." in failure.message
    assert "last complete tensor is 't2' (3 of 5 tensors are complete)" in failure.message
    (problem,) = checkpoint.problems
    assert (problem.kind, problem.subject) == ("truncated-file", "model.safetensors")
    expected = file.stat().st_size + 1800
    assert problem.evidence == {
        "missing_bytes": 1800,
        "expected_bytes": expected,
        "complete_tensors": 3,
        "tensors": 5,
    }


def test_every_truncation_of_a_file_is_noticed(file: Path) -> None:
    save_file({"a": np.ones(3, np.float32), "b": np.ones((2, 2), np.float16)}, file)
    raw = file.read_bytes()
    for size in range(len(raw)):
        file.write_bytes(raw[:size])
        assert kinds(str(file)) == ["truncated"]


def kinds(path: str) -> list[str]:
    try:
        return [failure.kind for failure in read_safetensors(path).failures]
    except InputError as error:
        return [error.kind]


def test_a_header_that_is_cut_off_says_how_much_it_claims(file: Path) -> None:
    file.write_bytes(struct.pack("<Q", 1000) + b'{"a"')
    error = refusal(str(file))
    assert error.kind == "truncated"
    assert "1,000" in error.message


@pytest.mark.parametrize("size", [0, 1, 7])
def test_less_than_a_length_is_truncated(file: Path, size: int) -> None:
    file.write_bytes(b"x" * size)
    assert refusal(str(file)).kind == "truncated"


# Duplicates.


@pytest.mark.parametrize(
    ("first", "last", "ranges"),
    [
        (("F32", "[1]", "[0,4]"), ("I8", "[2,2]", "[0,4]"), ("0-4", "0-4")),
        (("F32", "[1]", "[0,4]"), ("I8", "[4]", "[4,8]"), ("0-4", "4-8")),
    ],
)
def test_a_name_described_twice_is_reported_and_analysed(
    file: Path, first: tuple[str, str, str], last: tuple[str, str, str], ranges: tuple[str, str]
) -> None:
    header = f'{{"w":{text_entry(*first)},"w":{text_entry(*last)}}}'.encode()
    checkpoint = read_safetensors(write(file, header, bytes(int(ranges[1].split("-")[1]))))
    (tensor,) = checkpoint.tensors
    assert tensor.dtype == "I8"
    (problem,) = checkpoint.problems
    assert (problem.kind, problem.subject) == ("duplicate-tensor-name", "w")
    assert (problem.evidence["first_range"], problem.evidence["last_range"]) == ranges
    assert not checkpoint.failures


def test_a_thousand_duplicates_do_not_drown_the_report(file: Path) -> None:
    described = text_entry("U8", "[0]", "[0,0]")
    header = ",".join(f'"t{i}":{described},"t{i}":{described}' for i in range(1000))
    checkpoint = read_safetensors(write(file, f"{{{header}}}".encode()))
    assert len(checkpoint.problems) == 20
    assert any("980 more" in note for note in checkpoint.notes)


# What is refused: each row also says whether the reference refuses it.

U8 = text_entry("U8", "[4]", "[0,4]")
MALFORMED: list[tuple[str, bytes, int, str]] = [
    ("no header", b"", 0, "not valid JSON"),
    ("an array", b"[]", 0, "an array"),
    ("not JSON", b"{oops}", 0, "byte 1"),
    ("cut JSON", b'{"a":', 0, "byte 5"),
    ("offset in bytes", '{"ü":oops}'.encode(), 0, "byte 6"),
    ("byte order mark", b"\xef\xbb\xbf{}", 0, "not valid JSON"),
    ("NUL padding", b"{}\0\0", 0, "not valid JSON"),
    ("junk behind", b"{}{}", 0, "byte 2"),
    ("not UTF-8", b'{"\xff":1}', 0, "UTF-8 at byte 2"),
    ("half a surrogate", b'{"\\ud800":%b}' % U8.encode(), 4, "Unicode"),
    ("NaN", b'{"a":NaN}', 0, "NaN"),
    ("Infinity", b'{"a":-Infinity}', 0, "Infinity"),
    ("deep", b"[" * 500, 0, "header"),
    ("a huge integer", b'{"a":%b}' % (b"9" * 5000), 0, "digits"),
    ("a list of metadata", b'{"__metadata__":[]}', 0, "__metadata__"),
    ("a number in metadata", b'{"__metadata__":{"a":1}}', 0, "'a'"),
    ("metadata twice", b'{"__metadata__":{},"__metadata__":{}}', 0, "twice"),
    ("entry is null", b'{"a":null}', 0, "null"),
    ("field twice", b'{"a":{"dtype":"U8",%b}' % U8[1:].encode(), 4, "'dtype' twice"),
    ("no dtype", b'{"a":{"shape":[4],"data_offsets":[0,4]}}', 4, "no dtype"),
    ("no shape", b'{"a":{"dtype":"U8","data_offsets":[0,4]}}', 4, "no shape"),
    ("no offsets", b'{"a":{"dtype":"U8","shape":[4]}}', 4, "no data_offsets"),
    ("dtype a number", b'{"a":{"dtype":8,"shape":[4],"data_offsets":[0,4]}}', 4, "dtype"),
]
SHAPES = {
    "negative": "[-4]",
    "fraction": "[4.0]",
    "exponent": "[4e0]",
    "boolean": "[4,true]",
    "text": '["4"]',
    "a number": "4",
    "too small": "[3]",
    "too large": "[5]",
    "overflow": f"[{2**47},{2**47}]",
    "beyond 2^63": f"[{2**64}]",
}
OFFSETS = {
    "reversed": "[4,0]",
    "three": "[0,4,8]",
    "one": "[4]",
    "negative offset": "[-4,0]",
    "fractions": "[0.0,4.0]",
    "booleans": "[false,4]",
    "beyond": f"[0,{2**64}]",
    "object": "{}",
}
MALFORMED += [
    (name, f'{{"a":{text_entry("U8", shape, "[0,4]")}}}'.encode(), 4, "'a'")
    for name, shape in SHAPES.items()
]
MALFORMED += [
    (name, f'{{"a":{text_entry("U8", "[4]", offsets)}}}'.encode(), 4, "'a'")
    for name, offsets in OFFSETS.items()
]


def layout(*ranges: tuple[int, int]) -> bytes:
    names = "abcdef"
    tensors = {names[i]: entry("U8", [e - b], b, e) for i, (b, e) in enumerate(ranges)}
    return json.dumps(tensors).encode()


MALFORMED += [
    ("overlap", layout((0, 3), (2, 4)), 4, "'b' (bytes 2 to 4) overlaps tensor 'a' (bytes 0 to 3)"),
    ("same range", layout((0, 4), (0, 4)), 4, "overlaps"),
    ("gap", layout((0, 1), (3, 4)), 4, "bytes 1 to 3"),
    ("late start", layout((2, 4)), 4, "2 bytes that belong to no tensor"),
    ("empty inside", layout((0, 4), (2, 2)), 4, "'b'"),
    ("trailing", layout((0, 4)), 7, "3 extra bytes after the last tensor"),
    ("odd F4", b'{"a":%b}' % text_entry("F4", "[3]", "[0,2]").encode(), 2, "whole number"),
    ("odd F6", b'{"a":%b}' % text_entry("F6_E3M2", "[3]", "[0,3]").encode(), 3, "whole number"),
]


@pytest.mark.parametrize(
    ("header", "data", "said"), [row[1:] for row in MALFORMED], ids=[row[0] for row in MALFORMED]
)
def test_malformed_files_are_refused_as_the_reference_refuses_them(
    file: Path, header: bytes, data: int, said: str
) -> None:
    path = write(file, header, bytes(data))
    error = refusal(path)
    assert error.kind == "malformed"
    assert said in error.message
    assert not reference_accepts(path)


@pytest.mark.parametrize("shape", [[0, 2**63, 4], [0, 2**47, 2**47]])
def test_an_empty_shape_that_no_array_can_have_is_refused(file: Path, shape: list[int]) -> None:
    """The reference accepts it in the header and fails when the tensor is loaded."""
    path = write(file, {"a": entry("U8", shape, 0, 0)})
    assert refusal(path).kind == "malformed"


def test_a_deeply_nested_unknown_field_is_refused(file: Path) -> None:
    nested = "[" * 300 + "]" * 300
    header = f'{{"a":{{"x":{nested},{text_entry("U8", "[1]", "[0,1]")[1:]}}}'
    assert refusal(write(file, header.encode(), b"x")).kind == "malformed"


def test_a_header_beyond_the_cap_is_refused_before_it_is_read(file: Path) -> None:
    with file.open("wb") as stream:
        stream.write(struct.pack("<Q", 10**15))
        stream.truncate(2 * 10**8)
    started = time.process_time()
    error = refusal(str(file))
    assert error.kind == "malformed"
    assert "100,000,000" in error.message
    assert time.process_time() - started < 1


@pytest.mark.parametrize("opening", [b"[", b'{"a":', b'{"a":{"x":['])
def test_five_megabytes_of_brackets_are_refused_quickly(file: Path, opening: bytes) -> None:
    path = write(file, opening * (5_000_000 // len(opening)))
    started = time.process_time()
    assert refusal(path).kind == "malformed"
    assert time.process_time() - started < 5


def test_a_shape_of_a_million_dimensions_is_refused_quickly(file: Path) -> None:
    path = write(file, {"a": entry("U8", [2**47] * 200_000, 0, 4)}, bytes(4))
    started = time.process_time()
    assert refusal(path).kind == "malformed"
    assert time.process_time() - started < 5


def test_directories_and_missing_files_are_input_errors(tmp_path: Path) -> None:
    assert refusal(str(tmp_path)).kind == "unsupported"
    assert refusal(str(tmp_path / "none")).kind == "missing"


# Fuzzing: whatever the bytes, the answer is a Checkpoint or an error meant for a person.


def answers(path: str) -> Checkpoint | None:
    started = time.process_time()
    try:
        checkpoint = read_safetensors(path)
    except GradscopeError:
        checkpoint = None
    assert time.process_time() - started < 2
    return checkpoint


@FUZZ
@given(
    changes=st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), max_size=4),
    end=st.integers(0, 500),
)
def test_mutated_files_never_crash_the_reader(
    tmp_path: Path, changes: list[tuple[int, int]], end: int
) -> None:
    path = tmp_path / "m"
    save_file({"a": np.ones(8, np.float32), "b": np.ones((2, 3), np.float16)}, path)
    raw = bytearray(path.read_bytes())
    for at, value in changes:
        raw[at % len(raw)] = value
    path.write_bytes(raw[:end])
    checkpoint = answers(str(path))
    if reference_accepts(str(path)):
        assert checkpoint is not None


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=12,
)
ENTRY = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(["F32", "U8", "F4", "x"]) | JSON,
        "shape": st.lists(st.integers(-1, 4), max_size=3) | JSON,
        "data_offsets": st.lists(st.integers(-1, 16), min_size=2, max_size=2) | JSON,
        "more": JSON,
    },
)


@FUZZ
@given(
    header=JSON | st.dictionaries(st.text(max_size=3), ENTRY | JSON), data=st.binary(max_size=20)
)
def test_arbitrary_headers_never_crash_the_reader(
    tmp_path: Path, header: object, data: bytes
) -> None:
    path = write(tmp_path / "h", header, data)
    checkpoint = answers(path)
    for tensor in checkpoint.tensors if checkpoint else ():
        assert tensor.offset + tensor.nbytes <= Path(path).stat().st_size
