"""Tests of the calibration metrics, plots and baseline."""
