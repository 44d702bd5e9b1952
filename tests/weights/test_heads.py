"""Attention heads are found in every layout, and logits out of range are told."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

import gradscope
from gradscope.report.model import Finding
from gradscope.weights.result import AttentionResult

from .checkpoints import Array, Tensors, gaussian, transformer, write

HEADS, WIDTH = 4, 32
SIZE = WIDTH // HEADS
LLAMA = {"model_type": "llama", "num_attention_heads": HEADS, "hidden_size": WIDTH}
ATTN = "model.layers.1.self_attn"


def folder(path: Path, tensors: Tensors, config: dict[str, object]) -> Path:
    write(path / "model.safetensors", tensors)
    (path / "config.json").write_text(json.dumps(config))
    return path


def attention(path: Path) -> list[AttentionResult]:
    report = gradscope.analyze_weights(path, spectral=True)
    assert report.result is not None
    return list(report.result.attention)


def found(path: Path) -> list[Finding]:
    report = gradscope.analyze_weights(path, spectral=True, select=["attention-range"])
    return list(report.findings)


def norms(q: Array, k: Array, size: int = SIZE) -> list[float]:
    """By head, the norm of the product of queries and keys."""
    shared = len(q) // len(k)
    queries, keys = (w.astype(np.float64).reshape(-1, size, w.shape[1]) for w in (q, k))
    pairs = ((a, keys[h // shared]) for h, a in enumerate(queries))
    return [float(np.linalg.norm(a.T @ b, 2)) / math.sqrt(size) for a, b in pairs]


def test_every_attention_of_a_llama_is_found(tmp_path: Path) -> None:
    tensors = transformer(width=WIDTH)

    seen = attention(folder(tmp_path / "m", tensors, LLAMA))

    assert [a.module for a in seen] == [f"model.layers.{i}.self_attn" for i in range(4)]
    q, k = (tensors[f"{ATTN}.{part}.weight"] for part in ("q_proj", "k_proj"))
    assert seen[1].qk_norms == pytest.approx(norms(q, k), rel=1e-9)
    assert (seen[1].heads, seen[1].key_heads, seen[1].head_size) == (HEADS, HEADS, SIZE)
    assert seen[1].logit_bounds is not None
    gain = tensors["model.layers.1.input_layernorm.weight"]
    longest = [np.linalg.norm((w * gain).reshape(-1, SIZE, WIDTH), 2, axis=(1, 2)) for w in (q, k)]
    wanted = longest[0] * longest[1] * WIDTH / math.sqrt(SIZE)
    assert seen[1].logit_bounds == pytest.approx(wanted, rel=1e-5)


def test_fused_projections_are_taken_apart(tmp_path: Path) -> None:
    """GPT-2's Conv1D [in, 3 * out], with its norm and biases."""
    q, k, v = (gaussian(WIDTH, WIDTH, seed=s) for s in (1, 2, 3))
    tensors = {
        "h.0.attn.c_attn.weight": np.concatenate([q, k, v]).T.copy(),
        "h.0.attn.c_attn.bias": gaussian(3 * WIDTH, seed=4),
        "h.0.attn.c_proj.weight": gaussian(WIDTH, WIDTH, seed=5),
        "h.0.attn.c_proj.bias": gaussian(WIDTH, seed=5),
        "h.0.ln_1.weight": 1 + gaussian(WIDTH, seed=6),
        "h.0.ln_1.bias": gaussian(WIDTH, seed=7),
        "h.0.mlp.c_fc.weight": gaussian(WIDTH, 4 * WIDTH, seed=8),
        "h.0.mlp.c_fc.bias": gaussian(4 * WIDTH, seed=9),
    }
    config = {"model_type": "gpt2", "n_head": HEADS, "n_embd": WIDTH}

    (seen,) = attention(folder(tmp_path / "m", tensors, config))

    assert seen.module == "h.0.attn"
    assert seen.qk_norms == pytest.approx(norms(q, k), rel=1e-6)
    assert seen.logit_bounds is not None


