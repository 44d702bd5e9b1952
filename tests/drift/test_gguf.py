"""Conversions to GGUF and back: names, permuted rows, types, noise. Files are llama.cpp's own."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from pairs import State, drawn, found, only, written

import gradscope
from gradscope.drift.result import DriftReport

gguf = pytest.importorskip("gguf", reason="needs the extra `gguf`")

WIDTH, HEADS, LAYERS = 256, 4, 2


def hugging_face() -> State:
    """A small Llama under the names of transformers."""

    def weight(rows: int, columns: int, seed: int) -> torch.Tensor:
        return drawn(rows, columns, seed=seed) * columns**-0.5

    state = {"model.embed_tokens.weight": weight(96, WIDTH, 1),
             "model.norm.weight": 1 + 0.1 * drawn(WIDTH, seed=2)}  # fmt: skip
    for n in range(LAYERS):
        at = f"model.layers.{n}"
        for k, name in enumerate(("q_proj", "k_proj", "v_proj", "o_proj")):
            state[f"{at}.self_attn.{name}.weight"] = weight(WIDTH, WIDTH, 10 * n + k)
        state[f"{at}.mlp.up_proj.weight"] = weight(2 * WIDTH, WIDTH, 10 * n + 5)
        state[f"{at}.mlp.down_proj.weight"] = weight(WIDTH, 2 * WIDTH, 10 * n + 6)
        for k, name in enumerate(("input_layernorm", "post_attention_layernorm")):
            state[f"{at}.{name}.weight"] = 1 + 0.1 * drawn(WIDTH, seed=10 * n + 7 + k)
    return state


EXPERTS = 3


def experts() -> State:
    """The same with experts in place of one multilayer perceptron, as Mixtral has them."""
    state = {n: t for n, t in hugging_face().items() if "mlp" not in n}
    for n in range(LAYERS):
        at = f"model.layers.{n}.block_sparse_moe"
        state[f"{at}.gate.weight"] = drawn(EXPERTS, WIDTH, seed=n)
        for e in range(EXPERTS):
            seed = 100 * n + 10 * e
            state[f"{at}.experts.{e}.w1.weight"] = drawn(2 * WIDTH, WIDTH, seed=seed) / 16
            state[f"{at}.experts.{e}.w2.weight"] = drawn(WIDTH, 2 * WIDTH, seed=seed + 1) / 16
    return state


def stacks(state: State) -> State:
    """Experts as llama.cpp's converter stacks them."""
    names = dict.fromkeys(re.sub(r"experts\.\d+", "experts", n) for n in state)
    return {
        name: torch.stack([state[name.replace("experts", f"experts.{e}")] for e in range(EXPERTS)])
        if "experts" in name
        else state[name]
        for name in names
    }


