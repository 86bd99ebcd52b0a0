"""Random small networks against dense oracles."""
