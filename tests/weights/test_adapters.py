"""Adapters: what they change, what is missing of them, and what they use of what they pay for.

Adapters of every method are written as PEFT, kohya, LyCORIS, diffusers and MLX name them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gradscope
from gradscope.checkpoints.open import open_checkpoint
from gradscope.report.model import Finding
from gradscope.weights.adapters import adapters, part
from gradscope.weights.products import BUDGET, singular_values, with_products
from gradscope.weights.result import Examined, Need

from .checkpoints import Array, Tensor, bf16, fp8, gaussian, lora, write

Factors = dict[str, Array]


def planted(
    folder: Path, tensors: Mapping[str, Tensor], config: Mapping[str, object] | None = None,
    steps: int | None = None, **metadata: str,
) -> Path:  # fmt: skip
    """A folder as PEFT and the Trainer leave it."""
    folder.mkdir(exist_ok=True)
    write(folder / "adapter_model.safetensors", tensors, **metadata)
    if config is not None:
        (folder / "adapter_config.json").write_text(json.dumps(config))
    if steps is not None:
        (folder / "trainer_state.json").write_text(json.dumps({"global_step": steps}))
    return folder


def findings(path: Path, **options: Any) -> list[Finding]:
    return list(gradscope.analyze_weights(path, **options).findings)


def idle(path: Path, **options: Any) -> list[Finding]:
    return [f for f in findings(path, **options) if f.name == "idle-adapter"]


def said(path: Path) -> list[str]:
    return [f.severity.value for f in idle(path)]


# -- adapters of every method, at their start and trained -----------------------------------------


def made(method: Callable[[int], Factors], modules: int = 3) -> Factors:
    return {
        f"base_model.model.layers.{n}.q_proj{'' if leaf.startswith('_') else '.'}{leaf}": values
        for n in range(modules)
        for leaf, values in method(n).items()
    }


def zeros(*shape: int) -> Array:
    return np.zeros(shape, np.float32)


def ones(*shape: int) -> Array:
    return np.ones(shape, np.float32)


def g(n: int, *shape: int) -> Array:
    return gaussian(*shape, seed=n)


#: method: its factors at the start, and which of them moves first.
FRESH: dict[str, tuple[Callable[[int], Factors], str]] = {
    "lora": (lambda n: {"lora_A.weight": g(n, 8, 64), "lora_B.weight": zeros(32, 8)},
             "lora_B.weight"),
    "lora of a name": (lambda n: {"lora_A.default.weight": g(n, 8, 64),
                                  "lora_B.default.weight": zeros(32, 8)}, "lora_B.default.weight"),
    "embedding": (lambda n: {"lora_embedding_A": zeros(8, 500), "lora_embedding_B": g(n, 64, 8)},
                  "lora_embedding_A"),
    "dora": (lambda n: {"lora_A.weight": g(n, 8, 64), "lora_B.weight": zeros(32, 8),
                        "lora_magnitude_vector": 1 + g(n + 9, 32)}, "lora_B.weight"),
    "kohya": (lambda n: {"lora_down.weight": g(n, 8, 64), "lora_up.weight": zeros(32, 8),
                         "alpha": np.array(4, np.float32)}, "lora_up.weight"),
    "convolution": (lambda n: {"lora_down.weight": g(n, 8, 16, 3, 3),
                               "lora_up.weight": zeros(32, 8, 1, 1)}, "lora_up.weight"),
    "locon tucker": (lambda n: {"lora_down.weight": g(n, 8, 16, 1, 1), "lora_up.weight":
                                zeros(32, 8, 1, 1), "lora_mid.weight": g(n, 8, 8, 3, 3)},
                     "lora_up.weight"),
    "diffusers": (lambda n: {"_lora.down.weight": g(n, 8, 64), "_lora.up.weight": zeros(64, 8)},
                  "_lora.up.weight"),
    "mlx": (lambda n: {"lora_a": g(n, 64, 8), "lora_b": zeros(8, 64)}, "lora_b"),
    "adalora": (lambda n: {"lora_A": g(n, 8, 64), "lora_B": g(n + 9, 32, 8),
                           "lora_E": zeros(8, 1)}, "lora_E"),
    "loha": (lambda n: {"hada_w1_a": g(n, 32, 8), "hada_w1_b": g(n, 8, 64),
                        "hada_w2_a": g(n + 9, 32, 8), "hada_w2_b": zeros(8, 64)}, "hada_w2_b"),
    "lokr": (lambda n: {"lokr_w1": zeros(8, 8), "lokr_w2_a": g(n, 8, 2), "lokr_w2_b": g(n, 2, 8)},
             "lokr_w1"),
    "lokr of lycoris": (lambda n: {"lokr_w1": g(n, 8, 8), "lokr_w2": zeros(8, 16)}, "lokr_w2"),
    "ia3": (lambda _: {"ia3_l": ones(64, 1)}, "ia3_l"),
    "vera": (lambda _: {"vera_lambda_b": zeros(64), "vera_lambda_d": 0.1 * ones(16)},
             "vera_lambda_b"),
    "oft": (lambda _: {"oft_R.weight": zeros(8, 28)}, "oft_R.weight"),
    "boft": (lambda _: {"boft_R": zeros(1, 8, 8, 8), "boft_s": ones(64, 1)}, "boft_s"),
    "randlora": (lambda _: {"randlora_lambda": zeros(8, 8), "randlora_gamma": ones(8, 64) / 64},
                 "randlora_lambda"),
    "shira": (lambda _: {"shira_weight": zeros(512)}, "shira_weight"),
    "bone": (lambda _: {"bone_block": zeros(8, 8, 8)}, "bone_block"),
    "miss": (lambda _: {"miss_block": zeros(8, 64)}, "miss_block"),
}  # fmt: skip


@pytest.mark.parametrize("method", FRESH)
class TestEveryMethod:
    def test_a_fresh_adapter_is_nothing_above_info(self, method: str, tmp_path: Path) -> None:
        path = planted(tmp_path, made(FRESH[method][0]))
        assert [(f.name, f.severity.value) for f in findings(path) if f.severity.rank > 0] == []
        assert said(path) == ["info"]

    def test_one_that_is_still_fresh_after_training_is_high(
        self, method: str, tmp_path: Path
    ) -> None:
        path = planted(tmp_path, made(FRESH[method][0]), steps=500)
        assert said(path) == ["high"]
        assert idle(path)[0].evidence["step"] == 500
        assert gradscope.analyze_weights(path).gate.exit_code == 1

    def test_a_trained_one_is_no_finding(self, method: str, tmp_path: Path) -> None:
        start, moves = FRESH[method]

        def trained(n: int) -> Factors:
            factors = start(n)
            return {**factors, moves: factors[moves] + g(n + 50, *factors[moves].shape)}

        assert findings(planted(tmp_path, made(trained), steps=500)) == []

    def test_one_module_that_was_not_trained_is_medium(self, method: str, tmp_path: Path) -> None:
        start, moves = FRESH[method]

        def trained(n: int) -> Factors:
            factors = start(n)
            moved = {moves: factors[moves] + g(n + 50, *factors[moves].shape)} if n else {}
            return {**factors, **moved}

        path = planted(tmp_path, made(trained), steps=500)
        expected = "info" if method == "adalora" else "medium"  # which takes rank away
        assert said(path) == [expected]
        assert idle(path)[0].evidence == {"zero_adapters": 1, "adapters": 3}


@pytest.mark.parametrize("factor", ["lora_magnitude_vector", "ia3_l", "boft_s"])
def test_multipliers_of_zero_leave_nothing_of_a_module(factor: str, tmp_path: Path) -> None:
    def trained(n: int) -> Factors:
        rest = {"lora_A.weight": g(n, 8, 64), "lora_B.weight": g(n + 9, 64, 8)}
        return {factor: 1 + g(n + 50, 64), **(rest if "lora" in factor else {})}

    tensors = made(trained)
    assert findings(planted(tmp_path / "sound", tensors, steps=500)) == []

    lost = {n: t * 0 if n.endswith(factor) else t for n, t in tensors.items()}
    (found,) = (f for f in findings(planted(tmp_path / "lost", lost, steps=500)) if f.severity.rank)
    assert (found.name, found.severity) == ("all-zero", "high")
    assert found.evidence["zero_tensors"] == 3


def test_factors_of_nan_are_not_dead_as_well(tmp_path: Path) -> None:
    tensors = lora()
    name = next(iter(tensors))
    tensors[name] = np.full_like(tensors[name], np.nan)
    path = planted(tmp_path, tensors)

    assert [f.name for f in findings(path) if f.severity.rank > 1] == ["non-finite"]


def test_factors_that_are_both_zero_are_high_also_at_the_start(tmp_path: Path) -> None:
    dead = made(lambda _: {"lora_A.weight": zeros(8, 64), "lora_B.weight": zeros(64, 8)})
    path = planted(tmp_path, dead, steps=0)
    assert said(path) == ["high"]
    assert "no gradient" in idle(path)[0].message


@pytest.mark.parametrize(
    ("metadata", "folder", "severity"),
    [
        ({}, "adapter", "info"),
        ({"ss_steps": "1200"}, "adapter", "high"),
        ({"ss_steps": "0"}, "adapter", "info"),
        ({"training_info": '{"step": 250, "epoch": 1}'}, "adapter", "high"),
        ({"training_info": "[" * 9999}, "adapter", "info"),
        ({"step": "7"}, "adapter", "high"),
        ({}, "checkpoint-500", "high"),
        ({}, "checkpoint-0", "info"),
        ({}, "checkpoint-best", "info"),
    ],
)
def test_steps_are_found_wherever_trainers_write_them(
    metadata: dict[str, str], folder: str, severity: str, tmp_path: Path
) -> None:
    path = planted(tmp_path / folder, lora(trained=0), **metadata)
    assert said(path) == [severity]
    assert [f.severity.value for f in idle(path / "adapter_model.safetensors")] == [severity]


def test_a_step_among_the_tensors_counts_and_one_that_is_not_a_number_does_not(
    tmp_path: Path,
) -> None:
    fresh = lora(trained=0)
    assert said(planted(tmp_path, {**fresh, "global_step": np.array(9)})) == ["high"]
    assert said(planted(tmp_path, {**fresh, "step": np.array(np.nan, np.float32)})) == ["info"]


def test_the_last_layer_of_a_text_encoder_gets_no_gradient_by_design(tmp_path: Path) -> None:
    def module(layer: int, zero: bool) -> Factors:
        start = f"lora_te1_text_model_encoder_layers_{layer}_self_attn_q_proj"
        b = zeros(64, 8) if zero else g(layer, 64, 8)
        return {f"{start}.lora_down.weight": g(layer, 8, 64), f"{start}.lora_up.weight": b}

    last = {k: v for n in range(12) for k, v in module(n, zero=n == 11).items()}
    assert said(planted(tmp_path, last, ss_steps="900")) == ["info"]
    middle = {k: v for n in range(12) for k, v in module(n, zero=n == 5).items()}
    assert said(planted(tmp_path, middle, ss_steps="900")) == ["medium"]


def test_experts_that_no_token_reached_are_low(tmp_path: Path) -> None:
    def experts(zero: set[int]) -> Factors:
        return {
            f"model.layers.0.mlp.experts.{n}.up_proj.lora_{side}.weight": zeros(64, 8)
            if side == "B" and n in zero
            else g(n, *((8, 64) if side == "A" else (64, 8)))
            for n in range(8)
            for side in "AB"
        }

    assert said(planted(tmp_path, experts({3, 5}), steps=9)) == ["low"]
    assert said(planted(tmp_path, experts(set(range(8))), steps=9)) == ["high"]


def test_zero_factors_are_neither_all_zero_nor_duplicates(tmp_path: Path) -> None:
    path = planted(tmp_path, made(FRESH["loha"][0]) | lora(trained=0))
    assert {f.name for f in findings(path)} == {"idle-adapter"}


def test_a_module_from_which_adalora_took_all_rank_is_info(tmp_path: Path) -> None:
    def pruned(n: int) -> Factors:
        r = 0 if n == 1 else 4
        return {"lora_A": g(n, r, 64), "lora_B": g(n, 64, r), "lora_E": g(n, r, 1)}

    path = planted(tmp_path, made(pruned), steps=500)
    assert [(f.name, f.severity.value) for f in findings(path)] == [("idle-adapter", "info")]


def test_an_adapter_saved_without_gathering_is_empty_and_no_more(tmp_path: Path) -> None:
    empty = made(lambda _: {"lora_A.weight": zeros(0), "lora_B.weight": zeros(0)})
    found = findings(planted(tmp_path, empty, steps=500))
    assert {f.name for f in found} == {"empty-tensor"}


# -- alpha ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "zero"),
    [
        ({"r": 8, "lora_alpha": 0}, 4),
        ({"r": 8, "lora_alpha": 16}, 0),
        ({"r": 8, "lora_alpha": 16, "alpha_pattern": {"layers.1.q_proj": 0}}, 1),
        ({"r": 8, "lora_alpha": 0, "alpha_pattern": {"q_proj": 8}}, 0),
        ({"r": 8, "lora_alpha": 0, "alpha_pattern": {r"^layers\.(1|2)\.q_proj$": 8}}, 0),  # unknown
        ({"lora_parameters": {"rank": 8, "scale": 0.0}}, 4),
        ({"lora_parameters": {"rank": 8, "scale": 20.0}}, 0),
        ({"r": 8, "lora_alpha": None}, 0),
        ({"r": 8}, 0),
    ],
)
def test_alpha_of_zero_is_medium(config: dict[str, object], zero: int, tmp_path: Path) -> None:
    found = idle(planted(tmp_path, lora(), config, steps=9))
    assert [(f.severity.value, f.evidence["zero_alphas"]) for f in found] == (
        [("medium", zero)] if zero else []
    )


@pytest.mark.parametrize(("method", "moves"), [("kohya", "lora_up.weight"), ("lokr", "lokr_w1")])
def test_alpha_of_zero_beside_the_factors_is_medium(
    method: str, moves: str, tmp_path: Path
) -> None:
    def trained(n: int) -> Factors:
        factors = FRESH[method][0](n)
        return {**factors, moves: g(n + 50, *factors[moves].shape), "alpha": np.array(0.0)}

    assert said(planted(tmp_path, made(trained))) == ["medium"]


def test_alpha_of_zero_is_named_as_the_cause_where_nothing_was_trained(tmp_path: Path) -> None:
    path = planted(tmp_path, lora(trained=0), {"r": 8, "lora_alpha": 0}, steps=500)
    assert said(path) == ["high"]
    assert "alpha" in idle(path)[0].recommendation


# -- what is missing ------------------------------------------------------------------------------


def stack(layers: int = 8, modules: tuple[str, ...] = ("q_proj", "v_proj")) -> Factors:
    return {
        f"base_model.model.model.layers.{n}.self_attn.{m}.lora_{side}.weight": g(
            100 * n + place, *((8, 64) if side == "A" else (64, 8))
        )
        for n in range(layers)
        for place, m in enumerate(modules)
        for side in "AB"
    }


def without(tensors: Factors, *parts: str) -> Factors:
    return {name: t for name, t in tensors.items() if not any(part in name for part in parts)}


@pytest.mark.parametrize(
    ("config", "missing"),
    [
        ({"target_modules": ["q_proj", "v_proj"]}, 0),
        ({"target_modules": ["self_attn.q_proj", "v_proj"]}, 0),
        ({"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]}, 2),
        ({"target_modules": ["proj"]}, 1),
        ({"target_modules": "all-linear"}, 0),
        ({"target_modules": r".*\.(q|k)_proj"}, 0),
        ({"target_modules": ["q_proj", "lm_head"], "modules_to_save": ["lm_head"]}, 0),
        ({"target_modules": ["q_proj", "k_proj"], "exclude_modules": ["k_proj"]}, 0),
        ({"target_modules": None}, 0),
        ({"target_modules": [3, {}]}, 0),
    ],
)
def test_a_target_without_any_adapter_is_medium(
    config: dict[str, object], missing: int, tmp_path: Path
) -> None:
    path = planted(tmp_path, stack(), {"peft_type": "LORA", "r": 8, **config})
    found = idle(path)
    assert [(f.severity.value, f.evidence["missing_targets"]) for f in found] == (
        [("medium", missing)] if missing else []
    )


def test_a_file_of_an_adapter_without_any_is_medium_and_other_methods_are_not(
    tmp_path: Path,
) -> None:
    other = {"base_model.model.score.weight": g(1, 2, 64)}
    path = planted(tmp_path, other, {"peft_type": "LORA", "target_modules": ["q_proj"]})
    assert said(path) == ["medium"]
    path = planted(tmp_path, other, {"peft_type": "LN_TUNING", "target_modules": ["norm"]})
    assert said(path) == []


def test_a_module_missing_in_one_layer_is_medium_and_named(tmp_path: Path) -> None:
    path = planted(tmp_path, without(stack(32), "layers.31.self_attn.v_proj"))
    (found,) = idle(path)
    assert found.severity == "medium"
    assert found.subject == "base_model.model.model.layers.31.self_attn.v_proj"
    assert found.evidence == {"missing_layers": 1, "layers": 32}


@pytest.mark.parametrize(
    ("kept", "why"),
    [
        (stack(), "nothing is missing"),
        (without(stack(), *(f"layers.{n}.self_attn.v_proj" for n in (3, 4, 5, 6, 7))), "too many"),
        (without(stack(18), *(f"layers.{n}.self_attn.v_proj" for n in (5, 11, 17))), "periodic"),
        (without(stack(), "layers.0.self_attn"), "the layer has no such block"),
        (without(stack(8, ("to_q", "add_q_proj")), "layers.7.self_attn.add"), "no context"),
    ],
)
def test_modules_that_some_layers_lack_by_design_are_no_finding(
    kept: Factors, why: str, tmp_path: Path
) -> None:
    assert idle(planted(tmp_path, kept)) == [], why


@pytest.mark.parametrize(
    ("config", "severity"),
    [
        ({"layers_to_transform": [0, 1, 2, 3, 5, 6]}, []),
        ({"layers_to_transform": [0, 1, 2, 3, 5, 6, 7]}, ["medium"]),
        ({"target_modules": r".*\.[0-356]\..*_proj"}, []),
        ({"target_modules": ["q_proj", "v_proj"], "exclude_modules": r".*\.4\..*"}, []),
    ],
)
def test_layers_that_were_chosen_are_no_gap_and_must_be_there(
    config: dict[str, object], severity: list[str], tmp_path: Path
) -> None:
    path = planted(tmp_path, without(stack(7), "layers.4."), {"r": 8, **config})
    assert [f.severity.value for f in findings(path)] == severity


def test_half_of_a_pair(tmp_path: Path) -> None:
    b_lost = without(stack(), "layers.3.self_attn.q_proj.lora_B")
    assert said(planted(tmp_path, b_lost, steps=9)) == ["medium"]
    a_lost = without(stack(), "layers.3.self_attn.q_proj.lora_A")
    assert said(planted(tmp_path, a_lost, steps=9)) == ["high"]


def test_what_was_not_asked_for_or_is_in_another_file_is_not_missing(tmp_path: Path) -> None:
    config = {"target_modules": ["q_proj", "v_proj", "k_proj"]}
    path = planted(tmp_path, stack(), config)
    assert idle(path, include=["*lora_A*"]) == []
    half = write(tmp_path / "adapter_model-00001-of-00002.safetensors", stack(4))
    assert idle(half) == []


def test_factors_that_cannot_be_multiplied_are_medium(tmp_path: Path) -> None:
    tensors = stack()
    name = "base_model.model.model.layers.2.self_attn.q_proj.lora_B.weight"
    path = planted(tmp_path, {**tensors, name: g(1, 64, 3)})
    (found,) = idle(path)
    assert (found.severity, "[8, 64]" in found.message) == ("medium", True)


@pytest.mark.parametrize(
    ("a", "b"), [((16, 64), (64, 8)), ((24, 64), (64, 8)), ((8, 64, 3, 3), (64, 8, 1, 1))]
)
def test_stacked_experts_and_convolutions_fit(
    a: tuple[int, ...], b: tuple[int, ...], tmp_path: Path
) -> None:
    factors = made(lambda n: {"lora_A.weight": g(n, *a), "lora_B.weight": g(n + 9, *b)})
    assert idle(planted(tmp_path, factors)) == []


def test_headers_tell_what_is_missing_and_no_more(tmp_path: Path) -> None:
    config = {"target_modules": ["q_proj", "k_proj"]}
    path = planted(tmp_path, lora(trained=0), config, steps=500)
    report = gradscope.analyze_weights(path, headers_only=True)
    assert [f.evidence for f in report.findings] == [{"missing_targets": 1, "targets": 2}]
    assert "idle-adapter" in {n.rule for n in report.coverage.not_evaluated}
    assert [(a.rank, a.effective_rank) for a in report.result.adapters] == [(8, None)] * 4


# -- the product ----------------------------------------------------------------------------------


def entropy_rank(product: Array) -> float:
    """By NumPy's decomposition of the product itself."""
    sigma = np.linalg.svd(product, compute_uv=False)
    shares = sigma[sigma > 1e-14 * sigma[0]] / sigma.sum()
    return math.exp(-sum(p * math.log(p) for p in shares))


