"""A tensor that may hold codes, with what lies beside it; and words for what is wrong there."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from gradscope.checkpoints.tensors import TensorRef
from gradscope.quantization.config import Config
from gradscope.quantization.weights import Companion, Fault, Kind


@dataclass(frozen=True, slots=True)
class Site:
    """One tensor of a checkpoint as the layouts see it."""

    ref: TensorRef
    tensors: Mapping[str, TensorRef]
    metadata: Mapping[str, object]
    config: Config | None = None

    @property
    def module(self) -> str:
        """The path of the module that owns the tensor, with its dot."""
        return self.ref.name[: -len(self.leaf)]

    @property
    def leaf(self) -> str:
        """The last part of the tensor's name."""
        return self.ref.name.rpartition(".")[2]

    def beside(self, *leaves: str) -> TensorRef | None:
        """The first of some tensors of the same module."""
        found = (self.tensors.get(self.module + leaf) for leaf in leaves)
        return next((ref for ref in found if ref is not None), None)

    def after(self, *suffixes: str) -> TensorRef | None:
        """The first of some tensors whose name begins with this one's."""
        found = (self.tensors.get(self.ref.name + suffix) for suffix in suffixes)
        return next((ref for ref in found if ref is not None), None)


def missing(site: Site, *parts: str) -> Iterable[Fault]:
    """Something that the codes need is not there."""
    for part in parts:
        yield Fault("missing", site.ref.name, part, f"has no {part}")


def misshapen(ref: TensorRef, weight: tuple[int, ...], wanted: str) -> Fault:
    """A companion that cannot serve a weight of this shape."""
    return Fault(
        "shape",
        ref.name,
        ref.name.rpartition(".")[2],
        f"has shape {list(ref.shape)}, which does not fit a weight of {list(weight)}: {wanted}",
        {"shape": str(list(ref.shape)), "weight_shape": str(list(weight))},
    )


def exponents(ref: TensorRef) -> TensorRef:
    """A scale as the power of two that it is, where it is stored as plain bytes."""
    return replace(ref, dtype="F8_E8M0") if ref.dtype == "U8" else ref


def companions(kind: Kind, *refs: TensorRef | None) -> tuple[Companion, ...]:
    """Those that are there, as companions of one kind."""
    return tuple(Companion(ref, kind) for ref in refs if ref is not None)


#: Scales of activations and caches: beside the weight, no part of it.
ACTIVATIONS = (
    "input_scale", "scale_input", "output_scale", "input_global_scale", "act_scale",
    "k_scale", "v_scale", "q_scale", "kv_scale",
)  # fmt: skip


def activations(site: Site) -> tuple[Companion, ...]:
    """The scales of what the layer takes in and puts out."""
    return tuple(c for leaf in ACTIVATIONS for c in companions(Kind.GLOBAL, site.beside(leaf)))
