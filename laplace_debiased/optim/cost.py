"""What a step costs, in gradients of single samples.

One forward pass is a third of a gradient (a backward pass costs two forward passes). A product with
a GGN or a Hessian counts two gradients, as is usual (Pearlmutter 1994; Schraudolph 2002; Martens
2010, section 2). The vector arithmetic of conjugate gradients is left out.
"""

from typing import Final

GRADIENTS_PER_PRODUCT: Final = 2.0
GRADIENTS_PER_FORWARD: Final = 1.0 / 3.0


def sample_gradients(
    n_samples: int, *, n_gradients: int = 0, n_products: int = 0, n_forwards: int = 0
) -> float:
    """Cost of so many passes over a batch of ``n_samples``, in gradients of one sample."""
    per_sample = (
        n_gradients + GRADIENTS_PER_PRODUCT * n_products + GRADIENTS_PER_FORWARD * n_forwards
    )
    return n_samples * per_sample
