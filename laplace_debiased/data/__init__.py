"""From a loader and a budget to weighted, disjoint batches: no model and no curvature here."""

from laplace_debiased.data.rng import preserved_rng

__all__ = ["preserved_rng"]
