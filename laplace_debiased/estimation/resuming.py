"""What identifies a fit, so that a checkpoint is continued by the same fit only."""

from __future__ import annotations

from dataclasses import asdict
from enum import Enum
from typing import TYPE_CHECKING, Any

from laplace_debiased.estimation.checkpoint import FitCheckpoint
from laplace_debiased.estimation.fitting import FitRequest, FittedKron
from laplace_debiased.files import PathLike
from laplace_debiased.network.identity import digest_of
from laplace_debiased.network.watch import ModelWatch
from laplace_debiased.options import CurvatureOptions

if TYPE_CHECKING:
    from laplace_debiased.posterior.kron_base import KronPosterior

_OF_NO_CONSEQUENCE = ("byte_budget",)
"""Options that change no result beyond rounding."""


def opened_checkpoint(
    posterior: KronPosterior,
    path: PathLike | None,
    interval: float,
    request: FitRequest,
    options: CurvatureOptions,
    watch: ModelWatch,
) -> FitCheckpoint | None:
    """The checkpoint of a fit, with what an interrupted one left there; None without a path.

    Args:
        posterior: the posterior that is fitted.
        path: the file, or None.
        interval: seconds between two writes.
        request: the arguments of the fit.
        options: its options, with the scheme resolved.
        watch: the watch over the model.

    Raises:
        TypeError, ValueError, FileNotFoundError: as :class:`FitCheckpoint`.
        ValueError: for a fit through a laplace-torch backend.
    """
    if path is None:
        return None
    if posterior._settings.backend is not None:
        raise ValueError(
            "checkpoint needs our own pass: drop backend, or fit without a checkpoint."
        )
    settings = posterior._settings
    previous = None if request.override else posterior._fitted
    task = {
        "class": type(posterior).__name__,
        "model": watch.reference.digest,
        "likelihood": settings.likelihood,
        "ignore_index": settings.ignore_index,
        "n_samples": request.n_samples,
        "n_data": request.n_data,
        "seed": request.seed,
        "training set": _length(request.train_loader),
        "magnitude_loader": _length(request.magnitude_loader),
        "earlier fit": None if previous is None else _digest(previous),
        "loader": type(request.train_loader).__name__,
    }
    for name, value in asdict(options).items():
        if name not in _OF_NO_CONSEQUENCE:
            task[name] = value.value if isinstance(value, Enum) else value
    return FitCheckpoint(path, task, interval, posterior._device)


def _length(loader: Any) -> int | None:
    try:
        return len(getattr(loader, "dataset", loader))
    except (TypeError, NotImplementedError):
        return None


def _digest(fitted: FittedKron) -> str:
    return digest_of(fitted.estimate.tables) + f" of {fitted.estimate.n_samples}, N {fitted.n_data}"
