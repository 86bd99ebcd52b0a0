"""Programs behind the figures: speed, memory, fidelity, bias, optimisation."""
