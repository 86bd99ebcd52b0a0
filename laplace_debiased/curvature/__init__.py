"""From batches to numbers: recorded operations, Kronecker factors, directional curvature."""

from laplace_debiased.curvature.coverage import Coverage, host_coverage, operation_coverage
from laplace_debiased.curvature.factors import (
    BlockBasis,
    BlockFactors,
    FactorAccumulator,
    KroneckerFactors,
    MagnitudeAccumulator,
)
from laplace_debiased.curvature.features import CurvaturePass, FeaturePass, Head
from laplace_debiased.curvature.inspection import inspected
from laplace_debiased.curvature.operations.call import (
    OperationCall,
    Reading,
    RuleDefaults,
    register_operation_rule,
    registered_operations,
)
from laplace_debiased.curvature.operations.linear import LinearRule
from laplace_debiased.curvature.passes import BackwardPass, Chunk, identity_columns

__all__ = [
    "BackwardPass",
    "BlockBasis",
    "BlockFactors",
    "Chunk",
    "Coverage",
    "CurvaturePass",
    "FactorAccumulator",
    "FeaturePass",
    "Head",
    "KroneckerFactors",
    "LinearRule",
    "MagnitudeAccumulator",
    "OperationCall",
    "Reading",
    "RuleDefaults",
    "host_coverage",
    "identity_columns",
    "inspected",
    "operation_coverage",
    "register_operation_rule",
    "registered_operations",
]
