"""What a model and a loader may be."""
