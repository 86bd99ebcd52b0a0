"""Fixed standard normal points that stand for a Gaussian: quasi-Monte Carlo."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from laplace_debiased.network.grad_modes import outside_inference_mode

POINTS = 256
"""Points of the default link. On a public ResNet-20 at its tuned prior their KL to the integral is
0.2e-3 nats; 100 random draws have 2.5e-3."""

_SEED = 0

_RESOLUTION_BITS = 15
"""Points are multiples of 2⁻¹⁵; none exceeds 8 = 2³ in size, so that each has 18 bits."""

POINT_BITS = _RESOLUTION_BITS + 3


@lru_cache(maxsize=32)
def normal_points(n_dimensions: int, n_points: int) -> Tensor:
    """Standard normal points [n_dimensions, n_points], float64, on the CPU, always the same.

    A scrambled Sobol sequence (Owen 1998) of a fixed seed through the inverse normal distribution
    function; a longer set begins with the shorter one. Beyond 21,201 dimensions, where no Sobol
    sequence is tabulated, seeded pseudo-random points. The result is shared: do not change it.
    """
    with outside_inference_mode(), torch.no_grad():
        if n_dimensions <= torch.quasirandom.SobolEngine.MAXDIM:
            engine = torch.quasirandom.SobolEngine(n_dimensions, scramble=True, seed=_SEED)
            uniform = engine.draw(n_points, dtype=torch.float64)
            half_step = 0.5**31  # the sequence has 30 bits, and the first point may be zero
            normal = math.sqrt(2.0) * torch.erfinv(2.0 * uniform.clamp_min(half_step) - 1.0)
        else:
            generator = torch.Generator().manual_seed(_SEED)
            shape = (n_points, n_dimensions)
            normal = torch.randn(shape, generator=generator, dtype=torch.float64).clamp(-7.9, 7.9)
        scale = 2.0**_RESOLUTION_BITS
        return (normal * scale).round().div_(scale).T.contiguous()
