"""Rows of one parameter tensor: what a chunk's pull-backs say about its curvature."""

from laplace_debiased.curvature.rows.base import (
    Basis,
    BlockRows,
    FactorRule,
    input_factor,
    stacked,
)
from laplace_debiased.curvature.rows.gram import Factor, RowsFactor
from laplace_debiased.curvature.rows.matrix import GroupedRows, MatrixRows
from laplace_debiased.curvature.rows.mixed import MixedRows, joined_rows
from laplace_debiased.curvature.rows.positions import PositionRows
from laplace_debiased.curvature.rows.products import Weights
from laplace_debiased.curvature.rows.rotated import RankOneRows, RotatedRows
from laplace_debiased.curvature.rows.size import RowsSize, largest_basis
from laplace_debiased.curvature.rows.tokens import TokenRows, per_token, token_factor
from laplace_debiased.curvature.rows.vectors import MAX_DENSE_VECTOR, BiasRows, VectorRows

__all__ = [
    "MAX_DENSE_VECTOR",
    "Basis",
    "BiasRows",
    "BlockRows",
    "Factor",
    "FactorRule",
    "GroupedRows",
    "MatrixRows",
    "MixedRows",
    "PositionRows",
    "RankOneRows",
    "RotatedRows",
    "RowsFactor",
    "RowsSize",
    "TokenRows",
    "VectorRows",
    "Weights",
    "input_factor",
    "joined_rows",
    "largest_basis",
    "per_token",
    "stacked",
    "token_factor",
]
