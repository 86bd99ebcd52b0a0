"""Low-rank curvature of any differentiable network: rows, Gram matrices, Lanczos, directions.

Only the generalized Gauss-Newton matrix (or the Fisher matrices that share its form) is
decomposed. The Hessian has negative eigenvalues, and a precision with them is no posterior.
"""

from laplace_debiased.curvature.coverage import parameter_coverage
from laplace_debiased.curvature.lowrank.directions import (
    Costs,
    DirectionPass,
    Route,
    projection_costs,
)
from laplace_debiased.curvature.lowrank.feature_rows import FeatureRowPass
from laplace_debiased.curvature.lowrank.products import lanczos_eigenpairs
from laplace_debiased.curvature.lowrank.rows import RowPass, Tile
from laplace_debiased.curvature.lowrank.span import (
    Eigenpairs,
    JoinedPart,
    SpanDirections,
    combined_rows,
    core_root,
    gram_matrix,
    matrix_average,
    orthonormal_pairs,
    relative_cutoff,
    span_eigenpairs,
)
from laplace_debiased.network.functional import FunctionalNetwork
from laplace_debiased.network.modes import differentiable_kernels

__all__ = [
    "Costs",
    "DirectionPass",
    "Eigenpairs",
    "FeatureRowPass",
    "FunctionalNetwork",
    "JoinedPart",
    "Route",
    "RowPass",
    "SpanDirections",
    "Tile",
    "combined_rows",
    "core_root",
    "differentiable_kernels",
    "gram_matrix",
    "lanczos_eigenpairs",
    "matrix_average",
    "orthonormal_pairs",
    "parameter_coverage",
    "projection_costs",
    "relative_cutoff",
    "span_eigenpairs",
]
