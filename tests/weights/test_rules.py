"""Every rule has a checkpoint that fires it, one just below, and says what it measured."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import scipy.stats

import gradscope
from gradscope.report.model import Finding
from gradscope.report.rules import select_for
from gradscope.weights.result import Examined, Need

from .checkpoints import (
    Array,
    Codes,
    Tensor,
    bf16,
    conv_net,
    fp8,
    gaussian,
    healthy,
    lora,
    serialized,
    transformer,
    write,
    write_sharded,
)

Plant = Callable[[Path], Path]

RULES = {rule.code: rule for rule in select_for(Examined)}
RULES_BY_NAME = {rule.name: rule for rule in RULES.values()}
UP = "model.layers.1.mlp.up_proj.weight"
EMBED = "model.embed_tokens.weight"
SHARD = "model-00003-of-00003.safetensors"


def findings(path: Path, name: str | None = None) -> list[Finding]:
    spectral = name is not None and RULES_BY_NAME[name].needs is Need.SPECTRA
    found = gradscope.analyze_weights(path, spectral=spectral).findings
    return [f for f in found if name is None or f.name == name]


def saved(tensors: Mapping[str, Tensor], **metadata: str) -> Plant:
    return lambda folder: write(folder / "model.safetensors", tensors, **metadata)


def spoilt(name: str, tensor: Tensor) -> Plant:
    """The healthy transformer with one tensor replaced or added."""
    return saved({**transformer(), name: tensor})


def altered(change: Callable[[Array], object], name: str = UP) -> Plant:
    """The healthy transformer with one tensor changed in place."""
    tensor = transformer()[name].copy()
    change(tensor)
    return spoilt(name, tensor)


def put(value: float, *place: int) -> Callable[[Array], object]:
    return lambda tensor: tensor.__setitem__(place, value)


def filled(most: float, one: float) -> Callable[[Array], object]:
    """One value everywhere but at [3, 4]."""

    def change(tensor: Array) -> None:
        tensor.fill(most)
        tensor[3, 4] = one

    return change


def beyond_the_next(factor: float) -> float:
    """So many times as far from the median as the farthest element of UP."""
    values = transformer()[UP].astype(np.float64)
    return float(np.abs(values - np.median(values)).max() * factor)


def at_peak_ratio(ratio: float) -> float:
    values = transformer()[UP].astype(np.float64)
    mad = np.median(np.abs(values - np.median(values)))
    return float(ratio * 1.482602218505602 * mad * math.sqrt(2 * math.log(values.size)))


def weak_rows(count: int, share: float) -> Callable[[Array], object]:
    """Scale the first rows to a share of the norm that a tenth of the rows exceed."""

    def change(tensor: Array) -> None:
        norms = np.linalg.norm(tensor.astype(np.float64), axis=1)
        reference = np.sort(norms[count:])[-1 - len(norms) // 10]
        tensor[:count] *= (share * reference / norms[:count, None]).astype(np.float32)

    return change


def repeated_rows(count: int) -> Callable[[Array], object]:
    return lambda tensor: tensor.__setitem__(slice(1, count + 1), tensor[0])


def almost_repeated(tensor: Array) -> None:
    tensor[1] = tensor[0]
    tensor[1, 0] = np.nextafter(tensor[0, 0], np.float32(1))


def heavy(scale: float) -> Array:
    """A Gaussian of which one element in twenty is ``scale`` times as wide."""
    values = gaussian(128, 32, seed=99)
    values.flat[::20] *= scale
    return values


def leaning(sigma: float) -> Array:
    return (np.exp(sigma * gaussian(128, 32, seed=98, scale=1)) - 0.2).astype(np.float32)


def trimmed(values: Array) -> Array:
    """Without the 0.1 % farthest from the median."""
    flat = values.astype(np.float64).ravel()
    order = np.argsort(np.abs(flat - np.median(flat)), kind="stable")
    return flat[order[: flat.size - flat.size // 1000]]


def zeroed(share: float) -> Callable[[Array], object]:
    """Zero a share of the elements of each row, at random places."""

    def change(tensor: Array) -> None:
        rng = np.random.default_rng(3)
        count = round(share * tensor.size)
        tensor.flat[rng.choice(tensor.size, count, replace=False)] = 0

    return change


def batch_norms(batches: int) -> Plant:
    made = conv_net()
    made["features.1.running_mean"] = np.zeros(16, np.float32)
    made["features.1.running_var"] = np.ones(16, np.float32)
    made["features.1.num_batches_tracked"] = np.array(batches)
    return saved(made)


def layers(*numbers: int, config: int | None = None) -> Plant:
    """A transformer that has these layers only."""
    full = transformer(max(numbers) + 1)
    kept = {
        name: tensor
        for name, tensor in full.items()
        if not name.startswith("model.layers.") or int(name.split(".")[2]) in numbers
    }

    def plant(folder: Path) -> Path:
        write(folder / "model.safetensors", kept)
        if config is not None:
            (folder / "config.json").write_text(json.dumps({"num_hidden_layers": config}))
        return folder

    return plant


def beside(**config: int) -> Plant:
    """The healthy transformer and its configuration."""

    def plant(folder: Path) -> Path:
        write(folder / "model.safetensors", transformer())
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    return plant


def sharded(edit: Callable[[Path, dict[str, str]], object] = lambda *_: None) -> Plant:
    def plant(folder: Path) -> Path:
        write_sharded(folder, transformer())
        index = folder / "model.safetensors.index.json"
        described = json.loads(index.read_text())
        edit(folder, described["weight_map"])
        index.write_text(json.dumps(described))
        return folder

    return plant


def truncated(by: int) -> Plant:
    def plant(folder: Path) -> Path:
        path = write(folder / "model.safetensors", transformer())
        path.write_bytes(path.read_bytes()[: path.stat().st_size - by])
        return path

    return plant


def twice(second: str) -> Plant:
    def plant(folder: Path) -> Path:
        path = folder / "model.safetensors"
        made = transformer()
        path.write_bytes(serialized([*made.items(), (second, made[UP])], None))
        return path

    return plant


def quantized(scale: Tensor | None, values: Array | None = None) -> Plant:
    """A model with two float8 matrices; the first one's scale is given."""
    weight = gaussian(64, 32, seed=7, scale=40) if values is None else values
    made: dict[str, Tensor] = {"a.weight": fp8(weight)}
    if scale is not None:
        made["a.weight_scale"] = scale
    other = {"b.weight": fp8(gaussian(64, 32, seed=8, scale=40))}
    return saved({**made, **other, "b.weight_scale": np.array([0.01], np.float32)})


