"""The types of ggml, as GGUF files name them by number."""

from __future__ import annotations

from dataclasses import dataclass

#: Where a checkpoint's metadata have the block type of each tensor by name.
BLOCKS_KEY = "gguf.blocks"
#: By number: those whose elements lie one after the other, in our spelling.
PLAIN = {
    0: "F32", 1: "F16", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64", 30: "BF16"
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class BlockType:
    """A type whose elements lie in blocks with what scales them.

    ``shared`` of them have one scale; 0 where a code stands for several elements at once.
    """

    name: str
    elements: int
    nbytes: int
    shared: int = 0

    @property
    def bits(self) -> int:
        """Bits of a code, which the name begins with."""
        return int(next(char for char in self.name if char.isdigit()))


#: By number. Elements and bytes of a block are those of ggml-common.h.
BLOCKS = {
    2: BlockType("Q4_0", 32, 18, 32),
    3: BlockType("Q4_1", 32, 20, 32),
    6: BlockType("Q5_0", 32, 22, 32),
    7: BlockType("Q5_1", 32, 24, 32),
    8: BlockType("Q8_0", 32, 34, 32),
    9: BlockType("Q8_1", 32, 40, 32),
    10: BlockType("Q2_K", 256, 84, 16),
    11: BlockType("Q3_K", 256, 110, 16),
    12: BlockType("Q4_K", 256, 144, 32),
    13: BlockType("Q5_K", 256, 176, 32),
    14: BlockType("Q6_K", 256, 210, 16),
    15: BlockType("Q8_K", 256, 292, 256),
    16: BlockType("IQ2_XXS", 256, 66),
    17: BlockType("IQ2_XS", 256, 74),
    18: BlockType("IQ3_XXS", 256, 98),
    19: BlockType("IQ1_S", 256, 50),
    20: BlockType("IQ4_NL", 32, 18, 32),
    21: BlockType("IQ3_S", 256, 110),
    22: BlockType("IQ2_S", 256, 82),
    23: BlockType("IQ4_XS", 256, 136, 32),
    29: BlockType("IQ1_M", 256, 56),
    34: BlockType("TQ1_0", 256, 54, 256),
    35: BlockType("TQ2_0", 256, 66, 256),
    39: BlockType("MXFP4", 32, 17, 32),
    40: BlockType("NVFP4", 64, 36, 16),
    41: BlockType("Q1_0", 128, 18, 128),
}
BY_NAME = {block.name: block for block in BLOCKS.values()}
