"""Debiased conjugate gradients as an optimiser: one solve, and whole training runs."""
