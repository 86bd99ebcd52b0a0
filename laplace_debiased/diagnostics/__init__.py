"""Directional profiles, eigenspace overlap and a laboratory in which the bias is known."""

from laplace_debiased.diagnostics.eigen import Eigenpairs, eigenspace_overlap, top_eigenpairs
from laplace_debiased.diagnostics.estimates import DirectionalQuadratic, MeanEstimate
from laplace_debiased.diagnostics.kfac_profile import KfacProfile, kfac_profile
from laplace_debiased.diagnostics.laboratory import LinearRegressionLab
from laplace_debiased.diagnostics.measure import directional_quadratic
from laplace_debiased.diagnostics.plots import plot_eigenspaces
from laplace_debiased.diagnostics.profile import (
    DirectionalProfile,
    directional_profile,
    plot_profiles,
)
from laplace_debiased.diagnostics.summary import BiasSummary
from laplace_debiased.diagnostics.sweep import BatchSizeSweep, batch_size_sweep, disjoint_batches

__all__ = [
    "BatchSizeSweep",
    "BiasSummary",
    "DirectionalProfile",
    "DirectionalQuadratic",
    "Eigenpairs",
    "KfacProfile",
    "LinearRegressionLab",
    "MeanEstimate",
    "batch_size_sweep",
    "directional_profile",
    "directional_quadratic",
    "disjoint_batches",
    "eigenspace_overlap",
    "kfac_profile",
    "plot_eigenspaces",
    "plot_profiles",
    "top_eigenpairs",
]
