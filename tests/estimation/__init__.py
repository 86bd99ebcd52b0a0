"""Tests of the pipeline from a request to a fitted curvature."""
