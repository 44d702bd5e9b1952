"""The heavy algebra on a torch device that computes in float64."""

from __future__ import annotations

import numpy as np
import torch

from gradscope.device import AUTO, CPU, has_float64, resolve
from gradscope.errors import UsageError
from gradscope.spectra.algebra import Algebra, Chunks, Numpy, Values, leading


def algebra_on(device: str) -> Algebra:
    """The algebra of a device. ``auto`` takes an accelerator only if it computes in float64.

    Raises UsageError for a device that is absent or, if named, does not compute in float64.
    """
    found = resolve(device)
    if found.type == CPU:
        return Numpy()
    if has_float64(found):
        return Torch(found)
    if device == AUTO:
        return Numpy()
    raise UsageError(
        f"device {device!r} does not support float64, which spectra need; use --device {CPU}"
    )


class Torch:
    """On a torch device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def eigenvalues(self, chunks: Chunks, columns: int) -> Values:
        """From the Gram matrix of the short side, in float64."""
        gram = torch.zeros((columns, columns), dtype=torch.float64, device=self.device)
        for chunk in chunks():
            wide = torch.from_numpy(chunk).to(self.device).double()
            gram += wide.T @ wide
        found = torch.linalg.eigvalsh(gram).cpu().numpy()
        return np.asarray(np.maximum(found, 0.0), np.float64)

    def norm(self, chunks: Chunks, columns: int) -> float:
        """By Lanczos' method; the matrix is sent once."""
        parts = [torch.from_numpy(chunk).to(self.device) for chunk in chunks()]

        def product(vector: Values) -> Values:
            total = torch.zeros(columns, dtype=torch.float64, device=self.device)
            for part in parts:
                sent = torch.from_numpy(vector).to(self.device).to(part.dtype)
                image = part @ sent
                unit = float(image.abs().max()) or 1.0  # in float32, products may be too small
                total += unit * (part.T @ (image / unit)).double()
            return total.cpu().numpy()

        return leading(product, columns)
