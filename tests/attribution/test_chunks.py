"""How many inputs a model sees at a time, from what its tensors weigh and the CPU's last cache."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from gradscope.attribution import chunks
from gradscope.attribution.chunks import Chunks, fitting, last_cache

MB = 1 << 20


@pytest.fixture(autouse=True)
def asked_anew() -> Iterator[None]:
    last_cache.cache_clear()
    yield
    last_cache.cache_clear()


def test_chunks_are_halved_with_and_without_a_backward_pass() -> None:
    chunks = Chunks(8, 16, 32)

    chunks.halve()

    assert (chunks.gradient, chunks.forward, chunks.windows) == (4, 8, 16)


@pytest.mark.parametrize(("kept", "cache", "gradient", "forward"), [
    ([3 * MB, 1 * MB], 32, 8, 4), ([3 * MB] * 9, 16, 4, 2), ([5 * MB], 4, 1, 1),
    ([MB // 9], 32, 64, 128), ([], 32, 64, 128),
])  # fmt: skip
def test_the_largest_tensor_of_a_chunk_fits_in_the_last_cache_and_without_backward_two(
    kept: list[int], cache: int, gradient: int, forward: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunks, "last_cache", lambda: cache * MB)

    found = fitting(kept, torch.device("cpu"), None)

    assert (found.gradient, found.forward) == (gradient, forward)
    assert found.windows == 4 * gradient


def test_an_accelerator_is_bounded_by_its_memory_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "last_cache", lambda: 1)

    assert fitting([3 * MB], torch.device("mps"), None) == Chunks(64, 128, 256)
    assert fitting([100 * MB], torch.device("mps"), None).gradient == 15


def told(folder: Path, *caches: tuple[str, str]) -> None:
    for number, (level, size) in enumerate(caches):
        place = folder / f"index{number}"
        place.mkdir()
        (place / "level").write_text(f"{level}\n")
        (place / "size").write_text(f"{size}\n")


@pytest.mark.parametrize(("caches", "size"), [
    ([("1", "32K"), ("1", "64K"), ("2", "512K"), ("3", "16384K")], 16 * MB),
    ([("2", "4M"), ("1", "128K")], 4 * MB),
    ([("1", "32K"), ("2", "what")], 32 * MB),
    ([], 32 * MB),
])  # fmt: skip
def test_the_last_cache_is_that_of_the_highest_level_or_a_usual_one(
    caches: list[tuple[str, str]], size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunks, "_CACHES", tmp_path)
    told(tmp_path, *caches)

    assert last_cache() == size


def test_a_system_that_hides_its_caches_has_a_usual_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunks, "_CACHES", tmp_path / "nothing")

    assert last_cache() == 32 * MB
