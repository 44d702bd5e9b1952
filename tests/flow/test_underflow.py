"""Float16 gradients that underflow, told by how many of their elements are zero."""

from __future__ import annotations

import numpy as np
import pytest

from gradscope import analyze_flow
from gradscope.flow.result import FlowReport

from .made import made, noise

RECORDS, LAYERS, SUFFERING = 60, 6, 2
#: Norms of ordinary gradients: an RMS of 0.1, far above float16's smallest normal number, 6.1e-5.
NORMS = noise(RECORDS, LAYERS, scale=0.1, level=0.1 * np.sqrt(10_000))


def report(share: float, *, grad: str = "float16") -> FlowReport:
    """A run in which one layer's gradient has this share of zeros, and nothing else is odd."""
    zeros = np.full((RECORDS, LAYERS), 0.01, np.float32)
    zeros[:, SUFFERING] = share
    meta = {"precision": {"grad": grad}}
    return analyze_flow(made(NORMS, numel=10_000, zero_fraction=zeros, meta=meta))


def underflowing(found: FlowReport) -> list[str]:
    """The layers whose finding advises a gradient scaler."""
    return [f.subject for f in found.findings if "gradient scaler" in (f.recommendation or "")]


@pytest.mark.parametrize("share", [0.51, 0.7, 0.99])
@pytest.mark.parametrize("grad", ["float16", "torch.float16", "half", "fp16"])
def test_a_layer_most_of_whose_elements_are_zero_underflows(share: float, grad: str) -> None:
    found = report(share, grad=grad)

    assert underflowing(found) == [f"layers.{SUFFERING}"]
    assert [(f.name, f.severity) for f in found.findings] == [("underflow", "medium")]


@pytest.mark.parametrize("share", [0.0, 0.3, 0.5])
def test_up_to_half_of_zeros_is_what_activations_such_as_relu_leave(share: float) -> None:
    assert report(share).findings == ()


@pytest.mark.parametrize("share", [0.999, 1.0])
def test_a_layer_without_any_other_element_is_not_said_to_underflow(share: float) -> None:
    assert underflowing(report(share)) == []


@pytest.mark.parametrize("grad", ["bfloat16", "float32"])
def test_types_with_the_exponents_of_float32_do_not_underflow(grad: str) -> None:
    assert report(0.7, grad=grad).findings == ()


def test_a_layer_that_underflowed_until_nothing_was_left_has_no_dead_units() -> None:
    zeros = np.full((RECORDS, LAYERS), 0.01, np.float32)
    zeros[:20, SUFFERING], zeros[20:, SUFFERING] = 0.8, 1.0
    norms = NORMS.copy()
    norms[20:, SUFFERING] = 0
    fields = {"numel": 10_000, "zero_fraction": zeros}

    half = analyze_flow(made(norms, meta={"precision": {"grad": "float16"}}, **fields))
    whole = analyze_flow(made(norms, meta={"precision": {"grad": "float32"}}, **fields))

    assert [(f.name, f.severity) for f in half.findings] == [("underflow", "high")]
    assert f"nothing is left in layers.{SUFFERING}" in half.findings[0].message
    assert [(f.name, f.severity) for f in whole.findings] == [("dead-zone", "high")]
