"""Zip archives against the standard library, and against archives made to be misread."""

from __future__ import annotations

import contextlib
import io
import struct
import warnings
import zipfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gradscope.containers import zip as ours
from gradscope.errors import InputError

NAMES = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0\\:"), min_size=1)
METHODS = st.sampled_from([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])


def packed(
    members: dict[str, bytes], method: int = zipfile.ZIP_STORED, comment: bytes = b""
) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", method) as archive:
        archive.comment = comment
        for name, data in members.items():
            archive.writestr(zipfile.ZipInfo(name), data, method)
    return stream.getvalue()


def opened(data: bytes) -> ours.Archive:
    return ours.read_archive(io.BytesIO(data), "a.zip", 0, len(data))


def content(data: bytes, name: str) -> bytes:
    archive = opened(data)
    return archive.content(io.BytesIO(data), archive.members[name])


def refusal(data: bytes) -> InputError:
    with pytest.raises(InputError) as caught:
        opened(data)
    return caught.value


#: Of a comment with this mark readers disagree; see the test below.
COMMENTS = st.binary(max_size=40).filter(lambda comment: b"PK\5\6" not in comment)


@settings(deadline=None)
@given(st.dictionaries(NAMES, st.binary(max_size=400)), METHODS, COMMENTS)
def test_members_and_their_bytes_are_those_of_the_standard_library(
    members: dict[str, bytes], method: int, comment: bytes
) -> None:
    data = packed(members, method, comment)
    archive = opened(data)
    with zipfile.ZipFile(io.BytesIO(data)) as reference:
        assert list(archive.members) == reference.namelist()
        for name in reference.namelist():
            assert content(data, name) == reference.read(name)
    assert ours.member_names(io.BytesIO(data), "a.zip", len(data)) == list(archive.members)


@pytest.mark.parametrize("comment", [b"PK\5\6", b"PK\5\6" + bytes(40)])
def test_a_comment_that_could_be_taken_for_the_end_is_refused(comment: bytes) -> None:
    assert refusal(packed({"x": b"1"}, comment=comment)).kind == "malformed"


def test_an_archive_inside_another_is_read_where_it_lies() -> None:
    inner = packed({"x": b"inside"})
    archive = ours.read_archive(io.BytesIO(b"before" + inner + b"after"), "a", 6, len(inner))
    assert archive.members["x"].offset == 6 + inner.index(b"inside")


def test_a_large_member_is_inflated_piece_by_piece() -> None:
    data = packed({"zeros": bytes(5_000_000)}, zipfile.ZIP_DEFLATED)
    archive = opened(data)
    pieces = list(archive.pieces(io.BytesIO(data), archive.members["zeros"]))
    assert len(pieces) > 4
    assert b"".join(pieces) == bytes(5_000_000)


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_wrong_checksum_is_noticed_by_both_readers(method: int) -> None:
    data = bytearray(packed({"x": b"content"}, method))
    data[data.rindex(b"PK\1\2") + 16] ^= 1
    with pytest.raises(zipfile.BadZipFile), zipfile.ZipFile(io.BytesIO(data)) as reference:
        reference.read("x")
    with pytest.raises(ours.DamagedMemberError, match="checksum"):
        content(bytes(data), "x")


def test_a_checksum_that_was_not_recorded_is_not_compared() -> None:
    data = bytearray(packed({"x": b"content"}))
    struct.pack_into("<L", data, data.rindex(b"PK\1\2") + 16, 0)
    assert content(bytes(data), "x") == b"content"


@given(st.integers(0, 60), st.integers(1, 255))
def test_damaged_compressed_bytes_are_noticed(at: int, change: int) -> None:
    text = b"some text that deflate packs, some text that deflate packs less"
    data = bytearray(packed({"x": text}, zipfile.ZIP_DEFLATED))
    member = opened(bytes(data)).members["x"]
    data[member.offset + at % member.packed_size] ^= change
    with contextlib.suppress(ours.DamagedMemberError):
        assert content(bytes(data), "x") == text  # unused bits at the end


def test_other_compressions_are_not_supported() -> None:
    data = packed({"x": b"content"}, zipfile.ZIP_LZMA)
    with pytest.raises(InputError) as caught:
        content(data, "x")
    assert caught.value.kind == "unsupported"


def test_a_small_member_is_read_up_to_a_limit() -> None:
    data = packed({"x": b"content"})
    assert opened(data).read(io.BytesIO(data), "x", 7) == b"content"
    with pytest.raises(InputError, match="7 bytes; at most 6 bytes are read"):
        opened(data).read(io.BytesIO(data), "x", 6)


@pytest.mark.parametrize("name", ["absent", "packed"])
def test_only_stored_members_lie_in_place(name: str) -> None:
    data = packed({"packed": b"x" * 99}, zipfile.ZIP_DEFLATED)
    with pytest.raises(InputError, match=f"'{name}'"):
        opened(data).stored(name)


def test_two_members_of_one_name_are_refused() -> None:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        archive.writestr("x", b"1")
        archive.writestr("x", b"2")
    assert "two members named 'x'" in refusal(stream.getvalue()).message


def test_a_name_cannot_forge_terminal_output() -> None:
    data = packed({"\x1b[2Jx": b"1"}).replace(b"\x1b[2Jx", b"\x1b[2Jy", 1)
    message = refusal(data).message
    assert "\x1b" not in message
    assert "\\x1b[2Jx" in message


def test_an_archive_without_its_end_is_truncated() -> None:
    data = packed({"x": b"content"})
    for cut in (0, 4, 40, len(data) - 1):
        assert refusal(data[:cut]).kind == "truncated"


def test_bytes_behind_the_archive_are_refused() -> None:
    assert refusal(packed({"x": b"content"}) + b"more").kind == "malformed"


def test_an_archive_without_members_has_none(tmp_path: Path) -> None:
    assert opened(packed({})).members == {}