def float16(value: float) -> Plant:
    values = transformer()[UP].astype(np.float16)
    values[3, 4] = value
    return spoilt(UP, values)


def bf16_payload(odd: float = 0.0) -> Array:
    values = transformer()[UP].copy()
    payload = (values.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32).copy()
    payload[0, 0] = odd or payload[0, 0]
    return payload


def copied(difference: int) -> Plant:
    made = transformer()
    bits = made[UP].copy().view(np.uint32)
    bits[0, 0] ^= np.uint32(difference)
    return saved({**made, UP.replace("layers.1", "layers.2"): bits.view(np.float32)})


def experts(scale: float) -> Plant:
    """A healthy mixture of four in one layer, one matrix of the third scaled."""
    made = {
        f"model.layers.1.mlp.experts.{n}.{part}.weight": gaussian(32, 16, seed=10 * n + place)
        for n in range(4)
        for place, part in enumerate(("up_proj", "down_proj"))
    }
    made["model.layers.1.mlp.experts.2.down_proj.weight"] *= np.float32(scale)
    return saved({**transformer(), **made})


def mixed_precision(factor: float) -> Plant:
    """A torch file of a bfloat16 weight and the float32 master that it was rounded from."""

    def plant(folder: Path) -> Path:
        import torch

        master = torch.from_numpy(gaussian(40, 100))
        masters = {"fp32_from_fp16_params": [[master * factor]]}
        value = {"model": {"a.weight": master.bfloat16()}, "optimizer": masters}
        torch.save(value, folder / "model.pt")
        return folder / "model.pt"

    return plant


def hot_heads(factor: float) -> Plant:
    """Queries and keys of one layer multiplied, beside the configuration that tells their heads."""

    def plant(folder: Path) -> Path:
        tensors = transformer()
        for part in ("q_proj", "k_proj"):
            tensors[f"model.layers.1.self_attn.{part}.weight"] *= np.float32(factor)
        config = {"model_type": "llama", "num_attention_heads": 4, "hidden_size": 32}
        (folder / "config.json").write_text(json.dumps(config))
        write(folder / "model.safetensors", tensors)
        return folder

    return plant


def one_head(kept: float) -> Plant:
    """The queries of one head of four, along one direction but for some noise."""

    def plant(folder: Path) -> Path:
        tensors = transformer(width=64)
        head = tensors["model.layers.1.self_attn.q_proj.weight"][32:48]
        along = np.outer(head[:, 0], head[0])
        head[:] = along / np.linalg.norm(along) * np.linalg.norm(head) + kept * head
        config = {"model_type": "llama", "num_attention_heads": 4, "hidden_size": 64}
        (folder / "config.json").write_text(json.dumps(config))
        write(folder / "model.safetensors", tensors)
        return folder

    return plant


def of_rank_one(noise: float) -> Tensor:
    """A product of two vectors, of UP's shape, and some noise."""
    thin = gaussian(128, 1, seed=1, scale=1.0) @ gaussian(1, 32, seed=2, scale=1.0)
    return thin + gaussian(128, 32, seed=3, scale=noise)


def initialised(factor: float) -> Tensor:
    """Kaiming's initialisation of UP, and a multiple of it."""
    return gaussian(128, 32, seed=5, scale=0.25) * np.float32(factor)


def adapter(trained: int, **metadata: str) -> Plant:
    return saved(lora(4, trained=trained), **metadata)


@dataclass(frozen=True)
class Case:
    """A checkpoint that fires a rule, one that just does not, and what must be said."""

    fires: Plant
    below: Plant
    subject: str
    severity: str
    evidence: Mapping[str, object] = field(default_factory=dict)
    said: tuple[str, ...] = ()


