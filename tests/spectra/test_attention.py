"""Bounds and typical sizes of attention logits against logits that are computed."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gradscope.spectra.attention import Input, Side, heads

Array = npt.NDArray[Any]
SIZE, WIDTH = 8, 48


def side(count: int, seed: int, bias: bool) -> Side:
    rng = np.random.default_rng(seed)
    return Side(
        rng.normal(0, 0.3, (count * SIZE, WIDTH)),
        rng.normal(0, 0.5, count * SIZE) if bias else None,
    )


def norm(seed: int, offset: bool) -> Input:
    rng = np.random.default_rng(seed)
    return Input(rng.normal(1, 0.5, WIDTH), rng.normal(0, 0.4, WIDTH) if offset else None)


def of(side_: Side, given_: Input) -> Side:
    """What a norm hands to queries or keys."""
    return replace(side_, given=given_)


def logits(query: Side, key: Side, given: Input, x: Array, y: Array) -> Array:
    """[heads, inputs] of pairs of normed inputs, key heads shared by query heads in a row."""
    applied = []
    for seen, values in ((query, x), (key, y)):
        normed = values / np.linalg.norm(values, axis=1, keepdims=True) * math.sqrt(WIDTH)
        handed = normed * given.gain + (0 if given.offset is None else given.offset)
        made = handed @ seen.matrix.T + (0 if seen.bias is None else seen.bias)
        applied.append(made.reshape(len(values), -1, SIZE))
    q, k = applied
    k = np.repeat(k, q.shape[1] // k.shape[1], axis=1)
    return np.einsum("nhs,nhs->hn", q, k) / math.sqrt(SIZE)


def most_extreme(query: Side, key: Side, given: Input, head: int, shared: int) -> Array:
    """Inputs towards the greatest logit of a head: its leading singular vectors."""
    q = query.matrix.reshape(-1, SIZE, WIDTH)[head] * given.gain
    k = key.matrix.reshape(-1, SIZE, WIDTH)[head // shared] * given.gain
    left, _, right = np.linalg.svd(q.T @ k)
    return np.stack([left[:, 0], right[0]])


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("offset", [False, True])
@pytest.mark.parametrize("key_heads", [1, 2, 4])
def test_no_logit_exceeds_its_bound(bias: bool, offset: bool, key_heads: int) -> None:
    query, key = side(4, 1, bias), side(key_heads, 2, bias)
    given = norm(3, offset)
    rng = np.random.default_rng(4)

    found = heads(of(query, given), of(key, given), SIZE)

    assert found.bounds is not None
    for head in range(4):
        far = most_extreme(query, key, given, head, 4 // key_heads)
        x = np.concatenate([rng.normal(size=(5000, WIDTH)), far[:1], -far[:1]])
        y = np.concatenate([rng.normal(size=(5000, WIDTH)), far[1:], far[1:]])
        seen = np.abs(logits(query, key, given, x, y)[head])
        assert seen.max() <= found.bounds[head]
        assert seen[-2:].max() > 0.15 * found.bounds[head]  # and it is no idle bound


@settings(max_examples=60, deadline=None)
@given(
    size=st.integers(1, 6),
    width=st.integers(1, 12),
    heads_=st.integers(1, 3),
    shared=st.integers(1, 3),
    decades=st.floats(-3, 3),
    seed=st.integers(0, 2**32 - 1),
)
def test_no_logit_of_any_attention_exceeds_its_bound_rotated_or_not(
    size: int, width: int, heads_: int, shared: int, decades: float, seed: int
) -> None:
    """Queries and keys are turned by any orthogonal matrix, of which RoPE's are some."""
    rng = np.random.default_rng(seed)
    scale = 10**decades
    query = Side(
        scale * rng.standard_t(2, (heads_ * shared * size, width)),
        rng.normal(size=heads_ * shared * size),
    )
    key = Side(rng.standard_t(2, (heads_ * size, width)), scale * rng.normal(size=heads_ * size))
    given_ = Input(rng.normal(0, 3, width), rng.normal(0, scale, width))

    bounds = heads(of(query, given_), of(key, given_), size).bounds

    x, y = rng.standard_t(1, (2, 200, width))
    applied = []
    for side_, values in ((query, x), (key, y)):
        normed = values / np.linalg.norm(values, axis=1, keepdims=True) * math.sqrt(width)
        made = (normed * given_.gain + given_.offset) @ side_.matrix.T + side_.bias
        turned = np.linalg.qr(rng.normal(size=(size, size)))[0]
        applied.append(made.reshape(len(values), -1, size) @ turned)
    q, k = applied[0], np.repeat(applied[1], shared, axis=1)
    logits_ = np.abs(np.einsum("nhs,nhs->hn", q, k)).max(axis=1) / math.sqrt(size)
    assert bounds is not None
    assert (logits_ <= bounds * (1 + 1e-9)).all()


