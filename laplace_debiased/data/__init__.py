"""From a loader and a budget to weighted, disjoint batches: no model and no curvature here."""
