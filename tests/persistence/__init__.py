"""Files, copies, fingerprints and checkpoints."""
