"""Several processes as one: who is there, sums over all, work shared out, errors that reach all.

Nothing here knows of curvature. ``torch.distributed`` is looked at when a collective call begins.
"""
