"""Adapters: which tensors are the factors of one module's change, by their names.

An adapter stores a change of a module as a product. That of LoRA is B A; LoHa, LoKr and others have
more factors. Each method starts with one factor at zero, so that the product is zero, and a product
of which two are zero has no gradient at all.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol

#: Method -> what its factors are called. ``A`` and ``B`` of LoRA have further spellings below.
_METHODS: Mapping[str, str] = {
    "lora": r"lora_(?:A|B|a|b|E|down|up|mid|embedding_A|embedding_B)",
    "loha": r"hada_(?:w[12]_[ab]|t[12])",
    "lokr": r"lokr_(?:w[12](?:_[ab])?|t[12])",
    "vera": r"vera_(?:A|B|lambda_[bd])",
    "randlora": r"randlora_(?:A|B|lambda|gamma)",
    "poly": r"poly_lora_[AB]",
    "oft": r"oft_(?:r|R|blocks|diag)",
    "boft": r"boft_[Rs]",
    "ia3": r"ia3_l",
    "fourierft": r"fourierft_spectrum",
    "shira": r"shira_weight",
    "c3a": r"c3a_kernel",
    "hra": r"hra_u",
    "bone": r"(?:bone|miss)_block",
    "vb-lora": r"vblora_(?:logits_A|logits_B|vector_bank)",
}
#: PEFT puts the adapter's name and, for modules, ``weight`` behind a factor's name.
_FACTOR = re.compile(
    r"(?:^|\.)(?P<leaf>" + "|".join(f"(?P<{m.replace('-', '_')}>{p})" for m, p in _METHODS.items())
    + r")(?:\.(?P<adapter>(?!(?:bias|weight)$)\w[\w-]*))?(?:\.weight)?$"
)  # fmt: skip
#: diffusers' own: ``to_q_lora.down.weight``, ``lora_linear_layer.up.weight``, ``proj_lora1.down``.
_PROCESSOR = re.compile(
    r"(?:^|\.)(?P<own>\w*?)_?lora(?:\d+|_linear_layer|_conv_layer)?\.(?P<side>down|up)(?:\.weight)?$"
)
_MAYBE = re.compile(
    r"lora|hada_|lokr_|vera_|oft_|ia3_l|fourierft|shira|c3a_|hra_u|(bone|miss)_block"
)
_A, _B = ("A", "a", "down", "embedding_A"), ("B", "b", "up", "embedding_B")
#: What leaves a module as it is, where that is not a zero among the factors of a product: every
#: part of these methods at its value. A rotation is stored as its (zero) generator.
_IDENTITY: Mapping[str, Mapping[str, float]] = {
    "ia3": {"ia3_l": 1},
    "boft": {"boft_R": 0, "boft_s": 1},
}
#: Random projections that are not trained, shared by all modules, or that no module starts without.
_FROZEN = frozenset({"vera_A", "vera_B", "randlora_A", "randlora_B", "vblora_vector_bank"})


#: What multiplies all that a module gives: zeros leave nothing of it.
MULTIPLIERS = re.compile(r"(^|\.)(lora_magnitude_vector|ia3_l|boft_s)(\.|$)")


class Part(NamedTuple):
    """A factor of an adapter: the module that it changes, the method, and which factor."""

    module: str
    method: str
    factor: str
    #: PEFT's name of the adapter; a model may carry several.
    adapter: str = ""


def part(name: str) -> Part | None:
    """Which factor of which module's adapter a tensor is, by its name; None for anything else."""
    if not _MAYBE.search(name):
        return None
    if found := _FACTOR.search(name):
        method = next(m for m in _METHODS if found[m.replace("-", "_")])
        leaf, adapter = _spelled(found["leaf"]), found["adapter"] or ""
        return Part(name[: found.start()], method, leaf, adapter)
    if found := _PROCESSOR.search(name):
        module = f"{name[: found.start()]}.{found['own']}".strip(".")
        return Part(module, "lora", "A" if found["side"] == "down" else "B")
    return None