def results(path: Path) -> list[Any]:
    return list(gradscope.analyze_weights(path).result.adapters)


@pytest.mark.parametrize("rank", [1, 2, 7, 16, 64])
@pytest.mark.parametrize("shape", [(64, 200), (300, 40), (17, 19)])
@pytest.mark.parametrize("store", ["F32", "F16", "BF16", "F8_E4M3", "F64"])
def test_rank_and_norm_are_those_of_the_product(
    rank: int, shape: tuple[int, int], store: str, tmp_path: Path
) -> None:
    out, into = shape
    a, b = g(1, rank, into) * 10, g(2, out, rank) * 10
    b *= np.geomspace(1, 1e-3, rank)
    cast = {"BF16": bf16, "F8_E4M3": fp8, "F16": lambda v: v.astype(np.float16),
            "F64": lambda v: v.astype(np.float64), "F32": lambda v: v}[store]  # fmt: skip
    path = planted(tmp_path, {"m.lora_A.weight": cast(a), "m.lora_B.weight": cast(b)})
    (found,) = results(path)
    stored = [decoded(cast(values)) for values in (b, a)]
    product = stored[0] @ stored[1]
    assert found.rank == rank
    assert found.norm == pytest.approx(np.linalg.norm(product), rel=1e-12)
    assert found.effective_rank == pytest.approx(entropy_rank(product), rel=1e-6)


