"""Posterior precisions as frozen values: Kronecker eigenbasis with a full table, and low rank.

Pure tensors: no model, no data. An operator knows its dense matrix, log-determinant, inverse, roots
and diagonals, and leaves its inputs as they are.
"""

from laplace_debiased.operators.eigen_block import EigenBlock
from laplace_debiased.operators.eigen_kron import EigenKron
from laplace_debiased.operators.low_rank import LowRank

__all__ = ["EigenBlock", "EigenKron", "LowRank"]
