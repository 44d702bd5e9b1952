"""Which device the work runs on: the one place where the value of ``--device`` is understood."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

from gradscope.errors import UsageError
from gradscope.text import plural, quoted

if TYPE_CHECKING:
    import torch

AUTO = "auto"
CPU = "cpu"

_INSTALL = "builds of torch for each accelerator: https://pytorch.org/get-started/locally/"


def resolve(device: str) -> torch.device:
    """The torch device that ``--device`` names, tested by a value sent there and back.

    ``auto`` is this machine's accelerator if it has one, else the CPU. Any other name is that
    device or a UsageError: work meant for a GPU never moves to the CPU unnoticed.
    """
    import torch

    if device == AUTO:
        return _accelerator() or torch.device(CPU)
    try:
        found = torch.device(device)
    except RuntimeError:
        raise UsageError(
            f"device {quoted(device, 40)}: torch does not know that name. {_available()}"
        ) from None
    if found.type != CPU:
        _try(found, device)
    return found


def has_float64(device: torch.device) -> bool:
    """Whether a device computes in double precision (Apple's GPUs do not)."""
    import torch

    try:
        torch.zeros(1, dtype=torch.float64, device=device)
    except (RuntimeError, TypeError):
        return False
    return True


def _accelerator() -> torch.device | None:
    import torch

    with warnings.catch_warnings():  # a CUDA build on a machine without its driver says so here
        warnings.filterwarnings("ignore", message="CUDA initialization")
        available = torch.accelerator.is_available()
    return torch.accelerator.current_accelerator() if available else None


def _try(device: torch.device, name: str) -> None:
    """Send a value there and back, because only use shows that driver and device are in order."""
    import torch

    try:
        torch.ones(1, device=device).cpu()
    except Exception as error:  # torch raises nearly every type here, AssertionError included
        raise UsageError(
            f"device {quoted(name, 40)}: {_why_absent(device, error)}. {_available()}"
        ) from None


def _why_absent(device: torch.device, error: Exception) -> str:
    import torch

    if device.type == "meta":
        return "it computes shapes only and holds no values"
    if device.type == "cuda" and torch.version.cuda is None and torch.version.hip is None:
        return f"this torch build ({torch.__version__}) has no CUDA; {_INSTALL}"
    accelerator = _accelerator()
    if accelerator is not None and accelerator.type == device.type:
        return f"this machine has {plural(torch.accelerator.device_count(), 'device')} of that type"
    reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
    if device.type == "cuda":
        return f"{reason}; `nvidia-smi` shows whether the driver sees a GPU"
    return f"this torch build ({torch.__version__}) cannot use it: {reason[:200]}; {_INSTALL}"


def _available() -> str:
    return f"Available here: {', '.join(devices())}"


def devices() -> list[str]:
    """What ``--device`` accepts on this machine, ``auto`` aside."""
    import torch

    accelerator = _accelerator()
    if accelerator is None:
        return [CPU]
    return [CPU, *(f"{accelerator.type}:{i}" for i in range(torch.accelerator.device_count()))]