def permuted(w: torch.Tensor) -> torch.Tensor:
    """Rows as llama.cpp's converter lays them (LlamaModel.permute)."""
    return w.reshape(HEADS, 2, len(w) // HEADS // 2, *w.shape[1:]).swapaxes(1, 2).reshape(w.shape)


def converted(
    path: Path,
    state: State,
    kind: str = "F16",
    *,
    permute: bool = True,
    gain: float = 0.0,
    split: int = 0,
) -> str:
    """What convert_hf_to_gguf.py writes of a state, in files of ``split`` tensors."""
    writer = gguf.GGUFWriter(path, "llama", split_max_tensors=split)
    writer.add_block_count(LAYERS)
    writer.add_head_count(HEADS)
    writer.add_token_list(["<s>", "a", "b"])
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, LAYERS)
    for name, t in state.items():
        t = permuted(t) if permute and ("q_proj" in name or "k_proj" in name) else t
        t = t + gain if t.ndim == 1 else t
        qtype = gguf.GGMLQuantizationType[kind if t.ndim > 1 else "F32"]
        data: Any = gguf.quants.quantize(t.numpy(), qtype)
        writer.add_tensor(names.get_name(name, (".weight",)), data, raw_dtype=qtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return str(path)


def compared(folder: Path, kind: str = "F16", **options: Any) -> DriftReport:
    base = written(folder / "model.safetensors", hugging_face())
    new = converted(folder / "model.gguf", hugging_face(), kind)
    return gradscope.analyze_drift(base, new, **options)


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16"])
def test_a_conversion_is_one_and_says_how(tmp_path: Path, kind: str) -> None:
    report = compared(tmp_path, kind, expect="converted")

    assert found(report) == {}
    assert report.gate.exit_code == 0
    assert report.result is not None
    assert len(report.result.tensors) == len(hugging_face())
    told = only(report, "blk.1.attn_q.weight")
    assert told.base_name == "model.layers.1.self_attn.q_proj.weight"
    assert told.explanation is not None
    assert f"heads of {WIDTH // HEADS}: the halves of rotary" in told.explanation.text
    same = "identical" if kind == "F32" else "rounding"
    assert only(report, "blk.1.attn_v.weight").status == same


def test_the_way_back_is_a_conversion(tmp_path: Path) -> None:
    base = converted(tmp_path / "model.gguf", hugging_face(), "BF16")
    state = {n: t.bfloat16() if t.ndim > 1 else t for n, t in hugging_face().items()}

    report = gradscope.analyze_drift(
        base, written(tmp_path / "m.safetensors", state), expect="converted"
    )

    assert found(report) == {}


def test_two_files_of_different_types_are_compared(tmp_path: Path) -> None:
    one, two = (converted(tmp_path / f"{k}.gguf", hugging_face(), k) for k in ("F16", "Q8_0"))

    report = gradscope.analyze_drift(one, two, expect="quantised")

    assert found(report) == {}
    assert only(report, "blk.0.attn_q.weight").base_name is None


def test_rows_that_were_not_permuted_are_the_bases(tmp_path: Path) -> None:
    base = written(tmp_path / "model.safetensors", hugging_face())
    new = converted(tmp_path / "model.gguf", hugging_face(), permute=False)

    told = only(gradscope.analyze_drift(base, new), "blk.0.attn_q.weight")

    assert told.status == "rounding"


@pytest.mark.parametrize("kind", ["Q8_0", "Q5_1", "Q4_0"])
def test_blocks_are_told_by_their_noise(tmp_path: Path, kind: str) -> None:
    report = compared(tmp_path, kind, expect="quantised")

    assert found(report) == {}
    told = only(report, "blk.0.ffn_up.weight").explanation
    assert told is not None
    w = hugging_face()["model.layers.0.mlp.up_proj.weight"]
    qtype = gguf.GGMLQuantizationType[kind]
    values = torch.from_numpy(gguf.quants.dequantize(gguf.quants.quantize(w.numpy(), qtype), qtype))
    ratio = 20 * torch.log10(w.norm() / (values - w).norm()).item()
    assert told.facts["scheme"] == f"gguf {kind}"
    assert told.facts["snr_db"] == pytest.approx(ratio, abs=1e-3)
    assert "gguf" in only(report, "blk.0.attn_k.weight").explanation.text
    assert "rotary" in only(report, "blk.0.attn_k.weight").explanation.text
    assert found(compared(tmp_path, kind, expect="converted")) == {"unexpected-change": ["high"]}


def test_a_conversion_of_another_model_is_told(tmp_path: Path) -> None:
    wrong = hugging_face() | {"model.layers.1.mlp.up_proj.weight": drawn(512, WIDTH, seed=99)}
    base = written(tmp_path / "model.safetensors", hugging_face())
    new = converted(tmp_path / "model.gguf", wrong)

    report = gradscope.analyze_drift(base, new, expect="converted")

    (finding,) = [f for f in report.findings if f.name == "unexpected-change"]
    assert finding.subject == "blk.1.ffn_up.weight"


def test_gains_with_their_one_are_a_conversion_and_others_are_not(tmp_path: Path) -> None:
    base = written(tmp_path / "model.safetensors", hugging_face())
    for gain, expected in ((1.0, {}), (0.5, {"unexpected-change": ["high"]})):
        new = converted(tmp_path / "model.gguf", hugging_face(), gain=gain)
        report = gradscope.analyze_drift(base, new, expect="converted", ignore=["weight-drift"])
        assert found(report) == expected
        told = only(report, "output_norm.weight").explanation
        assert told is not None
        assert (told.kind, told.facts["by"]) == ("shifted", pytest.approx(gain, abs=1e-6))


def test_names_are_matched_from_headers_alone(tmp_path: Path) -> None:
    report = compared(tmp_path, headers_only=True)

    assert report.result is not None
    assert not {"added", "removed"} & set(report.result.counts)
    assert any("by what llama.cpp calls them" in note for note in report.result.notes)


@pytest.mark.parametrize(("kind", "expect"), [("F16", "converted"), ("Q8_0", "quantised")])
def test_stacked_experts_are_those_of_the_checkpoint(
    tmp_path: Path, kind: str, expect: str
) -> None:
    base = written(tmp_path / "model.safetensors", experts())
    new = converted(tmp_path / "model.gguf", stacks(experts()), kind)

    report = gradscope.analyze_drift(base, new, expect=expect)

    assert found(report) == {}
    told = only(report, "blk.1.ffn_down_exps.weight[2]")
    assert told.base_name == "model.layers.1.block_sparse_moe.experts.2.w2.weight"


def test_the_expert_that_is_another_is_named(tmp_path: Path) -> None:
    wrong = experts()
    wrong["model.layers.0.block_sparse_moe.experts.1.w1.weight"] *= 2
    base = written(tmp_path / "model.safetensors", experts())
    new = converted(tmp_path / "model.gguf", stacks(wrong), "Q8_0")

    report = gradscope.analyze_drift(base, new, expect="quantised")

    (finding,) = [f for f in report.findings if f.name == "unexpected-change"]
    assert finding.subject == "blk.0.ffn_gate_exps.weight[1]"


def test_a_file_in_parts_is_one_model(tmp_path: Path) -> None:
    (tmp_path / "parts").mkdir()
    base = written(tmp_path / "model.safetensors", hugging_face())
    converted(tmp_path / "parts" / "model.gguf", hugging_face(), split=6)
    assert len(list((tmp_path / "parts").iterdir())) > 2

    report = gradscope.analyze_drift(base, tmp_path / "parts", expect="converted")

    assert found(report) == {}
    assert report.inputs[1].format == "gguf-sharded"
    assert report.coverage.analyzed == len(hugging_face())


def test_blocks_have_their_shapes_in_headers(tmp_path: Path) -> None:
    report = compared(tmp_path, "Q4_0", headers_only=True)

    assert found(report) == {}
    assert only(report, "blk.0.ffn_up.weight").shape == (2 * WIDTH, WIDTH)


# -- what is stored --------------------------------------------------------------------------------


def types(report: DriftReport) -> dict[str, tuple[str | None, str | None, str | None]]:
    assert report.result is not None
    return {t.name: (t.base_dtype, t.dtype, t.status) for t in report.result.tensors}


@pytest.mark.parametrize("headers_only", [False, True])
def test_blocks_are_shown_by_their_type(headers_only, tmp_path):
    one = converted(tmp_path / "one.gguf", hugging_face(), "Q8_0")
    two = converted(tmp_path / "two.gguf", hugging_face(), "Q4_0")
    shown = types(gradscope.analyze_drift(one, two, headers_only=headers_only))
    status = "retyped" if headers_only else "changed"
    assert shown["blk.0.attn_v.weight"] == ("gguf Q8_0", "gguf Q4_0", status)
    assert shown["output_norm.weight"] == ("F32", "F32", None if headers_only else "identical")
    again = types(gradscope.analyze_drift(one, one, headers_only=headers_only))
    same = None if headers_only else "identical"
    assert again["blk.0.attn_v.weight"] == ("gguf Q8_0", "gguf Q8_0", same)


def test_values_of_blocks_stored_as_they_are_are_retyped(tmp_path: Path) -> None:
    one = converted(tmp_path / "one.gguf", hugging_face(), "Q8_0")
    reader = gguf.GGUFReader(one)
    plain = {
        t.name: torch.from_numpy(gguf.quants.dequantize(t.data, t.tensor_type).copy())
        for t in reader.tensors
    }
    report = gradscope.analyze_drift(one, written(tmp_path / "two.safetensors", plain))
    row = only(report, "blk.0.attn_v.weight")
    assert (row.base_dtype, row.dtype, row.status) == ("gguf Q8_0", "F32", "retyped")
    assert row.explanation is not None
    assert row.explanation.text == "gguf Q8_0 stored as F32, every value kept"
    assert not report.findings


def test_what_only_one_has_and_what_is_tied_are_shown_by_their_type(tmp_path: Path) -> None:
    state = hugging_face()
    one = converted(tmp_path / "one.gguf", state, "Q8_0")
    del state["model.layers.1.mlp.up_proj.weight"]
    head = state["model.embed_tokens.weight"].clone()
    two = converted(tmp_path / "two.gguf", state | {"lm_head.weight": head}, "Q8_0")
    shown = types(gradscope.analyze_drift(one, two))
    assert shown["blk.1.ffn_up.weight"] == ("gguf Q8_0", None, "removed")
    assert shown["output.weight"] == ("gguf Q8_0", "gguf Q8_0", "identical")