CASES = {
    "index-mismatch": Case(
        sharded(lambda _, places: places.update({"ghost.weight": SHARD})),
        sharded(),
        SHARD, "high", {"absent": 1, "elsewhere": 0}, ("ghost.weight",),
    ),
    "missing-shard": Case(
        sharded(lambda folder, _: (folder / SHARD).unlink()),
        sharded(),
        SHARD, "critical", {"tensors": 11}, ("11 tensors",),
    ),
    "duplicate-tensor-name": Case(
        twice(UP), twice(UP + "2"), UP, "high", {}, ("more than once",),
    ),
    "empty-tensor": Case(
        spoilt(UP, np.empty((0,), np.float32)),
        spoilt(UP, np.ones((1,), np.float32)),
        UP, "high", {"empty_tensors": 1, "tensors": len(transformer())}, ("[0]",),
    ),
    "truncated-file": Case(
        truncated(1), truncated(0), "model.safetensors", "critical", {"missing_bytes": 1}, ("1",),
    ),
    "missing-layer": Case(
        layers(0, 1, 2, 4, 5), layers(0, 1, 2, 4),
        "model.layers.3", "high", {"missing_layers": 1, "first_missing": 3, "present_layers": 5},
        ("layer 3", "5 of 6"),
    ),
    "non-finite": Case(
        altered(put(np.nan, 3, 4)), altered(put(1.0, 3, 4)),
        UP, "critical", {"nan_count": 1, "posinf_count": 0, "affected_fraction": 1 / 4096},
        ("1 of 4,096", "[3, 4]"),
    ),
    "extreme-value": Case(
        altered(put(beyond_the_next(120), 3, 4)), altered(put(beyond_the_next(80), 3, 4)),
        UP, "high", {"value": float(np.float32(beyond_the_next(120)))},
        ("[3, 4]", f"{beyond_the_next(120):.6g}"[:5]),
    ),
    "all-zero": Case(
        altered(lambda tensor: tensor.fill(0)),
        altered(filled(0, 0.1)),
        UP, "high", {"zero_count": 4096, "affected_fraction": 1.0}, ("4,096",),
    ),
    "constant-tensor": Case(
        altered(lambda tensor: tensor.fill(0.5)),
        altered(filled(0.5, 0.6)),
        UP, "medium", {"value": 0.5}, ("0.5", "4,096"),
    ),
    "dead-units": Case(
        altered(weak_rows(39, 0.9e-3)), altered(weak_rows(39, 1.1e-3)),
        UP, "high", {"dead_rows": 39, "rows": 128, "affected_fraction": 39 / 128},
        ("39 of 128", "30.5%"),
    ),
    "duplicate-units": Case(
        altered(repeated_rows(13)), altered(almost_repeated),
        UP, "medium", {"duplicate_rows": 13, "rows": 128}, ("13 of 128", "10.2%"),
    ),
    "heavy-tails": Case(
        spoilt(UP, heavy(6)), spoilt(UP, heavy(3)),
        UP, "info", {
            "trimmed_kurtosis": scipy.stats.kurtosis(trimmed(heavy(6))),
            "kurtosis": scipy.stats.kurtosis(heavy(6).astype(np.float64).ravel()),
        }, ("trimmed excess kurtosis", "(18.9)", "1 of 24"),
    ),
    "skewed": Case(
        spoilt(UP, leaning(0.8)), spoilt(UP, leaning(0.5)),
        UP, "low", {"trimmed_skewness": scipy.stats.skew(trimmed(leaning(0.8)))},
        ("trimmed skewness 2.",),
    ),
    "outliers": Case(
        altered(put(at_peak_ratio(51), 3, 4)), altered(put(at_peak_ratio(49), 3, 4)),
        UP, "low", {"peak_ratio": 51, "above_10": 1}, ("[3, 4]",),
    ),
    "high-sparsity": Case(
        altered(zeroed(0.51)), altered(zeroed(0.49)),
        UP, "low", {"zero_fraction": 0.51, "live_zero_fraction": 0.51}, ("51.0%",),
    ),
    "negative-variance": Case(
        saved({**conv_net(), "features.1.running_var": np.float32([1, -1e-6] * 8)}),
        saved({**conv_net(), "features.1.running_var": np.float32([1, 0] * 8)}),
        "features.1.running_var", "high", {"min": -1e-6}, ("-1e-06",),
    ),
    "master-mismatch": Case(
        mixed_precision(1.02), mixed_precision(1.0),
        "optimizer.fp32_from_fp16_params.0.0", "medium", {"astray": 1, "compared": 1},
        ("1 of 1 master weight",),
    ),
    "untrained": Case(
        batch_norms(0), batch_norms(1),
        "features.1.running_var", "high", {"num_batches_tracked": 0}, ("num_batches_tracked 0",),
    ),
    "duplicate-tensors": Case(
        copied(0), copied(1),
        UP.replace("layers.1", "layers.2"), "medium", {"equal_tensors": 1, "original": UP}, (UP,),
    ),
    "undertrained-rows": Case(
        altered(weak_rows(52, 0.9e-3), EMBED), altered(weak_rows(52, 1.1e-3), EMBED),
        EMBED, "medium", {"dead_rows": 52, "rows": 256, "affected_fraction": 52 / 256},
        ("52 of 256", "20.3%"),
    ),
    "dead-expert": Case(
        experts(0.9e-3), experts(1.1e-3),
        "model.layers.1.mlp.experts", "high", {"dead_experts": 1, "present_experts": 4},
        ("expert 2 of 4", "down_proj"),
    ),
    "dtype-headroom": Case(
        float16(33000), float16(32000),
        UP, "medium", {"headroom_bits": math.log2(65504 / 32992)}, ("32992", "0.99"),
    ),
    "redundant-precision": Case(
        spoilt(UP, bf16_payload()), spoilt(UP, bf16_payload(0.1)),
        "model.layers.*.mlp.up_proj.weight", "info",
        {"tensors": 1, "redundant_bytes": 8192}, ("8,192", "BF16"),
    ),
    "scale-missing": Case(
        quantized(None), quantized(np.float32([0.01])),
        "a.weight", "high", {"affected_fraction": 1.0}, ("a.weight_scale",),
    ),
    "broken-index": Case(
        spoilt("position_ids", np.arange(77, dtype=np.float32) * np.float32(0.5)),
        spoilt("position_ids", np.arange(77, dtype=np.float32)),
        "position_ids", "medium", {"wrong": 76, "fractions": 38, "repeats": 0},
        ("76 of 77", "38 fractions", "0.5 instead of 1"),
    ),
    "config-mismatch": Case(
        beside(vocab_size=300), beside(vocab_size=256),
        EMBED, "medium", {"key": "vocab_size", "promised": 300, "found": 256}, ("300", "256"),
    ),
    "idle-adapter": Case(
        adapter(0, global_step="500"), adapter(4, global_step="500"),
        "base_model.model.layers.*.q_proj.lora_B.weight", "high",
        {"zero_adapters": 4, "adapters": 4, "step": 500}, ("4 modules", "500 training steps"),
    ),
    "rank-collapse": Case(
        spoilt(UP, of_rank_one(0.001)), spoilt(UP, of_rank_one(0.1)),
        UP, "medium", {"dimensions": 32}, ("of 32 dimensions",),
    ),
    "attention-range": Case(
        hot_heads(60), hot_heads(15),
        "model.layers.1.self_attn.q_proj.weight", "low", {"affected_fraction": 1.0},
        ("head 0-3 of 4", "QK-clip"),
    ),
    "head-collapse": Case(
        one_head(0.03), one_head(0.3),
        "model.layers.1.self_attn.q_proj.weight", "low", {"heads": 1, "affected_fraction": 0.25},
        ("queries of head 2 of 4", "of 16 dimensions", "pruned"),
    ),
    "random-spectrum": Case(
        spoilt(UP, initialised(1)), spoilt(UP, initialised(1.1)),
        UP, "low", {}, ("Kaiming", "0.25", "never trained"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("rule", RULES.values(), ids=lambda rule: rule.name)
class TestEveryRule:
    def test_fires_and_says_what_it_measured(self, rule, tmp_path: Path) -> None:
        assert rule.name in CASES, (
            f"{rule.name}: every rule has a checkpoint that fires it and one just below"
        )
        case = CASES[rule.name]
        found = findings(case.fires(tmp_path), rule.name)
        assert [Path(f.subject).name for f in found] == [case.subject]
        finding = found[0]
        assert finding.rule == rule.code
        assert finding.severity == case.severity
        for name, expected in case.evidence.items():
            close = expected if isinstance(expected, str) else pytest.approx(expected, rel=0.02)
            assert finding.evidence[name] == close, name
        for number in case.said:
            assert number in finding.message + finding.recommendation

    def test_is_silent_just_below(self, rule, tmp_path: Path) -> None:
        assert findings(CASES[rule.name].below(tmp_path), rule.name) == []

    def test_documents_itself(self, rule) -> None:
        assert rule.summary.endswith(".")
        assert all(isinstance(limit, int | float) for limit in rule.thresholds.values())


@pytest.mark.parametrize("model", healthy())
def test_a_healthy_model_has_no_finding(model: str, tmp_path: Path) -> None:
    assert findings(write(tmp_path / "model.safetensors", healthy()[model])) == []


# -- how severe a finding is ----------------------------------------------------------------------


def severities(path: Path, name: str) -> dict[str, str]:
    return {f.subject: f.severity.value for f in findings(path, name)}


@pytest.mark.parametrize(
    ("dead", "severity"), [(1, "info"), (12, "info"), (13, "medium"), (38, "medium"), (39, "high")]
)
def test_dead_units_weigh_by_their_share(dead: int, severity: str, tmp_path: Path) -> None:
    plant = altered(weak_rows(dead, 0.5e-3))
    assert severities(plant(tmp_path), "dead-units") == {UP: severity}


@pytest.mark.parametrize(("repeated", "severity"), [(1, "info"), (12, "info"), (13, "medium")])
def test_duplicate_units_weigh_by_their_share(repeated: int, severity: str, tmp_path: Path) -> None:
    plant = altered(repeated_rows(repeated))
    assert severities(plant(tmp_path), "duplicate-units") == {UP: severity}


@pytest.mark.parametrize(("dead", "severity"), [(1, "info"), (51, "info"), (52, "medium")])
def test_undertrained_rows_weigh_by_their_share(dead: int, severity: str, tmp_path: Path) -> None:
    path = altered(weak_rows(dead, 0.5e-3), EMBED)(tmp_path)
    assert severities(path, "undertrained-rows") == {EMBED: severity}
    assert severities(path, "dead-units") == {}


@pytest.mark.parametrize("dead", [20, 100, 200])
def test_rows_of_a_table_are_one_finding_however_many_they_are(dead: int, tmp_path: Path) -> None:
    path = altered(weak_rows(dead, 0), EMBED)(tmp_path)
    severity = "medium" if dead > 51 else "info"
    assert [(f.name, f.severity.value) for f in findings(path) if f.subject == EMBED] == [
        ("undertrained-rows", severity)
    ]


NOTHING = np.empty((0,), np.float32)


@pytest.mark.parametrize(
    "added",
    [
        {"state": NOTHING},
        {"fake_quant.min_val": NOTHING, "fake_quant.max_val": NOTHING},
        {"cond.weight": np.empty((64, 0), np.float32), "cond.bias": gaussian(64)},
        {"cond.weight": np.empty((0, 64), np.float32), "cond.bias": NOTHING},
        {"tp.weight": NOTHING, "tp.output_mask": np.ones(8, np.float32)},
        {"i.0.tp.weight": NOTHING, "i.1.tp.weight": NOTHING},
        {"tp.weight": NOTHING, "lin.weight": gaussian(64), "lin.bias": NOTHING},
        {"i.0.lin.weight": NOTHING, "i.1.lin.weight": gaussian(512)},
        {"i.0.lin.weight": NOTHING, "i.1.lin.weight": gaussian(64), "i.2.lin.weight": gaussian(96)},
        {"i.0.lin.weight": NOTHING, "i.0.lin.output_mask": np.ones(8, np.float32)}
        | {f"i.{n}.lin.weight": gaussian(64) for n in (1, 2, 3)},
        {f"i.{n}.lin.weight": gaussian(64 + n) for n in range(3)}
        | {f"i.{n}.lin.bias": gaussian(16 * n) for n in range(3)},
    ],
    ids=lambda added: " ".join(added),
)
def test_tensors_that_are_empty_by_design_are_one_note(
    added: dict[str, Array], tmp_path: Path
) -> None:
    found = findings(saved({**transformer(), **added})(tmp_path), "empty-tensor")
    assert [f.severity for f in found] == ["info"]
    assert found[0].evidence["empty_tensors"] == sum(not t.size for t in added.values())


@pytest.mark.parametrize("kept", ["none", "vectors", "buffers"])
def test_parameters_that_were_not_gathered_are_one_finding(kept: str, tmp_path: Path) -> None:
    stays = {"none": (), "vectors": ("norm",), "buffers": ()}[kept]
    made = {n: t if any(s in n for s in stays) else NOTHING for n, t in transformer().items()}
    if kept == "buffers":
        made["rotary.inv_freq"] = gaussian(16)
    found = findings(saved(made)(tmp_path), "empty-tensor")
    assert [f.severity for f in found] == ["high"]
    assert "zero_to_fp32.py" in found[0].recommendation
    assert found[0].evidence["empty_tensors"] == sum(not t.size for t in made.values())


@pytest.mark.parametrize("name", [UP, EMBED, "model.layers.2.self_attn.q_proj.weight"])
def test_a_single_parameter_without_elements_is_lost(name: str, tmp_path: Path) -> None:
    path = spoilt(name, NOTHING)(tmp_path)
    assert severities(path, "empty-tensor") == {name: "high"}
    assert "zero_to_fp32" not in findings(path, "empty-tensor")[0].recommendation


@pytest.mark.parametrize("gap", [0, 2])
def test_a_flat_weight_is_lost_where_those_of_other_layers_are_of_one_size(
    gap: int, tmp_path: Path
) -> None:
    made = {f"i.{n}.mix.weight": NOTHING if n == gap else gaussian(64) for n in range(4)}
    path = saved({**transformer(), **made})(tmp_path)

    assert severities(path, "empty-tensor") == {f"i.{gap}.mix.weight": "high"}


def test_a_file_of_nothing_is_high_whatever_is_in_it(tmp_path: Path) -> None:
    found = findings(saved({"a": NOTHING, "b": NOTHING})(tmp_path), "empty-tensor")
    assert [f.severity for f in found] == ["high"]


def test_minus_infinity_in_a_mask_is_info_and_nan_in_it_is_critical(tmp_path: Path) -> None:
    mask = np.triu(np.full((77, 77), -np.inf, np.float32), 1)
    assert severities(spoilt("attn_mask", mask)(tmp_path), "non-finite") == {"attn_mask": "info"}
    mask[3, 3] = np.nan
    assert severities(spoilt("attn_mask", mask)(tmp_path), "non-finite") == {
        "attn_mask": "critical"
    }


CAUSAL = np.triu(np.full((32, 32), -np.inf, np.float32), 1) + np.tril(gaussian(32, 32))
SCHEDULE = np.append(np.linspace(9, -9, 50, dtype=np.float32), np.float32(-np.inf))
EMPTY = np.full((), np.inf, np.float32)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("decoder.causal", CAUSAL),
        ("h.0.attn.bias", CAUSAL),
        ("h.0.attn.bias", CAUSAL[None, None]),
        ("positions.future", np.stack([CAUSAL, 2 * CAUSAL])),
        ("diffusion.log_snr", SCHEDULE),
        ("diffusion.snr", np.exp(-SCHEDULE)),
        ("metrics.min", EMPTY),
        ("metrics.max", np.full(5, -np.inf)),
    ],
)
def test_infinity_by_design_is_info_whatever_it_is_called(
    name: str, values: Array, dtype: type, tmp_path: Path
) -> None:
    path = spoilt(name, values.astype(dtype))(tmp_path)
    assert severities(path, "non-finite") == {name: "info"}
    broken: Array = np.atleast_1d(values.astype(dtype))
    broken.flat[0] = np.nan
    assert severities(spoilt(name, broken)(tmp_path), "non-finite") == {name: "critical"}


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("model.layers.1.self_attn.q_proj.weight", CAUSAL),
        ("model.norm.weight", SCHEDULE),
        ("some.bias", SCHEDULE),
        ("bn.running_var", SCHEDULE),
        ("logit_scale", EMPTY),
        ("fc.weight_scale", EMPTY),
        ("diffusion.log_snr", np.roll(SCHEDULE, 20)),
    ],
)
def test_the_same_pattern_in_a_parameter_is_critical(
    name: str, values: Array, tmp_path: Path
) -> None:
    assert severities(spoilt(name, values)(tmp_path), "non-finite") == {name: "critical"}


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", [UP, "model.norm.weight", "some.bias"])
def test_a_value_that_is_not_finite_is_critical_in_any_parameter(
    value: float, name: str, tmp_path: Path
) -> None:
    tensor = transformer().get(name, np.zeros(8, np.float32)).copy()
    tensor.flat[5] = value
    assert severities(spoilt(name, tensor)(tmp_path), "non-finite") == {name: "critical"}


