"""Measure ``gradscope drift`` on two large files against ``gradscope weights`` on each of them, and
``gradscope manifest`` against sha256sum, as ratios of whole processes with warm page cache.

Prints one Markdown table. The bases come from make_data.py; what they are compared with is each of
their values times one plus a little noise, so that nearly every element differs.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import make_data
import numpy as np
from weights import (
    Command,
    Row,
    at_most,
    cat,
    default_gradscope,
    gradscope_weights,
    medians,
    memory_of,
    memory_row,
    row,
    run,
    sha256sum,
    table,
    valid,
)

#: Relative size of what is added.
NOISE = np.float32(0.01)


def trained(checkpoint: make_data.Checkpoint) -> Path:
    """Write the checkpoint with noise on every value, unless it is there whole."""
    base = make_data.make(checkpoint)
    path = base.with_name(f"{checkpoint.name}-trained.safetensors")
    if path.is_file() and path.stat().st_size == base.stat().st_size:
        return path
    part = path.with_suffix(".part")
    header, _ = make_data.header_of(checkpoint)
    with base.open("rb") as source, part.open("wb") as file:
        file.write(source.read(len(header)))
        for chunk in noisy(iter(lambda: source.read(1 << 23), b""), checkpoint.dtype):
            file.write(chunk)
    part.replace(path)
    return path


def noisy(chunks: Iterator[bytes], dtype: make_data.DType) -> Iterator[bytes]:
    random = np.random.Generator(np.random.SFC64(9))
    for chunk in chunks:
        if dtype == "BF16":
            values = (np.frombuffer(chunk, "<u2").astype(np.uint32) << 16).view(np.float32)
        else:
            values = np.frombuffer(chunk, "<f4")
        moved = values * (1 + NOISE * random.standard_normal(len(values), dtype=np.float32))
        yield (make_data.to_bf16(moved) if dtype == "BF16" else moved.astype("<f4")).tobytes()


def rows_of(
    what: str, gradscope: Sequence[str], checkpoint: make_data.Checkpoint, repeats: int
) -> list[Row]:
    base, new = make_data.make(checkpoint), trained(checkpoint)
    for path in (base, new):
        run(cat(path))  # into the page cache
    options = ("--format", "json", "--fail-on", "never")
    drift = Command((*gradscope, "drift", str(base), str(new), *options))
    manifest = Command((*gradscope, "manifest", str(base)))
    memory = memory_of(drift)
    commands = [drift, *(gradscope_weights(gradscope, p) for p in (base, new)), manifest]
    both, one, two, hashed, hashing = medians([*commands, sha256sum(base)], repeats)

    def against() -> tuple[str, bool]:
        mine, apart = valid(both), valid(one) + valid(two)
        return f"{mine / apart:.2f}× ({mine:.2f} s / {apart:.2f} s)", mine <= 1.3 * apart

    return [
        row(f"`drift`, {what}", "`weights` on both", "≤ 1.3×", against),
        memory_row(f"`drift`, {what}", memory),
        row(f"`manifest`, {what}", "sha256sum", "≤ 0.5×", at_most(0.5, hashed, hashing)),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gradscope", default=default_gradscope(), help="the command to measure")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each (median)")
    arguments = parser.parse_args()
    gradscope = shlex.split(arguments.gradscope)
    rows = rows_of("2 GB bf16", gradscope, make_data.BF16, arguments.repeats)
    rows += rows_of("1 GB f32", gradscope, make_data.F32, arguments.repeats)
    print(table(rows))
    print(f"\n{os.cpu_count()} cores, Python {sys.version.split()[0]}")


if __name__ == "__main__":
    main()
