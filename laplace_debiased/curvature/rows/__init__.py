"""Rows of one parameter tensor, and how they are made by rules of operations."""

from laplace_debiased.curvature.rows.gram import input_factor
from laplace_debiased.curvature.rows.parameters import BiasRows, MatrixRows, TokenRows, VectorRows

__all__ = ["BiasRows", "MatrixRows", "TokenRows", "VectorRows", "input_factor"]
