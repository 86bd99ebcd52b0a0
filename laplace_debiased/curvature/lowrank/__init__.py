"""Low-rank curvature of any differentiable network: rows, Gram matrices, Lanczos.

Only the generalized Gauss-Newton matrix (or the Fisher matrices that share its form) is
decomposed. The Hessian has negative eigenvalues, and a precision with them is no posterior.
"""

from laplace_debiased.curvature.lowrank.feature_rows import FeatureRowPass
from laplace_debiased.curvature.lowrank.over_ranks import (
    average_of_first,
    gram_over_ranks,
    pairs_over_ranks,
)
from laplace_debiased.curvature.lowrank.products import (
    Product,
    arpack_eigenpairs,
    ggn_product,
    lanczos_eigenpairs,
    product_cutoff,
    significant_pairs,
)
from laplace_debiased.curvature.lowrank.rows import RowPass, Tile
from laplace_debiased.curvature.lowrank.span import (
    Eigenpairs,
    JoinedPart,
    SpanDirections,
    core_root,
    gram_matrix,
    matrix_average,
    orthonormal_pairs,
    relative_cutoff,
    span_eigenpairs,
)

__all__ = [
    "Eigenpairs",
    "FeatureRowPass",
    "JoinedPart",
    "Product",
    "RowPass",
    "SpanDirections",
    "Tile",
    "arpack_eigenpairs",
    "average_of_first",
    "core_root",
    "ggn_product",
    "gram_matrix",
    "gram_over_ranks",
    "lanczos_eigenpairs",
    "matrix_average",
    "orthonormal_pairs",
    "pairs_over_ranks",
    "product_cutoff",
    "relative_cutoff",
    "significant_pairs",
    "span_eigenpairs",
]
