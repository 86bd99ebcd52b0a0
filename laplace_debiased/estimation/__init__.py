"""From a request to a fitted curvature: plan, walk, fit."""
