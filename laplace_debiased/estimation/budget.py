"""The curvature budget that a fit takes when the user names none."""

from __future__ import annotations

from typing import Any

from laplace_debiased.data.loaders import sampler_indices

RECOMMENDED_SAMPLES = 256
"""Samples of curvature for a posterior over all weights.

On the benchmark networks the mean divergence from the full-data posterior falls as 1/m; at 256 it
is below 1e-3 nats per prediction with room for an unlucky draw, and the forward pass over the pool,
which does not depend on m, is still the larger half of a fit (see the README).
"""

RECOMMENDED_LAST_LAYER_SAMPLES = 2_048
"""The same for a last layer: its curvature costs forward passes alone."""


def kron_budget(
    n_samples: object, loader: Any, *, elsewhere: bool, recommended: int = RECOMMENDED_SAMPLES
) -> Any:
    """The budget in samples, or None for all that the loader yields.

    Args:
        n_samples: as the user gave it. Anything but "auto" is passed on; what else is wrong with
            it, the plan says.
        loader: the training loader.
        elsewhere: whether something else decides which samples are taken: a magnitude loader, or
            an earlier fit that whole data sets are added to.
        recommended: what "auto" stands for where the data are more than that and can be drawn
            from; else it stands for everything.

    Raises:
        ValueError: for another string.
    """
    if not isinstance(n_samples, str):
        return n_samples
    if n_samples != "auto":
        raise ValueError(
            f"n_samples must be a positive integer, None or 'auto'; got {n_samples!r}."
        )
    if elsewhere:
        return None
    try:
        available = len(sampler_indices(loader))
    except (ValueError, TypeError, AttributeError):
        return None  # a stream, or a sampler that does not tell its indices: walked whole
    return recommended if available > recommended else None
