"""Tests of the posterior precisions as values."""
