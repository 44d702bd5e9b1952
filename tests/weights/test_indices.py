"""Tables of indices: what merges and casts do to them, and every form in which they are right."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import gradscope
from gradscope.report.model import Finding

from .checkpoints import Array, Tensor, bf16, conv_net, write

POSITIONS = "text_model.embeddings.position_ids"


def broken(tmp_path: Path, name: str, table: Tensor) -> list[Finding]:
    path = write(tmp_path / "model.safetensors", {**conv_net(), name: table})
    return [f for f in gradscope.analyze_weights(path).findings if f.name == "broken-index"]


def f32(values: Array) -> Array:
    return np.asarray(values, np.float32)


# -- positions ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "table",
    [
        np.arange(77)[None],
        np.arange(512)[None],
        np.arange(512, dtype=np.int32),
        np.arange(2, 516)[None],  # from the padding index on
        np.tile(np.arange(64), (3, 1)),
        f32(np.arange(77)),
        np.arange(512, dtype=np.float16)[None],
        np.arange(2048, dtype=np.float16)[None],
        bf16(f32(np.arange(257))),
        np.zeros((1, 1), np.int64),
        np.stack([np.repeat(np.arange(8), 8), np.tile(np.arange(8), 8)], axis=1),  # coordinates
    ],
    ids=str,
)
def test_positions_that_count_up_are_no_finding(table: Tensor, tmp_path: Path) -> None:
    assert broken(tmp_path, POSITIONS, table) == []


def merged(weight: float, other: Array) -> Array:
    return f32(weight * np.arange(77) + (1 - weight) * other)[None]


@pytest.mark.parametrize(
    ("table", "wrong"),
    [
        (merged(0.3, np.zeros(77)), 76),
        (merged(0.5, np.arange(77) + 1.0), 77),
        (f32(2 * np.arange(77))[None], 76),
        (np.zeros((1, 77), np.int64), 76),
        (np.arange(77)[::-1].copy(), 76),
        (np.arange(4096, dtype=np.int64).astype(np.float16)[None], 1024),
        (np.arange(512)[None] % 100, 412),
        (np.concatenate([np.arange(20), [19], np.arange(21, 77)]), 1),
        (np.arange(77) - 3, 77),
        (np.stack([np.arange(64), np.arange(64) + 1, np.arange(64)]), 64),
    ],
    ids=str,
)
def test_positions_that_do_not_are_medium(table: Array, wrong: int, tmp_path: Path) -> None:
    (found,) = broken(tmp_path, POSITIONS, table)
    assert (found.severity, found.subject) == ("medium", POSITIONS)
    assert found.evidence["wrong"] == wrong


def test_bfloat16_repeats_positions_beyond_256(tmp_path: Path) -> None:
    by_torch = torch.arange(514).bfloat16()
    distinct = len(set(by_torch.tolist()))
    (found,) = broken(tmp_path, POSITIONS, bf16(f32(np.arange(514))))
    assert found.evidence["repeats"] == 514 - distinct
    assert found.evidence["wrong"] == int((by_torch.double() != torch.arange(514)).sum())


def test_the_first_wrong_position_is_said_with_what_it_should_be(tmp_path: Path) -> None:
    table = f32(np.arange(77))[None]
    table[0, 41] = 40.25
    (found,) = broken(tmp_path, POSITIONS, table)
    assert "[0, 41] is 40.25 instead of 41" in found.message
    assert (found.evidence["fractions"], found.evidence["repeats"]) == (1, 0)


def test_values_that_are_not_finite_are_another_rules(tmp_path: Path) -> None:
    table = f32(np.arange(77))
    table[3] = np.nan
    assert broken(tmp_path, POSITIONS, table) == []


def test_trained_positions_are_no_indices(tmp_path: Path) -> None:
    table = np.random.default_rng(0).standard_normal((77, 16)).astype(np.float32)
    assert broken(tmp_path, "text_model.embeddings.position_embedding.weight", table) == []


# -- relative positions ---------------------------------------------------------------------------

RELATIVE = "layers.0.blocks.0.attn.relative_position_index"


def window(*lengths: int) -> Array:
    """As Swin (and in three dimensions Video Swin) makes it."""
    coords = np.stack(np.meshgrid(*map(np.arange, lengths), indexing="ij")).reshape(
        len(lengths), -1
    )
    relative = (coords[:, :, None] - coords[:, None, :]).transpose(1, 2, 0)
    index = np.zeros(relative.shape[:2], np.int64)
    for axis, length in enumerate(lengths):
        index = index * (2 * length - 1) + relative[..., axis] + length - 1
    return index


def with_class_token(index: Array) -> Array:
    """As BEiT extends it."""
    n, most = len(index) + 1, int(index.max()) + 1
    table = np.zeros((n, n), np.int64)
    table[1:, 1:] = index
    table[0], table[:, 0], table[0, 0] = most, most + 1, most + 2
    return table


HEALTHY = [
    window(7, 7), window(4, 7), window(8, 7, 7), with_class_token(window(14, 14)),
    window(7, 7).astype(np.float32), window(16, 16)[:, ::2].copy(),
]  # fmt: skip


@pytest.mark.parametrize("table", HEALTHY, ids=lambda t: str((t.shape, t.dtype.name)))
def test_relative_positions_of_windows_are_no_finding(table: Array, tmp_path: Path) -> None:
    assert broken(tmp_path, RELATIVE, table) == []


@pytest.mark.parametrize("table", HEALTHY, ids=lambda t: str((t.shape, t.dtype.name)))
def test_a_fraction_among_them_is_medium(table: Array, tmp_path: Path) -> None:
    spoilt = f32(table)
    spoilt[2, 3] += 0.5
    (found,) = broken(tmp_path, RELATIVE, spoilt)
    assert (found.severity, found.evidence["wrong"]) == ("medium", 1)


@pytest.mark.parametrize(
    "table",
    [window(7, 7), window(4, 7), with_class_token(window(7, 7))],
    ids=lambda t: str(t.shape),
)
def test_one_wrong_place_among_them_is_medium(table: Array, tmp_path: Path) -> None:
    spoilt = table.copy()
    spoilt[5, 9] = spoilt[5, 8]
    (found,) = broken(tmp_path, RELATIVE, spoilt)
    assert found.evidence["wrong"] == 2  # it and its mirror image disagree


# -- others ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "table", "wrong"),
    [
        ("flow.permutation", np.random.default_rng(0).permutation(64), 0),
        ("flow.inverse_permutation", np.arange(64), 0),
        ("flow.perm", np.random.default_rng(0).permutation(64) + 1, 0),  # of something else
        ("flow.perm", np.array([0, 1, 1, 3]), 1),
        ("flow.permutation", f32([0, 1.5, 1.5, 3]), 2),
        ("bert.embeddings.token_type_ids", np.zeros((1, 512), np.int64), 0),
        ("bert.embeddings.token_type_ids", np.full((1, 512), 0.5, np.float32), 512),
        ("attn.attention_bias_idxs", np.zeros((4, 4), np.int64), 0),
    ],
)
def test_permutations_and_types(name: str, table: Array, wrong: int, tmp_path: Path) -> None:
    found = broken(tmp_path, name, table)
    assert [f.evidence["wrong"] for f in found] == ([wrong] if wrong else [])
