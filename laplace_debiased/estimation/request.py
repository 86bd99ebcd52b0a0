"""One call of ``fit``: what it asks for, and what it stands for where it leaves a choice."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from laplace_debiased.checks import as_integer, checked_flag, checked_number
from laplace_debiased.data import whole_loader
from laplace_debiased.files import PathLike
from laplace_debiased.options import Scheme

AUTO = "auto"
"""The budget that the structure recommends."""


@dataclass(frozen=True, eq=False)
class FitRequest:
    """The arguments of one call of ``fit``.

    Attributes:
        train_loader: the training loader (B with a magnitude loader), whole where it was shared
            out over processes.
        magnitude_loader: B̃, or None.
        n_samples: curvature budget in all; None for everything, "auto" for what is recommended.
        n_data: N where it is not the size of the data set.
        seed: seed of all draws.
        override: whether an earlier fit is replaced.
        progress_bar: show progress.
        dict_key_y: key of the targets in mapping batches.
        checkpoint: file for what the fit has so far, or None.
        checkpoint_interval: seconds between two writes of it.

    Raises:
        ValueError: for a budget that is another string, or a loader that cannot be made whole.
        ArgumentTypeError: for a seed that is no integer.
    """

    train_loader: Any
    magnitude_loader: Any = None
    n_samples: int | str | None = AUTO
    n_data: int | None = None
    seed: int = 0
    override: bool = True
    progress_bar: bool = False
    dict_key_y: str = "labels"
    checkpoint: PathLike | None = None
    checkpoint_interval: float = 60.0

    def __post_init__(self) -> None:
        for name in ("train_loader", "magnitude_loader"):
            object.__setattr__(self, name, whole_loader(getattr(self, name), name))
        object.__setattr__(self, "seed", as_integer("seed", self.seed))
        checked_flag("override", self.override)
        checked_flag("progress_bar", self.progress_bar)
        interval = checked_number(
            "checkpoint_interval", self.checkpoint_interval, unit=" of seconds"
        )
        object.__setattr__(self, "checkpoint_interval", interval)
        if isinstance(self.n_samples, str) and self.n_samples != AUTO:
            raise ValueError(
                f"n_samples must be a positive integer, None or 'auto'; got {self.n_samples!r}."
            )

    @property
    def is_automatic(self) -> bool:
        """Whether the budget is left to the structure."""
        return isinstance(self.n_samples, str) and self.n_samples == AUTO

    @property
    def is_budget(self) -> bool:
        """Whether the call names a number of samples: with an earlier fit, N then stays."""
        return not self.is_automatic and self.n_samples is not None


def resolve_scheme(asked: Scheme | None, default: Scheme, request: FitRequest) -> Scheme:
    """The scheme of a fit: what was asked, or what the loaders imply.

    Raises:
        ValueError: if the loaders contradict it.
    """
    if request.magnitude_loader is None:
        return asked or default
    if request.is_budget:
        raise ValueError(
            "n_samples draws from one loader; with magnitude_loader both loaders are walked whole. "
            "Give one of the two."
        )
    if asked is Scheme.SINGLE:
        raise ValueError(
            "scheme='single' takes directions and magnitudes from one batch; drop "
            "magnitude_loader, or use scheme='two_batch'."
        )
    return asked or Scheme.TWO_BATCH
