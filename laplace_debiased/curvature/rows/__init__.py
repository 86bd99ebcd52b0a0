"""Rows of one parameter tensor: what a chunk's pull-backs say about its curvature."""

from laplace_debiased.curvature.rows.base import (
    Basis,
    BlockRows,
    FactorRule,
    input_factor,
    stacked,
)
from laplace_debiased.curvature.rows.gram import Factor, RowsFactor
from laplace_debiased.curvature.rows.layer import LayerRows, same_column_factor
from laplace_debiased.curvature.rows.matrix import GroupedRows, MatrixRows
from laplace_debiased.curvature.rows.positions import PositionRows
from laplace_debiased.curvature.rows.rotated import RankOneRows, RotatedRows
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
    "LayerRows",
    "MatrixRows",
    "PositionRows",
    "RankOneRows",
    "RotatedRows",
    "RowsFactor",
    "TokenRows",
    "VectorRows",
    "input_factor",
    "per_token",
    "same_column_factor",
    "stacked",
    "token_factor",
]
