"""Several processes as one: who is there, sums over all, work shared out, errors that reach all.

Nothing here knows of curvature. ``torch.distributed`` is looked at when a collective call begins.
"""

from laplace_debiased.parallel.jobs import Job, Result, Runner, in_turn, shared_out
from laplace_debiased.parallel.ranks import ALONE, Ranks
from laplace_debiased.parallel.sums import assembled, from_triangle, summed, triangle_of

__all__ = [
    "ALONE",
    "Job",
    "Ranks",
    "Result",
    "Runner",
    "assembled",
    "from_triangle",
    "in_turn",
    "shared_out",
    "summed",
    "triangle_of",
]
