"""Which units a tensor has: told by its bias, its name, its neighbours, the configuration."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from gradscope.checkpoints.tensors import TensorRef
from gradscope.statistics.layout import UnitLayout
from gradscope.weights.layouts import layouts
from gradscope.weights.roles import roles

Shapes = Mapping[str, tuple[int, ...]]


def layout(name: str, shapes: Shapes, config: Mapping[str, object] | None = None) -> UnitLayout:
    """What is decided of one tensor of a checkpoint; rows where nothing is."""
    refs = [TensorRef(n, "F32", shape, "f", 0) for n, shape in shapes.items()]
    decide = layouts(refs, roles(refs), config or {})
    ref = next(ref for ref in refs if ref.name == name)
    return decide(ref) or UnitLayout.along(ref.shape, 0)


def units(name: str, shapes: Shapes, config: Mapping[str, object] | None = None) -> tuple[int, ...]:
    """The axis, the number of units, the elements of one."""
    found = layout(name, shapes, config)
    return found.axis, found.units, found.unit_numel


GPT2: Shapes = {
    "h.0.attn.c_attn.weight": (48, 144), "h.0.attn.c_attn.bias": (144,),
    "h.0.attn.c_proj.weight": (48, 48), "h.0.attn.c_proj.bias": (48,),
    "h.0.mlp.c_fc.weight": (48, 192), "h.0.mlp.c_fc.bias": (192,),
    "h.0.mlp.c_proj.weight": (192, 48), "h.0.mlp.c_proj.bias": (48,),
    "wte.weight": (500, 48), "score.weight": (3, 48),
}  # fmt: skip
NANO: Shapes = {  # the same names, of nn.Linear
    name: (shape[::-1] if ".c_" in name else shape) for name, shape in GPT2.items()
}
FLAX: Shapes = {
    "Conv_0/kernel": (3, 3, 8, 16), "Conv_0/bias": (16,),
    "Dense_0/kernel": (64, 10), "Dense_0/bias": (10,), "Dense_1/kernel": (10, 10),
    "Embed_0/embedding": (100, 8),
    "attention/query/kernel": (32, 4, 8), "attention/query/bias": (4, 8),
    "attention/key/kernel": (32, 4, 8),
    "attention/out/kernel": (4, 8, 32), "attention/out/bias": (32,),
    "scanned/kernel": (12, 32, 64), "scanned/bias": (12, 64),
    "dw/depthwise_kernel": (3, 3, 8, 2),
    "lstm/kernel": (8, 64), "lstm/recurrent_kernel": (16, 64), "lstm/bias": (64,),
    "keras/kernel:0": (20, 30), "keras/bias:0": (30,),
    "params.lm_head.kernel": (48, 500),
}  # fmt: skip
UPSAMPLING: Shapes = {
    "up.0.weight": (32, 16, 2, 2), "up.0.bias": (16,),  # ConvTranspose2d(32, 16, 2)
    "up.1.weight": (32, 4, 4, 4), "up.1.bias": (16,),  # of four groups
    "down.0.weight": (32, 16, 3, 3), "down.0.bias": (32,),
    "deconv.0.weight": (16, 16, 4, 4), "deconv.0.bias": (16,),
    "block.conv.weight": (16, 16, 3, 3), "block.conv.bias": (16,),
    "dw.weight": (16, 1, 3, 3), "dw.bias": (16,),
    "bare.weight": (8, 24, 1), "hwio.weight": (3, 3, 16, 24), "hwio.bias": (24,),
}  # fmt: skip


@pytest.mark.parametrize(
    ("shapes", "name", "expected"),
    [
        (GPT2, "h.0.attn.c_attn.weight", (1, 144, 48)),
        (GPT2, "h.0.attn.c_proj.weight", (1, 48, 48)),  # as its neighbours
        (GPT2, "h.0.mlp.c_fc.weight", (1, 192, 48)),
        (GPT2, "h.0.mlp.c_proj.weight", (1, 48, 192)),
        (GPT2, "wte.weight", (0, 500, 48)),
        (GPT2, "score.weight", (0, 3, 48)),
        (NANO, "h.0.attn.c_attn.weight", (0, 144, 48)),
        (NANO, "h.0.attn.c_proj.weight", (0, 48, 48)),
        (NANO, "h.0.mlp.c_proj.weight", (0, 48, 192)),
        (FLAX, "Conv_0/kernel", (3, 16, 72)),
        (FLAX, "Dense_0/kernel", (1, 10, 64)),
        (FLAX, "Dense_1/kernel", (1, 10, 10)),
        (FLAX, "Embed_0/embedding", (0, 100, 8)),
        (FLAX, "attention/query/kernel", (2, 32, 32)),
        (FLAX, "attention/key/kernel", (2, 32, 32)),
        (FLAX, "attention/out/kernel", (2, 32, 32)),
        (FLAX, "scanned/kernel", (2, 12 * 64, 32)),
        (FLAX, "dw/depthwise_kernel", (3, 16, 9)),
        (FLAX, "keras/kernel:0", (1, 30, 20)),
        (FLAX, "params.lm_head.kernel", (1, 500, 48)),
        (UPSAMPLING, "up.0.weight", (1, 16, 128)),
        (UPSAMPLING, "up.1.weight", (1, 16, 128)),
        (UPSAMPLING, "down.0.weight", (0, 32, 144)),
        (UPSAMPLING, "deconv.0.weight", (1, 16, 256)),
        (UPSAMPLING, "block.conv.weight", (0, 16, 144)),
        (UPSAMPLING, "dw.weight", (0, 16, 9)),
        (UPSAMPLING, "bare.weight", (0, 8, 24)),
        (UPSAMPLING, "hwio.weight", (3, 24, 144)),
    ],
)  # fmt: skip
def test_units_lie_along_the_output(shapes: Shapes, name: str, expected: tuple[int, ...]) -> None:
    assert units(name, shapes) == expected


def test_a_square_matrix_without_a_witness_has_rows() -> None:
    assert units("a.weight", {"a.weight": (8, 8), "a.bias": (8,)}) == (0, 8, 8)


def test_neighbours_that_disagree_are_no_witnesses() -> None:
    shapes = {
        "0.fc_a.weight": (8, 4), "0.fc_a.bias": (4,), "1.fc_b.weight": (8, 4), "1.fc_b.bias": (8,),
        "2.fc_c.weight": (4, 4), "2.fc_c.bias": (4,),
    }  # fmt: skip
    assert units("2.fc_c.weight", shapes) == (0, 4, 4)


# -- parts -----------------------------------------------------------------------------------------


def parts(
    name: str, shapes: Shapes, config: Mapping[str, object] | None = None
) -> list[tuple[str, int]]:
    found = layout(name, shapes, config)
    members = found.members if found.parts else ()
    return [(part.name, len(m)) for part, m in zip(found.parts, members, strict=True)]


THIRDS = [("q", 32), ("k", 32), ("v", 32)]


@pytest.mark.parametrize(
    "name",
    ["a.in_proj_weight", "a.qkv.weight", "a.Wqkv.weight", "a.to_qkv.weight", "a.W_pack.weight"],
)
def test_three_squares_in_one_are_three_parts(name: str) -> None:
    assert parts(name, {name: (96, 32)}) == THIRDS
    assert parts(name, {name: (90, 32)}) == []


@pytest.mark.parametrize(
    "own", ["to_kv", "kv_proj", "kv", "key_value", "Wkv", "c_kv", "in_proj_kv"]
)
def test_keys_and_values_in_one_are_two_parts(own: str) -> None:
    name = f"blocks.0.attn.{own}.weight"
    assert parts(name, {name: (64, 32)}) == [("k", 32), ("v", 32)]
    assert parts(name, {name: (63, 32)}) == []


@pytest.mark.parametrize(
    "own", ["gate_up_proj", "up_gate_proj", "gate_and_up_proj", "fc1_gate_up", "w13", "w12"]
)
def test_a_gate_and_what_it_gates_are_two_parts(own: str) -> None:
    name = f"layers.0.mlp.{own}.weight"
    assert parts(name, {name: (96, 32)}) == [("gate", 48), ("up", 48)]


def test_a_gated_projection_is_known_by_what_takes_half_of_it() -> None:
    name = "block.ff.net.0.proj.weight"
    assert parts(name, {name: (96, 32), "block.ff.net.2.weight": (32, 48)}) == [
        ("value", 48),
        ("gate", 48),
    ]
    assert parts(name, {name: (96, 32), "block.ff.net.2.weight": (32, 96)}) == []


@pytest.mark.parametrize("own", ["gate", "up_proj", "gate_proj", "w1", "kv_a_proj_with_mqa"])
def test_what_is_one_matrix_has_no_parts(own: str) -> None:
    name = f"layers.0.mlp.{own}.weight"
    assert parts(name, {name: (96, 32)}) == []


def test_parts_of_columns_are_parts_of_columns() -> None:
    assert parts("h.0.attn.c_attn.weight", GPT2) == [("q", 48), ("k", 48), ("v", 48)]
    assert layout("h.0.attn.c_attn.weight", GPT2, {"n_head": 4, "n_embd": 48}).head == 12


def test_shared_keys_are_as_many_as_the_configuration_or_the_output_says() -> None:
    shapes = {"a.qkv_proj.weight": (64, 32), "a.o_proj.weight": (32, 32)}
    config = {"num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 32}
    expected = [("q", 32), ("k", 16), ("v", 16)]
    assert parts("a.qkv_proj.weight", shapes, config) == expected
    assert layout("a.qkv_proj.weight", shapes, config).head == 8
    assert parts("a.qkv_proj.weight", shapes) == expected
    assert parts("a.qkv_proj.weight", {"a.qkv_proj.weight": (64, 32)}) == []
    wide = {"a.qkv_proj.weight": (128, 32)}
    assert parts("a.qkv_proj.weight", wide, {**config, "head_dim": 16})[0] == ("q", 64)


def test_a_configuration_of_another_tower_does_not_fit() -> None:
    shapes = {"vision.qkv.weight": (96, 32)}
    config = {"text_config": {"num_attention_heads": 7, "num_key_value_heads": 1}}
    assert parts("vision.qkv.weight", shapes, config) == THIRDS
    assert layout("vision.qkv.weight", shapes, config).head is None
    both = {**config, "vision_config": {"num_heads": 4}}
    assert layout("vision.qkv.weight", shapes, both).head == 8


def test_heads_one_after_another_are_taken_apart() -> None:
    shapes = {"a.query_key_value.weight": (96, 32)}
    found = layout("a.query_key_value.weight", shapes, {"num_attention_heads": 4})
    assert [list(m[:10]) for m in found.members] == [
        [*range(8), 24, 25], [*range(8, 16), 32, 33], [*range(16, 24), 40, 41],
    ]  # fmt: skip
    assert parts("a.query_key_value.weight", shapes) == []
    falcon = {"num_attention_heads": 4, "num_kv_heads": 1}
    grouped = {"a.query_key_value.weight": (48, 32)}
    expected = [("q", 32), ("k", 8), ("v", 8)]
    assert parts("a.query_key_value.weight", grouped, falcon) == expected


def test_gates_are_parts() -> None:
    shapes = {
        "rnn.weight_ih_l0": (64, 10), "rnn.weight_hh_l0": (64, 16),
        "gru.weight_ih_l0_reverse": (48, 10), "gru.weight_hh_l0_reverse": (48, 16),
        "plain.weight_ih_l0": (16, 10), "plain.weight_hh_l0": (16, 16),
        "proj.weight_ih_l0": (64, 10), "proj.weight_hh_l0": (64, 8), "proj.weight_hr_l0": (8, 16),
        "cell.weight_ih": (64, 10), "cell.weight_hh": (64, 16),
        "mlp.gate_up_proj.weight": (40, 10),
    }  # fmt: skip
    lstm = [(gate, 16) for gate in "ifgo"]
    assert parts("rnn.weight_ih_l0", shapes) == parts("rnn.weight_hh_l0", shapes) == lstm
    assert parts("proj.weight_hh_l0", shapes) == parts("cell.weight_ih", shapes) == lstm
    assert parts("gru.weight_ih_l0_reverse", shapes) == [(gate, 16) for gate in "rzn"]
    assert parts("plain.weight_ih_l0", shapes) == []
    assert parts("mlp.gate_up_proj.weight", shapes) == [("gate", 20), ("up", 20)]


def test_heads_of_a_projection_are_known_from_the_configuration_or_a_norm() -> None:
    shapes = {
        "a.q_proj.weight": (32, 32),
        "a.k_proj.weight": (16, 32),
        "a.up_proj.weight": (32, 32),
    }
    config = {"num_attention_heads": 4, "num_key_value_heads": 2}
    assert layout("a.q_proj.weight", shapes, config).head == 8
    assert layout("a.k_proj.weight", shapes, config).head == 8
    assert layout("a.up_proj.weight", shapes, config).head is None
    assert layout("a.q_proj.weight", shapes).head is None
    assert layout("a.q_proj.weight", {**shapes, "a.q_norm.weight": (16,)}).head == 16
    assert layout("a.q_proj.weight", {**shapes, "a.q_norm.weight": (32,)}).head is None


# -- experts ---------------------------------------------------------------------------------------

E, H, M = 4, 32, 48


@pytest.mark.parametrize(
    ("shapes", "config"),
    [
        ({"e.experts.gate_up_proj": (E, 2 * M, H), "e.experts.down_proj": (E, H, M)}, {}),
        (
            {"e.experts.up_proj": (E, M, H), "e.experts.down_proj": (E, H, M)},
            {"hidden_size": H},
        ),
        (
            {
                "e.experts.w1": (E, M, H), "e.experts.w2": (E, H, M), "e.gate.weight": (E, H),
            },
            {},
        ),
        (
            {
                "moe.input_linear.weight": (E, 2 * M, H), "moe.output_linear.weight": (E, H, M),
                "moe.router.layer.weight": (E, H),
            },
            {},
        ),
        ({"e.experts.w1": (E, M, H), "e.experts.w1_bias": (E, M), "e.experts.w2": (E, H, M)}, {}),
        ({"e.experts.w1": (E, H, H)}, {}),
    ],
)  # fmt: skip
def test_stacked_experts_are_told_from_their_transposes(
    shapes: Shapes, config: Mapping[str, object]
) -> None:
    stacks = {name: shape for name, shape in shapes.items() if len(shape) == 3}
    for name, shape in stacks.items():
        found = layout(name, shapes, config)
        assert [part.name for part in found.parts] == [f"expert {i}" for i in range(E)]
        assert (found.axis, found.width) == (1, shape[1])
    if len({shape[1:] for shape in stacks.values()}) == 1:
        return  # a square is its own transpose
    turned = {
        name: (shape[0], shape[2], shape[1]) if name in stacks else shape
        for name, shape in shapes.items()
    }
    known = [name for name in stacks if "_bias" in str(shapes) and f"{name}_bias" not in shapes]
    for name, shape in stacks.items():
        if name not in known:
            found = layout(name, turned, config)
            assert (found.axis, found.width, found.unit_numel) == (2, shape[1], shape[2])
