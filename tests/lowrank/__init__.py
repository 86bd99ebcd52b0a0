"""Low-rank curvature, posteriors and their predictive."""
