"""Noisy linear imputation, by SciPy's sparse solver."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import sparse
from scipy.sparse.linalg import spsolve

from gradscope.attribution.evaluation.imputation import imputed

WEIGHTS = {(0, 1): 1 / 6, (1, 0): 1 / 6, (1, 1): 1 / 12, (1, -1): 1 / 12}
WEIGHTS |= {(-down, -across): weight for (down, across), weight in WEIGHTS.items()}


def solved(image: np.ndarray, gone: np.ndarray) -> np.ndarray:
    """Rong et al. 2022, section 4.2, row by row."""
    places = [tuple(p) for p in np.argwhere(gone)]
    number = {place: i for i, place in enumerate(places)}
    system = sparse.lil_matrix((len(places), len(places)))
    right = np.zeros(len(places))
    for (y, x), i in number.items():
        for (down, across), weight in WEIGHTS.items():
            other = (y + down, x + across)
            if not (0 <= other[0] < gone.shape[0] and 0 <= other[1] < gone.shape[1]):
                continue
            system[i, i] += weight
            if other in number:
                system[i, number[other]] -= weight
            else:
                right[i] += weight * image[other]
    found = image.copy()
    found[gone] = spsolve(system.tocsr(), right)
    return found


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("shape", [(12, 9), (5, 17)])
def test_removed_pixels_are_the_means_of_their_neighbours(
    share: float, shape: tuple[int, int]
) -> None:
    generator = torch.Generator().manual_seed(1)
    image = torch.rand((2, *shape), generator=generator).double() * 3 - 5
    gone = torch.rand((3, *shape), generator=generator) < share
    gone[:, 0, 0] = False  # something has to be left

    found = imputed(image, gone, 0, noise=0.0)

    for mask, filled in zip(gone, found, strict=True):
        for channel, values in zip(image, filled, strict=True):
            wanted = solved(channel.numpy(), mask.numpy())
            np.testing.assert_allclose(values.numpy(), wanted, atol=1e-3)


def test_noise_lies_on_removed_pixels_alone_and_a_removed_picture_is_its_mean() -> None:
    image = torch.rand((1, 30, 30), generator=torch.Generator().manual_seed(0))
    gone = torch.zeros(2, 30, 30, dtype=torch.bool)
    gone[0, :15], gone[1] = True, True

    half, whole = imputed(image, gone, 0, noise=0.1)

    assert torch.equal(half[:, 15:], image[:, 15:])
    assert float((whole - image.mean()).std()) == pytest.approx(0.1, rel=0.1)
    assert torch.equal(half, imputed(image, gone, 0, noise=0.1)[0])
    assert not torch.equal(half, imputed(image, gone, 1, noise=0.1)[0])
