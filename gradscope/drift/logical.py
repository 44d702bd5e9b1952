"""A checkpoint as the tensors that its model computes with: quantised weights by their values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from gradscope.checkpoints.tensors import Checkpoint, Decoding, TensorRef
from gradscope.quantization.headers import told_by_headers
from gradscope.quantization.weights import QuantizedWeight

#: How codes are laid out, by how values are computed from them; of None, which is no codes, None.
Schemes = Mapping[Decoding | None, str]


@dataclass(frozen=True, slots=True)
class Logical:
    """The tensors in file order, and the quantised weight that each of some is."""

    tensors: tuple[TensorRef, ...]
    quantized: Mapping[str, QuantizedWeight]

    @property
    def schemes(self) -> Schemes:
        """Of every weight in codes, and of each expert of a stack."""
        known = self.quantized
        return {r.decoding: known[r.name].scheme for r in self.tensors if r.name in known}


def logical(checkpoint: Checkpoint) -> Logical:
    """Codes become the values that they stand for; their scales and tables are part of those.

    Weights whose values cannot be computed stay as they are stored. Raises InputError as a tile
    does.
    """
    from gradscope.quantization.recognise import recognise

    known = [w for w in recognise(checkpoint).weights if w.values is not None]
    values = {w.codes.name: _named(w) for w in known}
    beside = {c.name for w in known for c in w.companions} - set(values)
    tensors = (values.get(ref.name, ref) for ref in checkpoint.tensors if ref.name not in beside)
    return Logical(tuple(tensors), {values[w.codes.name].name: w for w in known})


def by_headers(checkpoint: Checkpoint) -> Logical:
    """The same of what headers tell; nothing is read."""
    known = told_by_headers(checkpoint)
    tensors = (known[r.name].values or r if r.name in known else r for r in checkpoint.tensors)
    return Logical(tuple(tensors), known)


def _named(weight: QuantizedWeight) -> TensorRef:
    values = weight.values
    assert values is not None
    return replace(values, name=weight.name.removesuffix("._data"))
