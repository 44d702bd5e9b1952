"""The blur, by SciPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from gradscope.attribution.formulas.blur import gaussian_blur


@pytest.mark.parametrize("sigma", [1.0, 2.0])
@pytest.mark.parametrize("shape", [(20, 31), (5, 4), (1, 1)])
def test_a_blur_is_scipys_gaussian_with_reflected_borders(
    shape: tuple[int, int], sigma: float
) -> None:
    image = torch.rand((3, *shape), generator=torch.Generator().manual_seed(0)).double()

    found = gaussian_blur(image, sigma)

    reach = round(3 * sigma)
    if min(shape) > reach:
        wanted = [gaussian_filter(c, sigma, mode="mirror", radius=reach) for c in image.numpy()]
        np.testing.assert_allclose(found, np.stack(wanted), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(gaussian_blur(torch.ones(2, *shape), 2.0), torch.ones(2, *shape))
