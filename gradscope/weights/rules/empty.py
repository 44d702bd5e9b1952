"""The rule about tensors without elements: placeholders of a sharded optimizer, or meant."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from gradscope.report.rules import Observation, rule
from gradscope.report.severity import Severity
from gradscope.text import listed, plural
from gradscope.weights.leaves import Leaf, leaf_of
from gradscope.weights.names import common_pattern, pattern
from gradscope.weights.result import Examined, Need, TensorResult
from gradscope.weights.roles import split


@rule("C004", "empty-tensor", Severity.HIGH, reads=Examined, needs=Need.HEADERS)
def empty_tensor(examined: Examined, *, everywhere: float = 0.5) -> Iterator[Observation]:
    """A parameter has no elements where some are expected.

    ZeRO-3 leaves parameters of shape [0] when a checkpoint is saved without gathering them
    (transformers #20082, DeepSpeed #2413): more than half of all matrices, in one finding. A
    single one is out of place where the same tensor of another layer has elements, or the rest of
    its own layer. Other empty tensors are meant, as in layers of zero inputs and in equivariant
    layers (e3nn), whose flat weights are as many as they have paths, in one layer another number
    than in the next: info. Modules that AdaLoRA took all rank from are left out.
    """
    pruned = {name for a in examined.adapted if a.pruned for name in a.names.values()}
    empty = [t for t in examined.tensors if t.numel == 0 and t.name not in pruned]
    if not empty:
        return
    counts = {"empty_tensors": len(empty), "tensors": len(examined.tensors)}
    known = _Parameters.of(examined.tensors)
    if known.ungathered(everywhere) or len(empty) == len(examined.tensors):
        lost = known.placeholders or empty
        remedy = (
            "save again with the parameters gathered: DeepSpeed's zero_to_fp32.py or "
            "stage3_gather_16bit_weights_on_model_save, FSDP's full state dict"
        )
    else:
        lost = [t for t in known.placeholders if known.expect(t)]
        remedy = "restore it from the source of the checkpoint, or convert that again"
    if lost:
        yield _observed(lost, "without elements where a parameter is expected", remedy, counts)
    names = {t.name for t in lost}
    if meant := [t for t in empty if t.name not in names]:
        remedy = "nothing to do: a layer without weights or inputs is saved like this"
        yield _observed(meant, "without elements", remedy, counts, Severity.INFO)


def _observed(
    tensors: Sequence[TensorResult],
    what: str,
    remedy: str,
    counts: Mapping[str, int],
    severity: Severity | None = None,
) -> Observation:
    shapes = dict.fromkeys(str(list(t.shape)) for t in tensors)
    return Observation(
        tensors[0].name if len(tensors) == 1 else common_pattern(tensors),
        f"{plural(len(tensors), 'tensor')} of shape {listed(shapes, len(shapes))} {what}: "
        f"{listed((t.name for t in tensors), len(tensors))} "
        f"({counts['empty_tensors']:,} of {counts['tensors']:,} tensors are empty)",
        remedy,
        counts,
        severity=severity,
    )


_NORM = re.compile(r"norm|(^|[._])(ln|bn|gn|rms)", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class _Parameters:
    """The parameters of a checkpoint by what they tell of empty ones."""

    #: Of shape [0]: what is left of a parameter that another process holds.
    placeholders: Sequence[TensorResult]
    matrices: int
    #: Weights of one dimension that are no norm's: all weights of e3nn's layers are.
    flat: int
    by_pattern: Mapping[str, Sequence[TensorResult]]
    by_module: Mapping[str, Mapping[str, TensorResult]]

    @classmethod
    def of(cls, tensors: Iterable[TensorResult]) -> _Parameters:
        by_pattern: dict[str, list[TensorResult]] = defaultdict(list)
        by_module: dict[str, dict[str, TensorResult]] = defaultdict(dict)
        named = []
        for tensor in tensors:
            module, leaf = split(tensor.name)
            by_pattern[pattern(tensor.name)].append(tensor)
            by_module[module][leaf] = tensor
            if leaf_of(tensor.name) is Leaf.LAYER or "bias" in leaf:
                named.append(tensor)
        return cls(
            placeholders=[t for t in named if t.shape == (0,)],
            matrices=sum(len(t.shape) > 1 and t.numel > 0 for t in named),
            flat=sum(_is_flat_weight(t, by_module[split(t.name)[0]]) for t in named),
            by_pattern=by_pattern,
            by_module=by_module,
        )

    def ungathered(self, share: float) -> bool:
        """Whether most matrices are gone; flat weights that are there speak for e3nn."""
        gone = sum("bias" not in t.name and not self._equivariant(t) for t in self.placeholders)
        return gone > share * (gone + self.matrices + 3 * self.flat)

    def expect(self, tensor: TensorResult) -> bool:
        """Whether this empty parameter's likes in other layers, or its own layer, have elements."""
        if self._equivariant(tensor):
            return False
        module, leaf = split(tensor.name)
        likes = self.by_pattern[pattern(tensor.name)]
        if there := [t for t in likes if t.numel]:
            one_size = len(there) > 1 and len({t.numel for t in there}) == 1
            return one_size or not all(map(self._flat, there))
        if "bias" in leaf or len(likes) > 1:
            return False
        others = (t for name, t in self.by_module[module].items() if name != leaf)
        return any(t.numel for t in others) or (self.matrices > 0 and not self.flat)

    def _flat(self, tensor: TensorResult) -> bool:
        """Whether its layer has flat weights: as many as there are paths, which may be none."""
        module = self.by_module[split(tensor.name)[0]]
        return any(_is_flat_weight(t, module) for t in module.values())

    def _equivariant(self, tensor: TensorResult) -> bool:
        """Whether it is of one of e3nn's layers, which carry a mask of their outputs."""
        return "output_mask" in self.by_module[split(tensor.name)[0]]


def _is_flat_weight(tensor: TensorResult, siblings: Mapping[str, TensorResult]) -> bool:
    norm = _NORM.search(tensor.name) or "running_var" in siblings
    gain = any("bias" in name and s.shape == tensor.shape for name, s in siblings.items())
    weight = len(tensor.shape) == 1 and tensor.numel > 0 and "bias" not in tensor.name
    return bool(weight and not norm and not gain)
