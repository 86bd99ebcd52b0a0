"""Eigenpairs of symmetric matrices that a library's fastest algorithm may fail on."""

from __future__ import annotations

import numpy as np
import scipy.linalg
import torch
from torch import Tensor


def eigenpairs(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """``torch.linalg.eigh`` of positive semi-definite matrices [..., D, D], whatever their zeros.

    Dead units, samples without a gradient, and kernel positions that only ever read padding give
    rows of exact zeros. LAPACK's divide-and-conquer can fail to converge on many of them; their
    eigenvectors are unit vectors, so they are set apart. What it fails on all the same goes to QR
    iterations, which are slow and do not.

    Returns:
        Eigenvalues [..., D] and eigenvectors [..., D, D], ascending (zero rows first).

    Raises:
        torch.linalg.LinAlgError: if neither converges.
    """
    support = (matrix != 0).any(-1)
    if matrix.ndim > 2 or bool(support.all()) or not bool(support.any()):
        return _converged(matrix)
    inside, outside = support.nonzero().squeeze(-1), (~support).nonzero().squeeze(-1)
    found, vectors = _converged(matrix[inside[:, None], inside])
    n_zero = len(outside)
    values = torch.cat([found.new_zeros(n_zero), found])
    basis = torch.zeros_like(matrix)
    basis[outside, torch.arange(n_zero, device=matrix.device)] = 1.0
    basis[inside[:, None], torch.arange(n_zero, len(matrix), device=matrix.device)] = vectors
    return values, basis


def _converged(matrix: Tensor) -> tuple[Tensor, Tensor]:
    try:
        return torch.linalg.eigh(matrix)
    except torch.linalg.LinAlgError:
        flat = matrix.detach().cpu().double().reshape(-1, *matrix.shape[-2:]).numpy()
        try:
            pairs = [scipy.linalg.eigh(one, driver="ev") for one in flat]
        except (np.linalg.LinAlgError, ValueError) as error:
            raise torch.linalg.LinAlgError(str(error)) from error
        values, vectors = (np.stack(parts) for parts in zip(*pairs, strict=True))
        found = torch.from_numpy(values), torch.from_numpy(vectors)
        return found[0].reshape(matrix.shape[:-1]).to(matrix), found[1].reshape_as(matrix).to(
            matrix
        )
