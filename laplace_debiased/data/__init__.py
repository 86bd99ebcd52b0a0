"""From a loader and a budget to weighted, disjoint batches: no model and no curvature here."""

from laplace_debiased.data.block import Block
from laplace_debiased.data.build import (
    batches_overlap,
    plan_from_supply,
    plan_from_two_loaders,
)
from laplace_debiased.data.coefficients import (
    draw_coefficients,
    magnitude_coefficients,
)
from laplace_debiased.data.loaders import loader_length, split_batch, whole_loader
from laplace_debiased.data.plan import Batch, CurvaturePlan, Draws, PoolScores, Share
from laplace_debiased.data.pool import Kept, Score, plan_by_curvature, score_pool
from laplace_debiased.data.supply import Supply
from laplace_debiased.data.weighted import draw_weighted_folds, sampling_probabilities

__all__ = [
    "Batch",
    "Block",
    "CurvaturePlan",
    "Draws",
    "Kept",
    "PoolScores",
    "Score",
    "Share",
    "Supply",
    "batches_overlap",
    "draw_coefficients",
    "draw_weighted_folds",
    "loader_length",
    "magnitude_coefficients",
    "plan_by_curvature",
    "plan_from_supply",
    "plan_from_two_loaders",
    "sampling_probabilities",
    "score_pool",
    "split_batch",
    "whole_loader",
]
