"""Low-rank curvature of any differentiable network: rows, Gram matrices, Lanczos.

Only the generalized Gauss-Newton matrix (or the Fisher matrices that share its form) is
decomposed. The Hessian has negative eigenvalues, and a precision with them is no posterior.
"""