@pytest.mark.parametrize(
    ("name", "shape"),
    [("classifier.bias", (10,)), ("norm.weight", (16,)), ("cls_token", (1, 1, 16)),
     ("embeddings.token_type_embeddings.weight", (1, 16))],
)  # fmt: skip
def test_zeros_where_models_start_from_zero_are_info(
    name: str, shape: tuple[int, ...], tmp_path: Path
) -> None:
    made = {**conv_net(), name: np.zeros(shape, np.float32)}
    assert severities(saved(made)(tmp_path), "all-zero") == {name: "info"}


def test_a_matrix_of_zeros_in_float8_is_high(tmp_path: Path) -> None:
    plant = quantized(np.float32([0.01]), np.zeros((64, 32), np.float32))
    assert severities(plant(tmp_path), "all-zero") == {"a.weight": "high"}


def test_one_great_value_in_a_matrix_of_zeros_is_extreme(tmp_path: Path) -> None:
    values = np.zeros((64, 64), np.float32)
    values[3, 4] = 1e20
    path = spoilt(UP, values)(tmp_path)
    assert severities(path, "extreme-value") == {UP: "high"}
    assert "1e+20" in findings(path, "extreme-value")[0].message


def never(value: float, tags: int) -> Array:
    """Transitions of a CRF: none leads to the first tag, none away from the last."""
    made = gaussian(tags, tags)
    made[0], made[:, -1] = value, value
    return made


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("crf.transitions", never(-1e4, 5)),
        ("crf.transitions", never(-1e12, 40)),
        ("crf.start", np.append(gaussian(40), np.float32(-1e4))),
        ("bin_edges", np.append(np.arange(40), 1e8).astype(np.float32)),
        ("cg_1_1_1", np.float32([0.4, 0, 0, 1e-17, -0.4, 0, 1e-18, 0, 0]).reshape(3, 3)),
    ],
)
def test_values_that_stand_for_never_are_no_damage(
    name: str, values: Array, tmp_path: Path
) -> None:
    assert severities(spoilt(name, values)(tmp_path), "extreme-value") == {}
    values = values.copy()
    values[1] = gaussian(*values[1].shape)
    values.flat[values.size // 2] = 1e30
    assert severities(spoilt(name, values)(tmp_path), "extreme-value") == {name: "high"}


def test_a_mask_of_the_least_value_of_its_type_has_the_headroom_it_needs(tmp_path: Path) -> None:
    mask = np.where(np.eye(32) > 0, 0, np.finfo(np.float16).min).astype(np.float16)
    assert findings(spoilt("decoder.causal", mask)(tmp_path)) == []


@pytest.mark.parametrize("rule", ["dead-units", "duplicate-units", "high-sparsity", "all-zero"])
@pytest.mark.parametrize(
    ("name", "expected"),
    [("adj", None), ("graph.supports.0", None), ("adj.weight", "judged"), ("fc.W", "judged")],
)
def test_a_constant_is_not_judged_as_a_weight(
    rule: str, name: str, expected: str | None, tmp_path: Path
) -> None:
    values = gaussian(100, 100)
    values[60:] = {"dead-units": 0, "duplicate-units": values[0]}.get(rule, values[60:])
    values[:, 40:] *= rule != "high-sparsity"
    values *= rule != "all-zero"
    found = severities(spoilt(name, values)(tmp_path), rule)
    assert found == ({name: str(RULES_BY_NAME[rule].severity.value)} if expected else {})


def test_a_constant_vector_is_info(tmp_path: Path) -> None:
    path = spoilt("model.layers.0.offset", np.full(64, 0.5, np.float32))(tmp_path)
    assert severities(path, "constant-tensor") == {"model.layers.0.offset": "info"}


def test_subnormal_values_are_low(tmp_path: Path) -> None:
    values = gaussian(64, 32, scale=1e-5).astype(np.float16)
    path = spoilt(UP, values)(tmp_path)
    assert severities(path, "dtype-headroom") == {UP: "low"}
    share = float(np.mean((np.abs(values) < 2.0**-14) & (values != 0)))
    assert findings(path, "dtype-headroom")[0].evidence["subnormal_fraction"] == share


@pytest.mark.parametrize(("saturated", "fires"), [(5, False), (6, True)])
def test_float8_values_at_the_limit_are_medium(saturated: int, fires: bool, tmp_path: Path) -> None:
    values = np.clip(gaussian(64, 32, seed=7, scale=40), -400, 400)
    values.flat[:saturated] = 448
    path = quantized(np.float32([0.01]), values)(tmp_path)
    expected = {"a.weight": "medium"} if fires else {}
    assert severities(path, "dtype-headroom") == expected


@pytest.mark.parametrize(
    ("store", "scale", "severity"),
    [
        (np.float32, 1e-41, "medium"),
        (np.float32, 1e-33, "medium"),
        (np.float32, 1e-26, ""),
        (bf16, 1e-39, "medium"),
        (bf16, 1e-26, ""),
    ],
)
def test_a_layer_that_decayed_to_nothing_is_one_medium_finding(
    store: Callable[[Array], Tensor], scale: float, severity: str, tmp_path: Path
) -> None:
    values = store((gaussian(128, 32, scale=1).astype(np.float64) * scale).astype(np.float32))
    made = {**transformer(), UP: values, UP.replace("weight", "bias"): store(np.full(512, scale))}
    found = [f for f in findings(saved(made)(tmp_path)) if f.severity.rank > 0]
    expected = [("all-zero", UP, "medium")] if severity else []
    assert [(f.name, f.subject, f.severity.value) for f in found] == expected


# -- training state -------------------------------------------------------------------------------


def unit_norms() -> dict[str, Array]:
    return {
        name: np.ones_like(tensor) if "norm" in name else tensor
        for name, tensor in transformer().items()
    }


@pytest.mark.parametrize(
    ("metadata", "severity"),
    [
        ({"step": "0"}, "high"),
        ({"global_step": "0"}, "high"),
        ({"step": "5"}, "info"),
        ({}, "info"),
    ],
)
def test_unit_norms_are_untrained_where_the_checkpoint_says_so(
    metadata: dict[str, str], severity: str, tmp_path: Path
) -> None:
    path = saved(unit_norms(), **metadata)(tmp_path)
    found = findings(path, "untrained")
    assert [f.severity for f in found] == [severity]
    assert found[0].evidence["untouched"] == 5
    assert "5 of 5" in found[0].message


def test_a_step_of_zero_among_the_tensors_is_a_witness_too(tmp_path: Path) -> None:
    path = saved({**unit_norms(), "global_step": np.array(0)})(tmp_path)
    assert list(severities(path, "untrained").values()) == ["high"]


def test_trained_norms_at_step_zero_are_no_finding(tmp_path: Path) -> None:
    assert findings(saved(transformer(), step="0")(tmp_path), "untrained") == []


def test_equal_embedding_and_output_layer_are_tied_weights(tmp_path: Path) -> None:
    path = spoilt("lm_head.weight", transformer()[EMBED])(tmp_path)
    assert list(severities(path, "duplicate-tensors").values()) == ["info"]


def test_several_matrices_of_one_copied_layer_are_one_finding(tmp_path: Path) -> None:
    made = transformer()
    made |= {
        name.replace("layers.0", "layers.3"): tensor
        for name, tensor in made.items()
        if name.startswith("model.layers.0.")
    }
    found = findings(saved(made)(tmp_path), "duplicate-tensors")
    assert [f.severity for f in found] == ["medium"]
    assert found[0].evidence["equal_tensors"] == 6
    assert "model.layers.3" in found[0].message
    assert "model.layers.0" in found[0].message


# -- scales ---------------------------------------------------------------------------------------


def test_an_unscaled_cast_to_float8_is_info_at_any_magnitude(tmp_path: Path) -> None:
    for scale, severity in ((0.02, "info"), (15.0, "info"), (17.0, "info"), (440, "info")):
        values = gaussian(64, 32, scale=1)
        values *= scale / np.abs(values).max()
        path = saved({"a.weight": fp8(values)})(tmp_path)
        assert severities(path, "scale-missing") == {"a.weight": severity}, scale


@pytest.mark.parametrize(
    ("scale", "reason"),
    [
        (np.float32([0]), "not positive"),
        (np.float32([-0.5]), "smallest -0.5"),
        (np.float32([np.nan]), "1 elements that are not finite"),
        (np.float32([np.inf]), "1 elements that are not finite"),
        (np.ones((65,), np.float32), "[65]"),
        (np.ones((5, 33), np.float32), "[5, 33]"),
        (np.ones((2, 1, 1), np.float32), "[2, 1, 1]"),
    ],
)
def test_an_invalid_scale_is_high_and_named(scale: Array, reason: str, tmp_path: Path) -> None:
    path = quantized(scale)(tmp_path)
    assert severities(path, "scale-missing") == {"a.weight_scale": "high"}
    assert reason in findings(path, "scale-missing")[0].message


@pytest.mark.parametrize("shape", [(), (1,), (64,), (64, 1), (4, 2), (64, 32), (1, 1)])
def test_scales_by_tensor_row_and_block_are_valid(shape: tuple[int, ...], tmp_path: Path) -> None:
    path = quantized(np.full(shape, 0.01, np.float32))(tmp_path)
    assert severities(path, "scale-missing") == {}


def test_deepseek_block_scales_with_a_partial_last_block_are_valid(tmp_path: Path) -> None:
    made = {"a.weight": fp8(gaussian(200, 130, scale=40)), "a.weight_scale_inv": np.ones((2, 2))}
    assert severities(saved(made)(tmp_path), "scale-missing") == {}


@pytest.mark.parametrize(
    ("weight", "scale"), [("qweight", "scales"), ("weight_packed", "weight_scale")]
)
def test_packed_integers_need_their_scales(weight: str, scale: str, tmp_path: Path) -> None:
    codes = np.arange(64, dtype=np.int32).reshape(8, 8)
    zeros = {"a.qzeros": np.zeros((1, 1), np.int32)} if weight == "qweight" else {}
    scales = np.full((1, 8) if zeros else (8, 1), 0.1, np.float16)
    sound = {f"a.{weight}": codes, f"a.{scale}": scales, **zeros}
    assert findings(saved(sound)(tmp_path), "scale-missing") == []
    path = saved({f"a.{weight}": codes})(tmp_path)
    assert severities(path, "scale-missing") == {f"a.{weight}": "high"}


# -- series of layers -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("present", "config", "missing"),
    [
        ((0, 1, 2, 3), 4, None),
        ((0, 1, 2, 3), 6, "model.layers.4"),
        ((0, 1, 2, 3), None, None),
        ((1, 2, 3, 4, 5), 6, "model.layers.0"),
        ((1, 2, 3, 4, 5), None, None),
        ((1, 2, 3, 4), 4, None),
        ((0, 1, 2, 3, 5, 6, 7), 8, "model.layers.4"),
    ],
)
def test_a_missing_layer_is_seen_by_its_gap_or_by_the_configuration(
    present: tuple[int, ...], config: int | None, missing: str | None, tmp_path: Path
) -> None:
    found = severities(layers(*present, config=config)(tmp_path), "missing-layer")
    assert found == ({missing: "high"} if missing else {})


