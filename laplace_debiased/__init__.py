"""Calibrated uncertainty from a small curvature budget, as a plugin for laplace-torch."""
