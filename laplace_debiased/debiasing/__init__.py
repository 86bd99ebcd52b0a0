"""The schemes: which data give directions, which magnitudes, and how folds are joined."""
