"""Tests of debiased conjugate gradients and the Newton optimiser."""