def decoded(tensor: Tensor) -> Array:
    """By torch, which is no part of what is tested."""
    import torch

    if isinstance(tensor, np.ndarray):
        return tensor.astype(np.float64)
    kind = {"BF16": torch.bfloat16, "F8_E4M3": torch.float8_e4m3fn}[tensor.dtype]
    values: Array = torch.from_numpy(tensor.codes).view(kind).double().numpy()
    return values


def test_an_orthogonal_product_uses_all_of_its_rank_and_an_outer_product_one(
    tmp_path: Path,
) -> None:
    q = np.linalg.qr(g(1, 64, 8).astype(np.float64))[0]
    full = {"m.lora_A.weight": np.ascontiguousarray(q.T), "m.lora_B.weight": q}
    assert results(planted(tmp_path, full))[0].effective_rank == pytest.approx(8, abs=1e-5)
    one = {**full, "m.lora_B.weight": np.outer(q[:, 0], q[0])}
    assert results(planted(tmp_path, one))[0].effective_rank == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("method", ["mlx", "embedding", "convolution", "kohya"])
def test_every_layout_gives_the_same_product(method: str, tmp_path: Path) -> None:
    a, b = g(1, 8, 72).astype(np.float64), g(2, 72, 8).astype(np.float64)
    factors = {
        "mlx": {"lora_a": np.ascontiguousarray(a.T), "lora_b": np.ascontiguousarray(b.T)},
        "embedding": {"lora_embedding_A": a, "lora_embedding_B": b},
        "convolution": {"lora_down.weight": a.reshape(8, 8, 3, 3),
                        "lora_up.weight": b.reshape(72, 8, 1, 1)},
        "kohya": {"lora_down.weight": a, "lora_up.weight": b},
    }[method]  # fmt: skip
    (found,) = results(planted(tmp_path, {f"m.{leaf}": t for leaf, t in factors.items()}))
    product = b @ a
    assert found.rank == 8
    assert found.norm == pytest.approx(np.linalg.norm(product), rel=1e-12)
    assert found.effective_rank == pytest.approx(entropy_rank(product), rel=1e-6)


