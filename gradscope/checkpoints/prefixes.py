"""What wrappers put before the names of all tensors."""

from __future__ import annotations

from collections.abc import Sequence

#: Of DDP and DataParallel, and of torch.compile.
_PREFIXES = ("module.", "_orig_mod.")


def shared_prefix(names: Sequence[str]) -> str:
    """What all of these names begin with that wrappers put there, perhaps several of them."""
    found = ""
    while prefix := next((p for p in _PREFIXES if _all_start(names, found + p)), None):
        found += prefix
    return found


def _all_start(names: Sequence[str], prefix: str) -> bool:
    return bool(names) and all(n.startswith(prefix) and len(n) > len(prefix) for n in names)
