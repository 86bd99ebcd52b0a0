"""Tests of the data room: loaders, budgets, folds, weighted draws."""
