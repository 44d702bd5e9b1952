"""Attention heads are found in every layout, and logits out of range are told."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path

import numpy as np
import pytest

import gradscope
from gradscope.report.formats import renderer
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


def found(path: Path, rule: str = "attention-range") -> list[Finding]:
    report = gradscope.analyze_weights(path, spectral=True, select=[rule])
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


def test_without_known_heads_nothing_is_claimed(tmp_path: Path) -> None:
    assert attention(write(tmp_path / "alone.safetensors", transformer(width=WIDTH))) == []


def longest(w: Array, gain: Array) -> Array:
    """By head the length of the longest query that an input of a gain has."""
    return np.linalg.norm((w * gain).reshape(-1, SIZE, WIDTH), 2, (1, 2)) * math.sqrt(WIDTH)


#: Kind of model, module of the attention, and the norm that hands it its input.
BEFORE = [
    ("llama", "model.layers.1.self_attn.{}_proj", "model.layers.1.input_layernorm"),
    ("whisper", "model.encoder.layers.1.self_attn.{}_proj",
     "model.encoder.layers.1.self_attn_layer_norm"),
    ("clip", "vision_model.encoder.layers.1.self_attn.{}_proj",
     "vision_model.encoder.layers.1.layer_norm1"),
    ("vit", "vit.encoder.layer.1.attention.attention.{}", "vit.encoder.layer.1.layernorm_before"),
    ("dinov2", "encoder.layer.1.attention.attention.{}", "encoder.layer.1.norm1"),
    ("bert", "bert.encoder.layer.1.attention.self.{}", "bert.encoder.layer.0.output.LayerNorm"),
    ("bert", "bert.encoder.layer.0.attention.self.{}", "bert.embeddings.LayerNorm"),
    ("roberta-prelayernorm", "encoder.layer.1.attention.self.{}",
     "encoder.layer.1.attention.LayerNorm"),
    ("distilbert", "distilbert.transformer.layer.1.attention.{}_lin",
     "distilbert.transformer.layer.0.output_layer_norm"),
    ("t5", "encoder.block.1.layer.0.SelfAttention.{}", "encoder.block.1.layer.0.layer_norm"),
]  # fmt: skip
#: The same of what no convention tells.
UNKNOWN = [
    ("bart", "model.encoder.layers.1.self_attn.{}_proj",
     "model.encoder.layers.1.self_attn_layer_norm"),
    ("detr", "model.decoder.layers.1.self_attn.{}_proj",
     "model.decoder.layers.1.self_attn_layer_norm"),
    ("whisper", "model.decoder.layers.1.encoder_attn.{}_proj",
     "model.decoder.layers.1.self_attn_layer_norm"),
    ("t5", "decoder.block.1.layer.1.EncDecAttention.{}", "decoder.block.1.layer.1.layer_norm"),
    ("diffusion", "blocks.1.attn2.to_{}", "blocks.1.norm1"),
    ("torch", "layers.1.self_attn.{}_proj", "layers.1.norm1"),
]  # fmt: skip


def attending(module: str, norm: str, leaf: str = "weight") -> Tensors:
    """The matrices of one attention, the norm before, and one after with a smaller gain."""
    written = ("query", "key", "value") if module.endswith((".attention.{}", ".self.{}")) else "qkv"
    made: Tensors = {
        f"{module.format(part)}.weight": gaussian(WIDTH, WIDTH, seed=s)
        for s, part in enumerate(written)
    }
    outer = module.rpartition(".")[0]
    after = np.full(WIDTH, 1e-3, np.float32)
    return {**made, f"{outer}.after_norm.weight": after, f"{norm}.{leaf}": 1 + gaussian(WIDTH)}


@pytest.mark.parametrize("leaf", ["weight", "gamma"])
@pytest.mark.parametrize(("kind", "module", "norm"), BEFORE)
def test_the_norm_before_an_attention_is_that_of_its_kind_of_model(
    kind: str, module: str, norm: str, leaf: str, tmp_path: Path
) -> None:
    tensors = attending(module, norm, leaf)

    (seen,) = attention(folder(tmp_path / "m", tensors, {**LLAMA, "model_type": kind}))

    q, k = list(tensors.values())[:2]
    gain = tensors[f"{norm}.{leaf}"]
    wanted = longest(q, gain) * longest(k, gain) / (1 if kind == "t5" else math.sqrt(SIZE))
    assert seen.logit_bounds == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize(("kind", "module", "norm"), UNKNOWN)
def test_where_no_convention_tells_the_input_no_bound_is_claimed(
    kind: str, module: str, norm: str, tmp_path: Path
) -> None:
    """Of BART and DETR that norm comes after; keys across come from elsewhere."""
    config = {**LLAMA, "model_type": kind}

    (seen,) = attention(folder(tmp_path / "m", attending(module, norm), config))

    assert seen.logit_bounds is seen.logit_rms is None


@pytest.mark.parametrize(
    ("said", "factor"),
    [
        ({}, 1 / math.sqrt(SIZE)),
        ({"attention_multiplier": 0.5}, 0.5),
        ({"query_pre_attn_scalar": 4}, 0.5),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, 1 / math.sqrt(SIZE)),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 8.0}}, None),
    ],
)
def test_logits_are_scaled_as_the_configuration_says(
    said: dict[str, object], factor: float | None, tmp_path: Path
) -> None:
    tensors = attending(*BEFORE[0][1:])

    (seen,) = attention(folder(tmp_path / "m", tensors, {**LLAMA, **said}))

    q, k, *_, gain = tensors.values()
    if factor is None:
        assert seen.logit_bounds is None
    else:
        wanted = longest(q, gain) * longest(k, gain) * factor
        assert seen.logit_bounds == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize(
    ("names", "size", "bounded"),
    [
        (("q_norm", "k_norm"), SIZE, True),
        (("q_layernorm", "k_layernorm"), WIDTH, True),
        (("q_norm",), SIZE, False),
        (("q_layernorm.norms.0", "k_layernorm.norms.0"), SIZE, False),
    ],
)
def test_queries_that_are_normed_are_as_long_as_their_norm_lets_them(
    names: tuple[str, ...], size: int, bounded: bool, tmp_path: Path
) -> None:
    gains = {f"{ATTN}.{n}.weight": np.full(size, 1.5, np.float32) for n in names}

    seen = attention(folder(tmp_path / "m", {**transformer(width=WIDTH), **gains}, LLAMA))

    bounds = {a.module: a.logit_bounds for a in seen}
    assert bounds["model.layers.0.self_attn"] is not None
    wanted = [1.5 * 1.5 * size / math.sqrt(SIZE)] * HEADS
    assert bounds[ATTN] == (pytest.approx(wanted, rel=1e-6) if bounded else None)


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


# -- heads that collapsed -------------------------------------------------------------------------

WIDE = 128
OF_32 = {**LLAMA, "hidden_size": WIDE}


def wide(part: str = "", heads: tuple[int, ...] = (), shared: int = HEADS) -> Tensors:
    """Heads of 32; those of one projection of a layer reduced to one direction and some noise."""
    tensors = transformer(width=WIDE)
    size = WIDE // HEADS
    for layer in range(4):
        for kind in ("k_proj", "v_proj"):
            name = f"model.layers.{layer}.self_attn.{kind}.weight"
            tensors[name] = tensors[name][: shared * size].copy()
    for head in heads:
        rows = tensors[f"{ATTN}.{part}.weight"][head * size : (head + 1) * size]
        rows[:] = np.outer(rows[:, 0], rows[0]) / abs(rows[0, 0]) + 0.003 * rows
    return tensors


def collapsed(path: Path, tensors: Tensors, **config: object) -> list[Finding]:
    return found(folder(path, tensors, {**OF_32, **config}), "head-collapse")


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize(
    ("part", "said"), [("q_proj", "queries"), ("k_proj", "keys"), ("v_proj", "values")]
)
def test_a_head_that_collapsed_is_named_once(
    part: str, said: str, dtype: type, tmp_path: Path
) -> None:
    tensors: Tensors = {n: x.astype(dtype) for n, x in wide(part, (2,)).items()}

    (seen,) = collapsed(tmp_path / "m", tensors)

    assert seen.subject == f"{ATTN}.{part}.weight"
    assert f"the {said} of head 2 of 4 use" in seen.message
    assert seen.severity == "low"


def test_the_keys_that_two_queries_share_collapse_once(tmp_path: Path) -> None:
    """Both comparisons collapse with them."""
    shared = {"num_key_value_heads": 4, "num_attention_heads": 8, "hidden_size": 2 * WIDE}
    tensors = wide("k_proj", (1,))
    for layer in range(4):
        name = f"model.layers.{layer}.self_attn.q_proj.weight"
        tensors[name] = gaussian(2 * WIDE, WIDE, seed=90 + layer)

    (seen,) = collapsed(tmp_path / "m", tensors, **shared, head_dim=32)

    assert "the keys of head 1 of 4 use" in seen.message


def test_a_head_that_compares_in_one_dimension_only_is_named(tmp_path: Path) -> None:
    """Queries and keys in half of the dimensions of the head each, which meet in one."""
    tensors = wide()
    turned = np.linalg.qr(gaussian(32, 32, seed=7))[0]
    for part, basis in (("q_proj", turned[:, :17]), ("k_proj", turned[:, 16:])):
        made = basis @ gaussian(basis.shape[1], WIDE, seed=8)
        tensors[f"{ATTN}.{part}.weight"][:32] = made

    (seen,) = collapsed(tmp_path / "m", tensors)

    assert "the comparison of head 0 of 4 uses 1." in seen.message


def test_a_fused_projection_tells_which_part_collapsed(tmp_path: Path) -> None:
    q, k, v = (gaussian(WIDE, WIDE, seed=s) for s in (1, 2, 3))
    v[32:64] = np.outer(v[32:64, 0], v[32])
    tensors = {
        "h.0.attn.c_attn.weight": np.concatenate([q, k, v]).T.copy(),
        "h.0.attn.c_attn.bias": gaussian(3 * WIDE, seed=4),
        "h.0.ln_1.weight": 1 + gaussian(WIDE, seed=6),
        "h.0.mlp.c_fc.weight": gaussian(WIDE, 4 * WIDE, seed=8),
        "h.0.mlp.c_fc.bias": gaussian(4 * WIDE, seed=9),
    }
    config = {"model_type": "gpt2", "n_head": HEADS, "n_embd": WIDE}

    (seen,) = found(folder(tmp_path / "m", tensors, config), "head-collapse")

    assert "the values of head 1 of 4" in seen.message


def of_gpt2(collapsed: str = "", padded: str = "") -> Tensors:
    """Twelve heads of 64, each an initialisation and an update of a strength of its own."""
    draw = np.random.default_rng(7)
    width, size, heads = 768, 64, 12
    made: Tensors = {"ln_f.weight": 1 + 0.1 * gaussian(width), "wte.weight": gaussian(100, width)}
    for layer in range(2):
        parts = []
        for name in "qkv":
            w = draw.standard_normal((heads, size, width)) * 0.02
            for head in w:
                u, v = draw.standard_normal((size, size)), draw.standard_normal((size, width))
                sigma = draw.uniform(0.5, 9) * np.arange(1, size + 1) ** -draw.uniform(0.7, 1.5)
                head += 0.02 * (np.linalg.qr(u)[0] * sigma) @ v
            if name in collapsed and layer:
                w[5] = 0.02 * draw.standard_normal((size, 3)) @ draw.standard_normal((3, width))
            if name in padded:
                w[11] = 0
            parts.append(w.reshape(-1, width))
        made[f"h.{layer}.attn.c_attn.weight"] = np.concatenate(parts).T.astype(np.float32)
        made[f"h.{layer}.attn.c_attn.bias"] = gaussian(3 * width, seed=layer) * np.float32(0.01)
        made[f"h.{layer}.ln_1.weight"] = 1 + 0.1 * gaussian(width, seed=layer)
    return made


@pytest.mark.parametrize(
    ("collapsed_", "padded", "told"),
    [("", "", None), ("", "qkv", None), ("q", "", "queries"), ("v", "", "values"),
     ("qkv", "", "queries, keys and values")],
)  # fmt: skip
def test_a_collapsed_head_of_a_gpt2_is_one_finding_and_trained_ones_are_none(
    collapsed_: str, padded: str, told: str | None, tmp_path: Path
) -> None:
    config = {"model_type": "gpt2", "n_head": 12, "n_embd": 768, "n_layer": 2}

    seen = found(folder(tmp_path / "m", of_gpt2(collapsed_, padded), config), "head-collapse")

    assert [f.subject for f in seen] == (["h.1.attn.c_attn.weight"] if told else [])
    assert all(f"the {told} of head 5 of 12 use" in f.message for f in seen)


def test_heads_that_are_all_alike_dead_small_or_few_are_none_of_it(tmp_path: Path) -> None:
    dead = wide()
    dead[f"{ATTN}.q_proj.weight"][32:64] *= np.float32(1e-9)
    dead[f"{ATTN}.k_proj.weight"][:32] = 0
    copied = wide()
    copied[f"{ATTN}.v_proj.weight"][:32] = copied[f"{ATTN}.v_proj.weight"][0]
    flipped = wide()
    flipped[f"{ATTN}.q_proj.weight"][40, 3] = 1e20
    steep = wide()
    for part in ("q_proj", "k_proj", "v_proj"):  # singular values that fall tenfold
        w = steep[f"{ATTN}.{part}.weight"][:32]
        u, _, vh = np.linalg.svd(w, full_matrices=False)
        w[:] = (u * np.geomspace(1, 0.1, 32)) @ vh

    for name, made in {
        "healthy": wide(), "all": wide("q_proj", (0, 1, 2, 3)), "shared": wide(shared=2),
        "dead": dead, "copied": copied, "flipped": flipped, "steep": steep,
    }.items():  # fmt: skip
        config = {"num_key_value_heads": 2} if name == "shared" else {}
        assert collapsed(tmp_path / name, made, **config) == [], name
    few = {"num_attention_heads": 2}
    assert collapsed(tmp_path / "few", wide("q_proj", (0, 1)), **few) == []
    small = {"num_attention_heads": 16}
    assert collapsed(tmp_path / "small", wide("q_proj", (1,)), **small) == []


def test_the_table_has_a_row_for_each_attention_and_one_for_all_layers_if_brief(
    tmp_path: Path,
) -> None:
    path = folder(tmp_path / "m", wide(shared=2), {**OF_32, "num_key_value_heads": 2})
    report = gradscope.analyze_weights(path, spectral=True)
    norms_ = [n for a in report.result.attention for n in a.qk_norms]

    whole, pull_request = renderer("table")(report), renderer("markdown")(report)

    rows = [line for line in whole.splitlines() if line.startswith("model.layers.1.self_attn ")]
    assert [row.split()[:5] for row in rows] == [[ATTN, "4", "(2", "shared)", "32"]]
    (row,) = (line for line in pull_request.splitlines() if "self\\_attn  ×4" in line)
    assert f"| 4 (2 shared) | 32 | {min(norms_):.3g} … {max(norms_):.3g} |" in row


def test_heads_for_which_there_is_no_time_are_listed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = folder(tmp_path / "m", transformer(width=WIDTH), LLAMA)
    spectra = sum(x.ndim == 2 for x in transformer(width=WIDTH).values())
    clock = iter(range(1000))
    monkeypatch.setattr(time, "monotonic", lambda: float(next(clock)))

    report = gradscope.analyze_weights(path, spectral=True, jobs=1, budget=spectra + 3)

    assert [a.module for a in report.result.attention] == [
        f"model.layers.{i}.self_attn" for i in range(2)
    ]
    assert [s.subject for s in report.coverage.skipped] == [
        f"model.layers.{i}.self_attn" for i in (2, 3)
    ]
    assert all("its heads: no time left" in s.reason for s in report.coverage.skipped)
