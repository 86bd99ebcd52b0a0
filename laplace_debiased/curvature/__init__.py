"""From batches to numbers: layer capture, Kronecker factors, directional curvature."""

from laplace_debiased.curvature.coverage import Coverage, CoverageError, layer_coverage, layers_of
from laplace_debiased.curvature.factors import (
    BlockBasis,
    BlockFactors,
    FactorAccumulator,
    KroneckerFactors,
    MagnitudeAccumulator,
)
from laplace_debiased.curvature.features import FeaturePass
from laplace_debiased.curvature.inspection import layer_problems
from laplace_debiased.curvature.layers import (
    Layer,
    LayerCall,
    LayerRule,
    LinearMapRule,
    register_layer_rule,
    registered_rules,
    rule_for,
)
from laplace_debiased.curvature.passes import (
    BackwardPass,
    Chunk,
    ColumnChunk,
    CurvaturePass,
    identity_columns,
)
from laplace_debiased.curvature.rows import LayerRows

__all__ = [
    "BackwardPass",
    "BlockBasis",
    "BlockFactors",
    "Chunk",
    "ColumnChunk",
    "Coverage",
    "CoverageError",
    "CurvaturePass",
    "FactorAccumulator",
    "FeaturePass",
    "KroneckerFactors",
    "Layer",
    "LayerCall",
    "LayerRows",
    "LayerRule",
    "LinearMapRule",
    "MagnitudeAccumulator",
    "identity_columns",
    "layer_coverage",
    "layer_problems",
    "layers_of",
    "register_layer_rule",
    "registered_rules",
    "rule_for",
]
