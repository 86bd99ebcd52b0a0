"""What one call of an operation says about the parameters that it reads."""

from laplace_debiased.curvature.operations import convolution, embedding, linear, norms
from laplace_debiased.curvature.operations.call import (
    OperationCall,
    OperationRule,
    Reading,
    RuleDefaults,
    Use,
    register_operation_rule,
    registered_operations,
)
from laplace_debiased.curvature.operations.linear import LinearRule
from laplace_debiased.curvature.operations.plain import PlainRule
from laplace_debiased.curvature.operations.views import Place, matrix_place, vector_place

for _module in (linear, convolution, embedding, norms):
    for _function, _rule in _module.rules().items():
        register_operation_rule(_function, _rule)

__all__ = [
    "LinearRule",
    "OperationCall",
    "OperationRule",
    "Place",
    "PlainRule",
    "Reading",
    "RuleDefaults",
    "Use",
    "matrix_place",
    "register_operation_rule",
    "registered_operations",
    "vector_place",
]