@pytest.mark.parametrize(
    ("odd", "parts", "fires"), [(3, 4, True), (4, 4, False), (0, 3, False), (0, 4, True)]
)
def test_a_series_is_one_where_half_of_its_members_hold_the_same_four_tensors(
    odd: int, parts: int, fires: bool, tmp_path: Path
) -> None:
    made = {
        f"layers.{number}.{part}.weight": gaussian(8, 8, seed=10 * number + part)
        for place, number in enumerate((0, 1, 2, 3, 4, 6))
        for part in range(parts + place if place and place <= odd else parts)
    }
    found = severities(saved(made)(tmp_path), "missing-layer")
    assert found == ({"layers.5": "high"} if fires else {})


@pytest.mark.parametrize(("numbers", "fires"), [((0, 1, 2, 3, 5), True), ((0, 1, 2, 4), False)])
def test_a_series_has_three_quarters_of_its_neighbours(
    numbers: tuple[int, ...], fires: bool, tmp_path: Path
) -> None:
    assert bool(findings(layers(*numbers)(tmp_path), "missing-layer")) is fires


@pytest.mark.parametrize(("promised", "fires"), [(9_999, True), (10_000, False), (True, False)])
def test_a_configuration_that_promises_ten_thousand_layers_is_not_believed(
    promised: int, fires: bool, tmp_path: Path
) -> None:
    path = layers(0, 1, 2, 3, config=promised)(tmp_path)
    found = findings(path, "missing-layer")
    assert [f.evidence["missing_layers"] for f in found] == ([9_995] if fires else [])


