"""What the benchmarks share: networks and images, measured worker processes, tables."""