def _spelled(leaf: str) -> str:
    """One name for the factors of LoRA, whoever wrote them."""
    own = leaf.removeprefix("lora_")
    return "A" if own in _A and own != leaf else "B" if own in _B and own != leaf else leaf


class Named(Protocol):
    """What a module's adapter is told from: a tensor's address, or its measurements."""

    @property
    def name(self) -> str:
        """Its name."""
        ...

    @property
    def shape(self) -> tuple[int, ...]:
        """Its lengths."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class Adapter:
    """The adapter of one module: factor -> the tensor's name and shape."""

    module: str
    method: str
    #: Its name, where the file has one.
    adapter: str
    names: Mapping[str, str]
    shapes: Mapping[str, tuple[int, ...]]

    @property
    def trained(self) -> Mapping[str, str]:
        """The factors that training changes."""
        return {factor: name for factor, name in self.names.items() if factor not in _FROZEN}

    @property
    def judged(self) -> bool:
        """Whether the values of the factors tell that a module is left as it is."""
        return self.method not in ("hra", "vb-lora")

    @property
    def neutral(self) -> Mapping[str, float] | None:
        """The value of each factor that together leave the module as it is; None for products."""
        return _IDENTITY.get(self.method)

    @property
    def layout(self) -> Layout | None:
        """How the factors share a dimension; None where there are none, or they share none."""
        first, second = _PAIRS.get(self.method, ("", ""))
        a, b = self.shapes.get(first, ()), self.shapes.get(second, ())
        if len(a) < 2 or len(b) < 2 or self.tucker:
            return None
        found = [Layout(a[0])] if a[0] == b[1] else []
        flipped = len(a) == len(b) == 2 and a[1] == b[0] <= max(a[0], b[1])
        if flipped:  # MLX multiplies from the other side
            found.append(Layout(a[1], flipped=True))
        if not found and b[1] and a[0] % b[1] == 0:
            return Layout(b[1], grouped=True)
        return min(found, default=None, key=lambda layout: layout.rank)

    @property
    def tucker(self) -> bool:
        """Whether a core tensor stands between the factors of a convolution."""
        return not {"lora_mid", "hada_t1", "hada_t2", "lokr_t2", "lokr_t1"}.isdisjoint(self.names)

    @property
    def pruned(self) -> bool:
        """Whether AdaLoRA took all of its rank away: its factors are empty."""
        return 0 in self.shapes.get("lora_E", ())

    @property
    def lacks(self) -> str | None:
        """The one of a pair of factors that is not there."""
        pair = _PAIRS.get(self.method, ())
        missing = [factor for factor in pair if factor not in self.names]
        return missing[0] if len(missing) == 1 else None

    @property
    def fits(self) -> bool:
        """Whether the factors can be multiplied, as far as their shapes tell."""
        pair = [self.shapes.get(factor, ()) for factor in _PAIRS.get(self.method, ("",))]
        matrices = all(len(shape) > 1 and 0 not in shape for shape in pair)
        return not matrices or self.tucker or self.layout is not None


@dataclass(frozen=True, slots=True)
class Layout:
    """The rank that two factors share, and where."""

    rank: int
    #: A is [in, rank] and B [rank, out].
    flipped: bool = False
    #: A holds several times the rank of B: stacked experts, one A for the parts of a fused layer.
    grouped: bool = False


#: The factors whose shared dimension is the rank.
_PAIRS: Mapping[str, tuple[str, str]] = {"lora": ("A", "B"), "loha": ("hada_w1_b", "hada_w1_a")}


def adapters(tensors: Iterable[Named]) -> tuple[Adapter, ...]:
    """The adapters among the tensors of a checkpoint, in file order."""
    names: dict[tuple[str, str, str], dict[str, str]] = defaultdict(dict)
    shapes: dict[tuple[str, str, str], dict[str, tuple[int, ...]]] = defaultdict(dict)
    for tensor in tensors:
        if found := part(tensor.name):
            key = (found.module, found.method, found.adapter)
            names[key][found.factor] = tensor.name
            shapes[key][found.factor] = tensor.shape
    made = (Adapter(*key, factors, shapes[key]) for key, factors in names.items())
    return tuple(adapter for adapter in made if adapter.trained)
