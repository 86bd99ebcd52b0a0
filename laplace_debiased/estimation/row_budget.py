"""How many samples a low-rank fit takes: what of their rows fits in memory."""

from __future__ import annotations

import torch
from torch import Tensor

from laplace_debiased.curvature.lowrank.rows import RowPass
from laplace_debiased.estimation.columns import columns_per_sample
from laplace_debiased.likelihoods import LossModel
from laplace_debiased.options import CurvatureOptions

ROW_BUDGETS = 4
"""The rows of the Gram route may take so many times the byte budget of a pass. They are as large as
the posterior's own basis when every direction is kept."""

MAX_GRAM_ROWS = 4096
"""The eigendecomposition of a Gram matrix of this size takes about half a minute on two cores."""


def fits_gram(n_rows: int, row_pass: RowPass, byte_budget: int) -> bool:
    """Whether so many rows, and their Gram matrix, are held in memory."""
    return n_rows <= _max_rows(row_pass, byte_budget)


def max_gram_samples(n_columns: int, row_pass: RowPass, byte_budget: int) -> int:
    """The largest number of samples with R columns each that the Gram route takes."""
    return _max_rows(row_pass, byte_budget) // n_columns


def automatic_budget(
    row_pass: RowPass, loss: LossModel, options: CurvatureOptions, outputs: Tensor, n_data: int
) -> int | None:
    """None for everything, or as many samples as the rows of which fit in memory.

    Args:
        row_pass: computes the rows.
        loss: the loss model.
        options: the choices.
        outputs: those of one sample [1, C].
        n_data: N.

    Raises:
        ValueError: if not even one sample per fold fits.
    """
    known = columns_per_sample(options, options.sketched(outputs[0].numel()))
    n_columns = loss.hessian_root(outputs).shape[-1] if known is None else known
    fitting = max_gram_samples(n_columns, row_pass, options.byte_budget)
    if n_data <= fitting:
        return None
    if fitting < options.n_folds:
        raise ValueError(
            f"the curvature rows of {options.n_folds} samples do not fit byte_budget="
            f"{options.byte_budget}. Pass a larger byte_budget, or a rank: that many leading "
            "directions are then found without rows."
        )
    return fitting


def _max_rows(row_pass: RowPass, byte_budget: int) -> int:
    network = row_pass.network
    row_bytes = network.n_params * torch.finfo(network.dtype).bits // 8
    return min(MAX_GRAM_ROWS, ROW_BUDGETS * byte_budget // row_bytes)