def test_a_torch_file_of_transposed_factors_gives_the_same_product(tmp_path: Path) -> None:
    import torch

    a, b = torch.randn(72, 8).T, torch.randn(8, 50).T
    torch.save({"m.lora_A.weight": a, "m.lora_B.weight": b}, tmp_path / "adapter.pt")
    (found,) = results(tmp_path / "adapter.pt")
    assert found.norm == pytest.approx(float((b.double() @ a.double()).norm()), rel=1e-12)


def test_a_factor_of_several_pieces_gives_the_same_product(
    tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr("gradscope.weights.products.PIECE", 100)
    a, b = g(1, 8, 300).astype(np.float64), g(2, 201, 8).astype(np.float64)
    (found,) = results(planted(tmp_path, {"m.lora_A.weight": a, "m.lora_B.weight": b}))
    assert found.norm == pytest.approx(np.linalg.norm(b @ a), rel=1e-12)
    assert found.effective_rank == pytest.approx(entropy_rank(b @ a), rel=1e-6)


def test_a_product_with_nan_has_no_rank_and_one_of_zeros_no_effective_one(tmp_path: Path) -> None:
    broken = lora(2, trained=1)
    broken["base_model.model.layers.0.q_proj.lora_A.weight"][3, 3] = np.nan
    first, second = results(planted(tmp_path, broken))
    assert (first.effective_rank, first.norm) == (None, None)
    assert (second.effective_rank, second.norm) == (None, 0.0)


@pytest.mark.parametrize(
    ("config", "scale"),
    [
        ({"r": 8, "lora_alpha": 16}, 2.0),
        ({"r": 8, "lora_alpha": 16, "use_rslora": True}, 16 / math.sqrt(8)),
        ({"r": 8, "lora_alpha": 16, "alpha_pattern": {"layers.0.q_proj": 4}}, 0.5),
        ({"lora_parameters": {"rank": 8, "scale": 20.0}}, 20.0),
        ({}, None),
    ],
)
def test_the_scale_is_alpha_over_the_rank_or_its_root(
    config: dict[str, object], scale: float | None, tmp_path: Path
) -> None:
    assert results(planted(tmp_path, lora(1), config))[0].scale == scale


def test_alpha_beside_the_factors_gives_the_scale(tmp_path: Path) -> None:
    factors = made(FRESH["kohya"][0], 1)
    assert results(planted(tmp_path, factors))[0].scale == 0.5


def test_diffusers_writes_the_configuration_of_each_part_into_the_header(tmp_path: Path) -> None:
    tensors = {
        f"{part}.blocks.0.to_q.lora_{side}.weight": g(1, *((8, 64) if side == "A" else (64, 8)))
        for part in ("transformer", "text_encoder")
        for side in "AB"
    }
    config = {"transformer.r": 8, "transformer.lora_alpha": 4, "text_encoder.lora_alpha": 32}
    path = planted(tmp_path, tensors, lora_adapter_metadata=json.dumps(config))
    assert [a.scale for a in results(path)] == [0.5, 4.0]


def collapsed(n: int, rank: int = 16, noise: float = 0.0) -> Factors:
    b = np.outer(g(n, 64), g(n + 1, rank)) + noise * g(n + 2, 64, rank)
    return {"lora_A.weight": g(n, rank, 64), "lora_B.weight": b.astype(np.float32)}


def test_one_direction_of_sixteen_is_one_low_finding(tmp_path: Path) -> None:
    path = planted(tmp_path, made(collapsed, 4), steps=500)
    (found,) = idle(path)
    assert found.severity == "low"
    assert found.evidence["effective_rank"] == pytest.approx(1, abs=1e-4)
    assert (found.evidence["rank"], found.evidence["modules"]) == (16, 4)


@pytest.mark.parametrize(
    ("collapses", "modules", "rank", "noise", "fires"),
    [
        (2, 4, 16, 0.0, True),
        (1, 4, 16, 0.0, False),  # one module proves nothing
        (4, 4, 4, 0.0, False),  # a small rank is not worth a word
        (4, 4, 8, 0.0, True),
        (4, 4, 16, 0.5, False),
    ],
)
def test_it_takes_half_of_the_modules_of_a_great_rank(
    collapses: int, modules: int, rank: int, noise: float, fires: bool, tmp_path: Path
) -> None:
    def factors(n: int) -> Factors:
        full = {"lora_A.weight": g(n, rank, 64), "lora_B.weight": g(n + 60, 64, rank)}
        return collapsed(n, rank, noise) if n < collapses else full

    assert bool(idle(planted(tmp_path, made(factors, modules)))) is fires


def examined(path: Path) -> Examined:
    """As it is when the tensors were measured and the products not."""
    report = gradscope.analyze_weights(path)
    unmeasured = (
        a.model_copy(update={"effective_rank": None, "norm": None}) for a in report.result.adapters
    )
    return Examined(
        open_checkpoint(str(path)),
        report.result.tensors,
        frozenset(Need),
        adapters=tuple(unmeasured),
    )


@pytest.mark.parametrize(("share", "measured"), [(1.01, 6), (0.99, 3), (0.34, 2), (0.01, 1)])
def test_what_would_cost_too_much_is_measured_in_every_second_module(
    share: float, measured: int, tmp_path: Path
) -> None:
    path = planted(tmp_path, lora(6))
    cost = 6 * (2 * (8 * 64 + 64 * 8) * 8 + 20 * 8**3)
    found = with_products(examined(path), lambda f, tasks: map(f, tasks), budget=share * cost)
    assert sum(a.norm is not None for a in found) == measured
    assert cost < BUDGET


def test_singular_values_come_greatest_first(tmp_path: Path) -> None:
    path = planted(tmp_path, lora(1))
    refs = {ref.name: ref for ref in open_checkpoint(str(path)).tensors}
    (adapter,) = adapters(refs.values())
    sigma = singular_values(adapter, refs)
    assert sigma is not None
    a, b = (lora(1)[f"base_model.model.layers.0.q_proj.lora_{s}.weight"].astype("f8") for s in "AB")
    assert sigma == pytest.approx(np.linalg.svd(b @ a, compute_uv=False)[:8], rel=1e-9)


# -- names ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("m.q.lora_A.weight", ("m.q", "lora", "A", "")),
        ("m.q.lora_B.default.weight", ("m.q", "lora", "B", "default")),
        ("m.q.lora_A.speech.weight", ("m.q", "lora", "A", "speech")),
        ("lora_A", ("", "lora", "A", "")),
        ("m.q.lora_a", ("m.q", "lora", "A", "")),
        ("m.e.lora_embedding_B.default", ("m.e", "lora", "B", "default")),
        ("lora_unet_up_blocks_0.lora_up.weight", ("lora_unet_up_blocks_0", "lora", "B", "")),
        ("u.processor.to_q_lora.down.weight", ("u.processor.to_q", "lora", "A", "")),
        ("u.lora_linear_layer.up.weight", ("u", "lora", "B", "")),
        ("u.processor.qkv_lora1.up.weight", ("u.processor.qkv", "lora", "B", "")),
        ("m.q.lora_E", ("m.q", "lora", "lora_E", "")),
        ("m.q.lora_B.bias", None),
        ("m.q.lora_B.default.bias", None),
        ("m.q.lora_magnitude_vector", None),
        ("lora_unet_x.alpha", None),
        ("m.w_lora.lora.0.weight", None),
        ("m.explora_A.weight", None),
        ("m.down.weight", None),
        ("m.loft_R.weight", None),
    ],
)
def test_which_factor_of_which_module_a_name_means(name: str, expected: Any) -> None:
    assert part(name) == expected