def test_keys_that_serve_several_queries_are_paired(tmp_path: Path) -> None:
    tensors = transformer(width=WIDTH)
    for layer in range(4):
        for part in ("k_proj", "v_proj"):
            name = f"model.layers.{layer}.self_attn.{part}.weight"
            tensors[name] = gaussian(2 * SIZE, WIDTH, seed=40 + layer)

    seen = attention(folder(tmp_path / "m", tensors, {**LLAMA, "num_key_value_heads": 2}))

    q, k = (tensors[f"{ATTN}.{part}.weight"] for part in ("q_proj", "k_proj"))
    assert seen[1].key_heads == 2
    assert seen[1].qk_norms == pytest.approx(norms(q, k), rel=1e-9)


def test_without_known_heads_or_norms_nothing_is_claimed(tmp_path: Path) -> None:
    tensors = transformer(width=WIDTH)
    assert attention(write(tmp_path / "alone.safetensors", tensors)) == []

    normed = {**tensors, f"{ATTN}.q_norm.weight": np.ones(SIZE, np.float32)}
    seen = {a.module: a for a in attention(folder(tmp_path / "m", normed, LLAMA))}
    assert seen[ATTN].logit_bounds is None
    assert seen["model.layers.0.self_attn"].logit_bounds is not None


def scaled(factor: float, dtype: type = np.float32, heads: slice = slice(None)) -> Tensors:
    tensors = transformer(width=WIDTH)
    for part in ("q_proj", "k_proj"):
        tensors[f"{ATTN}.{part}.weight"][heads] *= np.float32(factor)
    return {name: x.astype(dtype) for name, x in tensors.items()}


@pytest.mark.parametrize(("factor", "told"), [(1, 0), (15, 0), (60, 1)])
def test_typical_logits_beyond_a_clip_are_a_finding(
    factor: float, told: int, tmp_path: Path
) -> None:
    """Those of the healthy model deviate by 0.08 a head; 60² times that is beyond 100."""
    seen = found(folder(tmp_path / "m", scaled(factor), LLAMA))

    assert [f.subject for f in seen] == [f"{ATTN}.q_proj.weight"] * told
    assert all(f.severity == "low" and "0-3" in f.message for f in seen)


def test_the_head_is_named(tmp_path: Path) -> None:
    (seen,) = found(folder(tmp_path / "m", scaled(60, heads=slice(SIZE, 2 * SIZE)), LLAMA))

    assert "head 1 of 4" in seen.message


@pytest.mark.parametrize(("dtype", "told"), [(np.float16, 1), (np.float32, 0)])
def test_a_bound_beyond_float16_counts_in_float16(dtype: type, told: int, tmp_path: Path) -> None:
    tensors = scaled(1, dtype)
    for row, part in enumerate(("q_proj", "k_proj")):  # they meet only where they are rotated
        tensors[f"{ATTN}.{part}.weight"][row] = 0
        tensors[f"{ATTN}.{part}.weight"][row, row] = 14
    tensors["model.layers.1.input_layernorm.weight"][:2] = 6

    seen = found(folder(tmp_path / "m", tensors, LLAMA))

    assert len(seen) == told
    assert all("head 0 of 4 can reach" in f.message for f in seen)


def test_a_gain_that_is_stored_less_one_is_taken_as_it_acts(tmp_path: Path) -> None:
    tensors = transformer(width=WIDTH)
    less = {n: x - (1 if "layernorm" in n else 0) for n, x in tensors.items()}

    plain = attention(folder(tmp_path / "a", tensors, LLAMA))
    gemma = attention(folder(tmp_path / "b", less, {**LLAMA, "model_type": "gemma2"}))

    for one, other in zip(plain, gemma, strict=True):
        assert other.logit_bounds == pytest.approx(one.logit_bounds, rel=1e-5)
