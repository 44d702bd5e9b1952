"""Which tensors the shell patterns of ``--include`` and ``--exclude`` leave, and which fit none."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from fnmatch import translate

from gradscope.checkpoints.tensors import Checkpoint, Skipped, TensorRef
from gradscope.text import quoted

Match = Callable[[str], object]


def filtered(checkpoint: Checkpoint, include: Sequence[str], exclude: Sequence[str]) -> Checkpoint:
    """The checkpoint with the tensors that the patterns want; the others are skipped on request."""
    if not (include or exclude):
        return checkpoint
    wanted, unwanted = matcher(include or ["*"]), matcher(exclude)
    kept: list[TensorRef] = []
    left_out: list[TensorRef] = []
    for ref in checkpoint.tensors:
        (kept if wanted(ref.name) and not unwanted(ref.name) else left_out).append(ref)
    reason = "left out by --include or --exclude"
    names = [ref.name for ref in checkpoint.tensors]
    return replace(
        checkpoint,
        tensors=tuple(kept),
        left_out=tuple(left_out),
        skipped=(
            *checkpoint.skipped,
            *(Skipped(ref.name, reason, deliberate=True) for ref in left_out),
        ),
        notes=(
            *checkpoint.notes,
            *unmatched("--include", include, names),
            *unmatched("--exclude", exclude, names),
        ),
    )


def narrowed(include: Sequence[str], exclude: Sequence[str]) -> list[str]:
    """The options by which only a part of a checkpoint is looked at."""
    return [*(f"--include {p}" for p in include), *(f"--exclude {p}" for p in exclude)]


def matcher(patterns: Sequence[str]) -> Match:
    """Whether a whole name fits any of some shell patterns."""
    return re.compile("|".join(translate(p) for p in patterns) or r"(?!)").match


def unmatched(option: str, patterns: Sequence[str], names: Sequence[str]) -> Iterator[str]:
    """What to say of patterns that no name fits."""
    for pattern in patterns:
        matches = matcher([pattern])
        if names and not any(map(matches, names)):
            yield f"{option} {quoted(pattern)} matches no tensor's name{_hint(pattern, names)}"


def _hint(pattern: str, names: Sequence[str]) -> str:
    """What to try instead: what a regular expression would be here, or a name with more to it."""
    if (meant := _as_regex(pattern)) is not None and any(map(meant.search, names)):
        tried = _shell(pattern)
        works = tried != pattern and any(map(matcher([tried]), names))
        example = f": try {quoted(tried)}" if works else ""
        return f"; these are shell patterns (*, ?, [ab]), not regular expressions{example}"
    for tried in (f"{pattern}*", f"*{pattern}", f"*{pattern}*"):
        if any(map(matcher([tried]), names)):
            return f"; a pattern must match the whole name: try {quoted(tried)}"
    return f"; the names are like {quoted(names[0])}"


def _as_regex(pattern: str) -> re.Pattern[str] | None:
    r"""A pattern that has what only regular expressions have: ``\.``, ``^``, ``.*``, ``(a|b)``."""
    if not re.search(r"\\|^\^|\$$|\.[*+]|[+|(){}]", pattern):
        return None
    try:
        return re.compile(pattern)
    except (re.error, OverflowError, RecursionError):
        return None


def _shell(pattern: str) -> str:
    """A simple regular expression as a shell pattern that matches at least the same names."""
    text = re.sub(r"\\[dwWSDs][+*?]?|\[[^]]*\][+*?]|\([^()]*\)[+*?]?|\.[+*]\??|\.\?", "*", pattern)
    text = re.sub(r"\\(.)", r"\1", text)
    start = "" if text.startswith("^") else "*"
    end = "" if text.endswith("$") else "*"
    return re.sub(r"\*+", "*", f"{start}{text.removeprefix('^').removesuffix('$')}{end}")
