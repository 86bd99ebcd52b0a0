"""Networks that people use, at their smallest, with random weights."""
