"""Weights quantised in every layout by plain loops over NumPy, with the matrix each stands for.

Nothing here is shared with the package: tables come from the papers, packing is one element at a
time in Python's integers.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from ..weights.checkpoints import Codes

Array = npt.NDArray[Any]

#: The sixteen quantiles of QLoRA (Dettmers et al. 2023, appendix E), and bitsandbytes' FP4.
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
)  # fmt: skip
FP4 = (
    0.0, 0.0052083333, 0.66666667, 1.0, 0.33333333, 0.5, 0.16666667, 0.25,
    -0.0, -0.0052083333, -0.66666667, -1.0, -0.33333333, -0.5, -0.16666667, -0.25,
)  # fmt: skip
E2M1 = np.arange(16, dtype=np.uint8).view(ml_dtypes.float4_e2m1fn).astype(np.float64)
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


@dataclass(frozen=True)
class Made:
    """The tensors of a layer, and what they stand for: ``codes`` is the tensor's name."""

    tensors: Mapping[str, Any]
    codes: str
    reference: Array
    scheme: str
    config: Mapping[str, object] = field(default_factory=dict)
    header: Mapping[str, str] = field(default_factory=dict)


Maker = Callable[[Array, str], Made]


def typed(name: str, codes: Array) -> Any:
    """Codes of a type that NumPy does not have."""

    return Codes(name, codes.astype(np.uint8))


def rounded(values: Array, kind: Any) -> Array:
    """Codes of the nearest values of an ml_dtypes type."""
    return values.astype(np.float32).astype(kind).view(np.uint8)


def decoded(codes: Array, kind: Any) -> Array:
    return np.ascontiguousarray(codes, np.uint8).view(kind).astype(np.float64)


def nearest(values: Array, table: Any) -> Array:
    """Index of the nearest entry of a table."""
    return np.abs(values[..., None] - np.asarray(table, np.float64)).argmin(-1).astype(np.uint8)


def pairs(codes: Array, high_first: bool = False) -> Array:
    """Two codes a byte along the last axis."""
    first, second = codes[..., 0::2].astype(int), codes[..., 1::2].astype(int)
    return ((first << 4 | second) if high_first else (second << 4 | first)).astype(np.uint8)


