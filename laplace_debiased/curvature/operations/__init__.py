"""What one call of an operation says about the parameters that it reads."""

from laplace_debiased.curvature.operations import convolution, embedding, linear, norms
from laplace_debiased.curvature.operations.call import register_operation_rule

for _module in (linear, convolution, embedding, norms):
    for _function, _rule in _module.RULES.items():
        register_operation_rule(_function, _rule)
