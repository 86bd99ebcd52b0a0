"""Calibrated uncertainty from a small curvature budget: directions from one batch, magnitudes from another."""