def test_the_bound_is_met_where_queries_and_keys_are_the_same() -> None:
    query = side(2, 1, bias=False)
    given = Input(np.ones(WIDTH))

    found = heads(of(query, given), of(query, given), SIZE)

    for head in range(2):
        far = most_extreme(query, query, given, head, 1)
        seen = np.abs(logits(query, query, given, far[:1], far[1:]))[head]
        assert found.bounds is not None
        assert seen.max() == pytest.approx(found.bounds[head], rel=1e-9)


def test_norms_and_ranks_are_those_of_the_product() -> None:
    query, key = side(4, 5, bias=True), side(2, 6, bias=False)

    found = heads(query, key, SIZE)

    assert found.bounds is None
    assert found.typical is None
    for head in range(4):
        q = query.matrix.reshape(4, SIZE, WIDTH)[head]
        k = key.matrix.reshape(2, SIZE, WIDTH)[head // 2]
        sigma = np.linalg.svd(q.T @ k, compute_uv=False)[:SIZE]
        shares = sigma / sigma.sum()
        assert found.norms[head] == pytest.approx(sigma[0] / math.sqrt(SIZE), rel=1e-9)
        entropy = -(shares * np.log(shares)).sum()
        assert found.ranks[head] == pytest.approx(math.exp(entropy), rel=1e-6)


def by_svd(matrix: Array) -> list[float]:
    """Of each head exp of the entropy of the shares of its singular values."""
    sigmas = (np.linalg.svd(h, compute_uv=False) for h in matrix.reshape(-1, SIZE, matrix.shape[1]))
    return [math.exp(-sum(p * math.log(p) for p in s / s.sum())) for s in sigmas]


@pytest.mark.parametrize("width", [WIDTH, SIZE // 2])
def test_the_ranks_of_each_side_are_those_of_its_own_heads(width: int) -> None:
    rng = np.random.default_rng(11)
    q, k, v = (rng.standard_t(3, (heads * SIZE, width)) for heads in (4, 2, 2))

    found = heads(Side(q), Side(k), SIZE, v)

    assert found.query_ranks == pytest.approx(by_svd(q), rel=1e-9)
    assert found.key_ranks == pytest.approx(by_svd(k), rel=1e-9)
    assert found.value_ranks == pytest.approx(by_svd(v), rel=1e-9)
    assert heads(Side(q), Side(k), SIZE).value_ranks is None


def test_a_head_of_zeros_has_no_dimensions() -> None:
    q = np.random.default_rng(12).normal(size=(2 * SIZE, WIDTH))
    q[:SIZE] = 0

    found = heads(Side(q), Side(q), SIZE)

    assert found.query_ranks[0] == found.ranks[0] == found.norms[0] == 0


def test_the_typical_logit_is_the_deviation_over_random_inputs() -> None:
    query, key, given = side(3, 7, bias=False), side(3, 8, bias=False), norm(9, offset=False)
    rng = np.random.default_rng(10)
    x, y = rng.normal(size=(2, 40_000, WIDTH))

    found = heads(of(query, given), of(key, given), SIZE)

    assert found.typical is not None
    np.testing.assert_allclose(
        logits(query, key, given, x, y).std(axis=1), found.typical, rtol=0.03
    )


@pytest.mark.parametrize("shape", [(SIZE,), (4, SIZE), (4 * SIZE,)])
@pytest.mark.parametrize("offset", [False, True])
def test_no_logit_of_normed_queries_exceeds_its_bound(shape: tuple[int, ...], offset: bool) -> None:
    """Each head's own norm (Qwen3, Cohere), and one of all heads together (OLMo 2)."""
    rng = np.random.default_rng(3)
    norms = [
        Input(rng.normal(1, 0.5, shape), rng.normal(0, 0.4, shape) if offset else None)
        for _ in range(2)
    ]
    together = shape == (4 * SIZE,)
    rows = rng.standard_t(1, (2, 20_000, 4, SIZE))
    rows[:, 0] = 1e-9  # all the length in one head, and in its greatest gain
    greatest = [np.abs(n.gain.reshape(-1, SIZE))[-1 if n.gain.size == SIZE else 1] for n in norms]
    for side_, gain in zip(rows, greatest, strict=True):
        side_[0, 1, np.argmax(gain)] = 1

    queries = [replace(side(4, s, bias=True), normed=n) for s, n in zip((1, 2), norms, strict=True)]
    found = heads(queries[0], queries[1], SIZE)

    made = []
    for x, n in zip(rows, norms, strict=True):
        axes = (1, 2) if together else (2,)
        width = 4 * SIZE if together else SIZE
        x = x / np.linalg.norm(x, axis=axes, keepdims=True) * math.sqrt(width)
        gain, added = (0 if v is None else v.reshape(-1, SIZE) for v in (n.gain, n.offset))
        y = x * gain + added
        made.append(np.linalg.norm(y, axis=2))  # rotated, any two can point one way
    lengths = made[0].max(axis=0) * made[1].max(axis=0) / math.sqrt(SIZE)
    assert found.bounds is not None
    assert (lengths <= found.bounds * (1 + 1e-9)).all()
    if not offset:
        assert lengths[1] == pytest.approx(found.bounds[1], rel=1e-6)