def words(codes: Array, bits: int, dense: bool = True) -> Array:
    """Rows of codes as rows of int32, from the lowest bit on, one code at a time."""
    rows, columns = codes.shape
    per = 32 // bits
    width = -(-columns * bits // 32) if dense else -(-columns // per)
    out = np.zeros((rows, width), np.uint32)
    for r in range(rows):
        line = 0
        for c in range(columns):
            at = c * bits if dense else c // per * 32 + c % per * bits
            line |= int(codes[r, c]) << at
        for w in range(width):
            out[r, w] = line >> (32 * w) & 0xFFFFFFFF
    return out.view(np.int32)


def grouped(values: Array, group: int) -> Array:
    return values.reshape(values.shape[0], -1, group)


# -- 8 bits ---------------------------------------------------------------------------------------

E4M3, E5M2, E8M0 = ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2, ml_dtypes.float8_e8m0fnu


def fp8(granularity: str, scale_name: str = "weight_scale", kind: str = "F8_E4M3") -> Maker:
    form, peak = {"F8_E4M3": (E4M3, 448), "F8_E5M2": (E5M2, 57344)}[kind]

    def make(w: Array, module: str) -> Made:
        out, columns = w.shape
        if granularity == "tensor":
            scale = np.full((), np.abs(w).max() / peak, np.float32)
            full: Array = np.full(w.shape, scale, np.float64)
        elif granularity == "row":
            scale = (np.abs(w).max(1, keepdims=True) / peak).astype(np.float32)
            full = np.broadcast_to(scale, w.shape).astype(np.float64)
        else:
            size = int(granularity)
            lines, groups = -(-out // size), -(-columns // size)
            scale = np.zeros((lines, groups), np.float32)
            full = np.zeros(w.shape)
            for i in range(lines):
                for j in range(groups):
                    at = np.s_[i * size : (i + 1) * size, j * size : (j + 1) * size]
                    scale[i, j] = np.abs(w[at]).max() / peak
                    full[at] = scale[i, j]
        codes = rounded(w / full, form)
        tensors = {f"{module}.weight": typed(kind, codes), f"{module}.{scale_name}": scale}
        return Made(
            tensors, f"{module}.weight", decoded(codes, form) * full, f"fp8 {kind[3:].lower()}"
        )

    return make


def mxfp8(w: Array, module: str) -> Made:
    blocks = grouped(w, 32)
    power = np.floor(np.log2(np.abs(blocks).max(2))) - 8
    full = np.repeat(2.0**power, 32, 1)
    codes = rounded(np.clip(w / full, -448, 448), E4M3)
    scale = (power + 127).astype(np.uint8)
    tensors = {f"{module}.weight": typed("F8_E4M3", codes), f"{module}.weight_scale": scale}
    return Made(tensors, f"{module}.weight", decoded(codes, E4M3) * full, "mxfp8 e4m3")


def int8(scale_name: str, dimensions: int = 2) -> Maker:
    """Per row; ``SCB`` is the row's greatest magnitude, others a 127th of it."""

    def make(w: Array, module: str) -> Made:
        peak = np.abs(w).max(1)
        codes = np.rint(w / peak[:, None] * 127).astype(np.int8)
        scale = (peak if scale_name == "SCB" else peak / 127).astype(np.float32)
        unit = 1 / 127 if scale_name == "SCB" else 1
        shown = scale if dimensions == 1 else scale[:, None]
        tensors = {f"{module}.weight": codes, f"{module}.{scale_name}": shown}
        if scale_name == "SCB":
            tensors[f"{module}.weight_format"] = np.zeros((), np.uint8)
        reference = codes * scale.astype(np.float64)[:, None] * unit
        scheme = "bitsandbytes int8" if scale_name == "SCB" else "int8"
        return Made(tensors, f"{module}.weight", reference, scheme)

    return make


def int8_asymmetric(w: Array, module: str) -> Made:
    low, high = w.min(1), w.max(1)
    scale = ((high - low) / 255).astype(np.float32)
    zero = np.rint(-128 - low / scale).astype(np.int8)
    codes = np.clip(np.rint(w / scale[:, None]) + zero[:, None], -128, 127).astype(np.int8)
    reference = (codes - zero.astype(np.float64)[:, None]) * scale.astype(np.float64)[:, None]
    tensors = {
        f"{module}.weight": codes,
        f"{module}.weight_scale": scale[:, None],
        f"{module}.weight_zero_point": zero[:, None],
    }
    return Made(tensors, f"{module}.weight", reference, "int8")


def torchao_int8(w: Array, module: str) -> Made:
    made = int8("weight_scale")(w, module)
    codes, scale = made.tensors.values()
    tensors = {f"{module}._weight_qdata": codes, f"{module}._weight_scale": scale}
    header = {f"{module}.weight": json.dumps({"_type": "Int8Tensor", "_data": {}})}
    return Made(tensors, f"{module}._weight_qdata", made.reference, "int8", header=header)


def torchao_fp8(w: Array, module: str) -> Made:
    made = fp8("row")(w, module)
    codes, scale = made.tensors.values()
    tensors = {f"{module}._weight_qdata": codes, f"{module}._weight_scale": scale}
    header = {f"{module}.weight": json.dumps({"_type": "Float8Tensor", "_data": {}})}
    return Made(tensors, f"{module}._weight_qdata", made.reference, "fp8 e4m3", header=header)


def quanto(w: Array, module: str) -> Made:
    made = int8("weight_scale")(w, module)
    codes, scale = made.tensors.values()
    tensors = {f"{module}.weight._data": codes, f"{module}.weight._scale": scale}
    return Made(tensors, f"{module}.weight._data", made.reference, "int8")


# -- 4-bit floats ---------------------------------------------------------------------------------


def _nvfp4(w: Array) -> tuple[Array, Array, np.float32, Array]:
    """Codes, block scales as E4M3 codes, the global factor, and the values."""
    factor = np.float32(np.abs(w).max() / (6 * 448))
    blocks = grouped(w, 16)
    scale = rounded(np.maximum(np.abs(blocks).max(2) / 6 / factor, 2**-9), E4M3)
    full = decoded(scale, E4M3) * np.float64(factor)
    codes = nearest(blocks / full[..., None], E2M1).reshape(w.shape)
    return codes, scale, factor, E2M1[codes] * np.repeat(full, 16, 1)


def modelopt_nvfp4(w: Array, module: str) -> Made:
    codes, scale, factor, values = _nvfp4(w)
    tensors = {
        f"{module}.weight": pairs(codes),
        f"{module}.weight_scale": typed("F8_E4M3", scale),
        f"{module}.weight_scale_2": np.float32(factor),
        f"{module}.input_scale": np.float32(0.01),
    }
    return Made(tensors, f"{module}.weight", values, "nvfp4")


def compressed_nvfp4(w: Array, module: str) -> Made:
    codes, scale, factor, _ = _nvfp4(w)
    inverse = np.float32(1 / factor)
    values = E2M1[codes] * np.repeat(decoded(scale, E4M3) / np.float64(inverse), 16, 1)
    tensors = {
        f"{module}.weight_packed": pairs(codes),
        f"{module}.weight_scale": typed("F8_E4M3", scale),
        f"{module}.weight_global_scale": inverse[None],
    }
    return Made(tensors, f"{module}.weight_packed", values, "nvfp4")


def nvfp4_of_its_type(w: Array, module: str) -> Made:
    made = modelopt_nvfp4(w, module)
    codes, *_ = _nvfp4(w)

    tensors = {**made.tensors, f"{module}.weight": Codes("F4", pairs(codes), codes.shape)}
    return Made(tensors, made.codes, made.reference, "nvfp4")


def _mxfp4(w: Array) -> tuple[Array, Array, Array]:
    blocks = grouped(w, 32)
    power = np.floor(np.log2(np.abs(blocks).max(2))) - 2
    full = 2.0**power
    codes = nearest(blocks / full[..., None], E2M1).reshape(w.shape)
    return codes, (power + 127).astype(np.uint8), E2M1[codes] * np.repeat(full, 32, 1)


def compressed_mxfp4(w: Array, module: str) -> Made:
    codes, scale, values = _mxfp4(w)
    tensors = {f"{module}.weight_packed": pairs(codes), f"{module}.weight_scale": scale}
    return Made(tensors, f"{module}.weight_packed", values, "mxfp4")


def gpt_oss(w: Array, module: str, experts: int = 2) -> Made:
    """Experts along the rows of ``w``."""
    codes, scale, values = _mxfp4(w)
    out, columns = w.shape[0] // experts, w.shape[1]
    tensors = {
        f"{module}.experts.down_proj_blocks": pairs(codes).reshape(experts, out, columns // 32, 16),
        f"{module}.experts.down_proj_scales": scale.reshape(experts, out, -1),
    }
    name = f"{module}.experts.down_proj_blocks"
    return Made(tensors, name, values.reshape(experts, out, columns), "mxfp4")


def mx_of_its_type(w: Array, module: str) -> Made:

    codes, scale, values = _mxfp4(w)
    tensors = {
        f"{module}.weight": Codes("F4", pairs(codes), codes.shape),
        f"{module}.weight_scale": Codes("F8_E8M0", scale),
    }
    return Made(tensors, f"{module}.weight", values, "mxfp4")


# -- bitsandbytes, 4 bits -------------------------------------------------------------------------


def bitsandbytes4(kind: str, nested: bool = False, block: int = 64) -> Maker:
    table = np.array(NF4 if kind == "nf4" else FP4, np.float32)

    def make(w: Array, module: str) -> Made:
        flat = np.zeros(-(-w.size // block) * block)
        flat[: w.size] = w.ravel()
        blocks = flat.reshape(-1, block)
        absmax = np.abs(blocks).max(1).astype(np.float32)
        name, state = f"{module}.weight", {"quant_type": kind, "blocksize": block}
        state |= {"dtype": "bfloat16", "shape": list(w.shape)}
        beside: dict[str, Any] = {f"{name}.absmax": absmax, f"{name}.quant_map": table}
        used = absmax.astype(np.float64)
        if nested:
            offset = float(absmax.mean())
            outer = np.array(
                [np.abs(absmax[i : i + 256] - offset).max() for i in range(0, len(absmax), 256)],
                np.float32,
            )
            levels = np.linspace(-1, 1, 256, dtype=np.float32)
            full = np.repeat(outer, 256)[: len(absmax)].astype(np.float64)
            index = nearest((absmax - offset) / full, levels)
            used = levels[index].astype(np.float64) * full + offset
            beside[f"{name}.absmax"] = index
            beside |= {f"{name}.nested_absmax": outer, f"{name}.nested_quant_map": levels}
            state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": offset}
        codes = nearest(blocks / np.maximum(absmax, 1e-30)[:, None], table).ravel()[: w.size]
        values = table.astype(np.float64)[codes] * np.repeat(used, block)[: w.size]
        document = np.frombuffer(json.dumps(state).encode(), np.uint8)
        tensors = {
            name: pairs(codes[None], high_first=True).reshape(-1, 1),
            **beside,
            f"{name}.quant_state.bitsandbytes__{kind}": document,
        }
        return Made(tensors, name, values.reshape(w.shape), f"bitsandbytes {kind}")

    return make


# -- words ----------------------------------------------------------------------------------------


def _asymmetric(w: Array, bits: int, group: int) -> tuple[Array, Array, Array]:
    """Codes [out, in], scales [out, groups] and zero points, from 1 on."""
    blocks = grouped(w, group)
    low, high = np.minimum(blocks.min(2), 0), np.maximum(blocks.max(2), 0)
    top = (1 << bits) - 1
    scale = ((high - low) / top).astype(np.float16).astype(np.float64)
    zero = np.clip(np.rint(-low / scale), 1, top)
    codes = np.clip(np.rint(blocks / scale[..., None]) + zero[..., None], 0, top)
    return codes.reshape(w.shape).astype(np.uint8), scale, zero.astype(np.uint8)


def gptq(bits: int, group: int = 32, order: bool = False, second: bool = False) -> Maker:
    def make(w: Array, module: str) -> Made:
        columns = w.shape[1]
        place = np.random.default_rng(5).permutation(columns) if order else np.arange(columns)
        codes, scale, zero = _asymmetric(w[:, place], bits, group)
        index = np.empty(columns, np.int32)
        index[place] = np.arange(columns) // group
        back = np.argsort(place)
        values = ((codes.astype(float) - np.repeat(zero, group, 1)) * np.repeat(scale, group, 1))[
            :, back
        ]
        tensors = {
            f"{module}.qweight": words(codes[:, back], bits).T.copy(),
            f"{module}.qzeros": words(zero.T - (0 if second else 1), bits),
            f"{module}.scales": scale.T.astype(np.float16),
            f"{module}.g_idx": index,
        }
        config = {"quant_method": "gptq", "bits": bits, "group_size": group}
        config |= {"checkpoint_format": "gptq_v2"} if second else {}
        return Made(tensors, f"{module}.qweight", values, "gptq", config)

    return make


def awq(w: Array, module: str) -> Made:
    codes, scale, zero = _asymmetric(w, 4, 32)

    def interleaved(matrix: Array) -> Array:
        """[rows, out] with eight neighbours of a row in a word, in AWQ's order."""
        rows, out = matrix.shape
        packed = np.zeros((rows, out // 8), np.uint32)
        for c in range(out // 8):
            for nibble, row in enumerate(AWQ_ORDER):
                packed[:, c] |= matrix[:, c * 8 + row].astype(np.uint32) << (4 * nibble)
        return packed.view(np.int32)

    values = (codes.astype(float) - np.repeat(zero, 32, 1)) * np.repeat(scale, 32, 1)
    tensors = {
        f"{module}.qweight": interleaved(codes.T.astype(int)),
        f"{module}.qzeros": interleaved(zero.T.astype(int)),
        f"{module}.scales": scale.T.astype(np.float16),
    }
    config = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"}
    return Made(tensors, f"{module}.qweight", values, "awq", config)


def compressed_int(bits: int, group: int = 32, zeros: bool = False, dense: bool = True) -> Maker:
    half = 1 << (bits - 1)

    def make(w: Array, module: str) -> Made:
        if zeros:
            codes, scale, zero = _asymmetric(w, bits, group)
            shift = np.repeat(zero, group, 1).astype(float)
        else:
            scale = (np.abs(grouped(w, group)).max(2) / (half - 0.5)).astype(np.float16)
            scale = scale.astype(np.float64)
            codes = np.rint(w / np.repeat(scale, group, 1)).clip(-half, half - 1) + half
            codes, shift, zero = codes.astype(np.uint8), np.full(w.shape, float(half)), None
        tensors = {
            f"{module}.weight_packed": words(codes, bits, dense),
            f"{module}.weight_scale": scale.astype(np.float16),
            f"{module}.weight_shape": np.array(w.shape, np.int64),
        }
        if zero is not None:
            packed = np.ascontiguousarray(words(zero.T.copy(), bits, dense).T)
            tensors[f"{module}.weight_zero_point"] = packed
        values = (codes - shift) * np.repeat(scale, group, 1)
        return Made(tensors, f"{module}.weight_packed", values, f"int{bits}")

    return make


def mlx(bits: int, group: int = 64) -> Maker:
    def make(w: Array, module: str) -> Made:
        blocks = grouped(w, group)
        top = (1 << bits) - 1
        # As MLX does: the end of greater magnitude is exact, so scales may be negative.
        low, high = blocks.min(2), blocks.max(2)
        flip = np.abs(high) > np.abs(low)
        scale = ((high - low) / top * np.where(flip, -1, 1)).astype(np.float16).astype(np.float64)
        bias = np.where(flip, high, low).astype(np.float16).astype(np.float64)
        codes = np.clip(np.rint((blocks - bias[..., None]) / scale[..., None]), 0, top)
        values = codes * scale[..., None] + bias[..., None]
        packed = words(codes.reshape(w.shape).astype(np.uint8), bits).view(np.uint32)
        tensors = {
            f"{module}.weight": packed,
            f"{module}.scales": scale.astype(np.float16),
            f"{module}.biases": bias.astype(np.float16),
        }
        return Made(tensors, f"{module}.weight", values.reshape(w.shape), f"mlx int{bits}")

    return make


def modelopt_int4(w: Array, module: str) -> Made:
    scale = (np.abs(grouped(w, 32)).max(2) / 7).astype(np.float32)
    full = np.repeat(scale, 32, 1).astype(np.float64)
    codes = np.rint(w / full).clip(-8, 7).astype(int)
    stored = (codes[0::2] & 15 | (codes[1::2] & 15) << 4).astype(np.uint8)
    tensors = {f"{module}.weight": stored, f"{module}.weight_scale": scale}
    return Made(tensors, f"{module}.weight", codes * full, "int4")


LAYOUTS: dict[str, Maker] = {
    "fp8 a tensor": fp8("tensor"),
    "fp8 a row": fp8("row"),
    "fp8 e5m2 a row": fp8("row", kind="F8_E5M2"),
    "fp8 in blocks of 32": fp8("32", "weight_scale_inv"),
    "fp8 in blocks that do not divide it": fp8("128", "weight_scale_inv"),
    "fp8 of ComfyUI": fp8("tensor", "scale_weight"),
    "fp8 of torchao": torchao_fp8,
    "mxfp8": mxfp8,
    "int8 of bitsandbytes": int8("SCB", 1),
    "int8 a row": int8("weight_scale"),
    "int8 with zero points": int8_asymmetric,
    "int8 of torchao": torchao_int8,
    "int8 of quanto": quanto,
    "nvfp4 of ModelOpt": modelopt_nvfp4,
    "nvfp4 of compressed-tensors": compressed_nvfp4,
    "nvfp4 of its own type": nvfp4_of_its_type,
    "mxfp4 of compressed-tensors": compressed_mxfp4,
    "mxfp4 of gpt-oss": gpt_oss,
    "mxfp4 of its own type": mx_of_its_type,
    "nf4": bitsandbytes4("nf4"),
    "nf4, nested": bitsandbytes4("nf4", nested=True),
    "fp4 of bitsandbytes": bitsandbytes4("fp4", block=128),
    **{f"gptq, {bits} bits": gptq(bits) for bits in (2, 3, 4, 8)},
    "gptq, act-order": gptq(4, order=True),
    "gptq, second format": gptq(4, second=True),
    "awq": awq,
    **{f"compressed-tensors, {bits} bits": compressed_int(bits) for bits in (2, 3, 4, 8)},
    "compressed-tensors, 4 bits with zero points": compressed_int(4, zeros=True),
    "compressed-tensors, 3 bits, padded": compressed_int(3, zeros=True, dense=False),
    **{f"mlx, {bits} bits": mlx(bits) for bits in (2, 3, 4, 5, 6, 8)},
    "int4 of ModelOpt": modelopt_int4,
}