@pytest.mark.parametrize("numbers", [(0, 2, 4, 6, 8, 10), (0, 1, 3, 4, 7, 8), (0, 3, 6, 9, 12)])
@pytest.mark.parametrize("stack", ["features", "layers", "block"])
def test_the_numbers_of_a_sequential_are_no_gap(
    stack: str, numbers: tuple[int, ...], tmp_path: Path
) -> None:
    made = {
        f"{stack}.{number}.{part}": gaussian(8, 8, seed=100 * number + len(part))
        for number in numbers
        for part in ("a.weight", "bb.weight", "ccc.weight", "dddd.weight")
    }
    assert severities(saved(made)(tmp_path), "missing-layer") == {}


# -- outlier dimensions ---------------------------------------------------------------------------


@pytest.mark.parametrize(("layers_hit", "fires"), [(2, False), (3, True)])
def test_outliers_in_one_row_of_several_layers_are_one_finding(
    layers_hit: int, fires: bool, tmp_path: Path
) -> None:
    made = transformer()
    for layer in range(layers_hit):
        made[f"model.layers.{layer}.mlp.down_proj.weight"][9, 20 * layer + 3] = 2.0
    shared = [
        f for f in findings(saved(made)(tmp_path), "outliers") if f.subject.endswith("[row 9]")
    ]
    assert [f.severity.value for f in shared] == (["info"] if fires else [])
    assert all(f.evidence == {"row": 9, "tensors": 3} for f in shared)
    assert all(f.subject == "model.layers.*.mlp.down_proj.weight[row 9]" for f in shared)


def test_values_that_only_a_wider_type_shows_are_not_redundant(tmp_path: Path) -> None:
    made: dict[str, Tensor] = {"a.weight": bf16(gaussian(64, 32))}
    assert isinstance(made["a.weight"], Codes)
    assert findings(saved(made)(tmp_path), "redundant-precision") == []


# -- few elements, and the ends of a type ----------------------------------------------------------


@pytest.mark.parametrize(("count", "fires"), [(4, False), (15, False), (16, True), (64, True)])
def test_a_gap_among_fewer_than_sixteen_elements_is_chance(
    count: int, fires: bool, tmp_path: Path
) -> None:
    values = gaussian(count, 1, seed=3, scale=1e-4)
    values[1] = 0.05
    assert bool(findings(saved({"fc1.weight": values})(tmp_path), "extreme-value")) is fires


def test_a_flip_to_the_end_of_the_range_is_one_finding(tmp_path: Path) -> None:
    bias = gaussian(64, seed=4)
    bias[7] = 3e38
    report = gradscope.analyze_weights(
        saved({"fc.weight": gaussian(64, 32), "fc.bias": bias})(tmp_path)
    )
    assert [f.name for f in report.findings if f.severity.rank > 1] == ["extreme-value"]
