"""Directional profiles, eigenspace overlap and a laboratory in which the bias is known."""

from laplace_debiased.diagnostics.eigen import Eigenpairs, eigenspace_overlap, top_eigenpairs
from laplace_debiased.diagnostics.estimates import DirectionalQuadratic, MeanEstimate
from laplace_debiased.diagnostics.laboratory import LinearRegressionLab, enumerate_batch_pairs
from laplace_debiased.diagnostics.plots import plot_eigenspaces, plot_profiles
from laplace_debiased.diagnostics.profile import (
    DirectionalProfile,
    directional_profile,
    profile_from_directions,
)
from laplace_debiased.diagnostics.summary import BiasSummary
from laplace_debiased.diagnostics.sweep import BatchSizeSweep, batch_size_sweep, disjoint_batches

__all__ = [
    "BatchSizeSweep",
    "BiasSummary",
    "DirectionalProfile",
    "DirectionalQuadratic",
    "Eigenpairs",
    "LinearRegressionLab",
    "MeanEstimate",
    "batch_size_sweep",
    "directional_profile",
    "disjoint_batches",
    "eigenspace_overlap",
    "enumerate_batch_pairs",
    "plot_eigenspaces",
    "plot_profiles",
    "profile_from_directions",
    "top_eigenpairs",
]
