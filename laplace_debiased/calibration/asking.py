"""Asking a posterior, or precomputed predictions, for all of a loader."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from laplace_debiased.calibration.batches import (
    FloatArray,
    Targets,
    as_labels,
    collect_targets,
    concatenate,
    over_batches,
    positions_as_samples,
    to_numpy,
    without_ignored,
)
from laplace_debiased.calibration.predictions import (
    ClassPredictions,
    GaussianPredictions,
    Values,
    class_rows,
    gaussian_predictions,
    joined,
    likelihood_name,
)
from laplace_debiased.options import Positions
from laplace_debiased.parallel.ranks import ALONE, Ranks
from laplace_debiased.posterior.host import DebiasedPosterior
from laplace_debiased.posterior.predicting import informed_probabilities
from laplace_debiased.predictive.selection import NO_LAST_LABEL, last_labels

Call = Callable[[Any], Any]

_WITH_LABELS = ("classification", "bernoulli")


@dataclass(frozen=True)
class Options:
    """How a posterior is asked, as in `evaluate`; None leaves the posterior's own default."""

    link_approx: str | None = None
    pred_type: str | None = None
    progress_bar: bool = False
    likelihood: str | None = None
    positions: Positions = Positions.ALL


def ranks_for(source: Any) -> Ranks:
    """All ranks, where a posterior predicts; numbers that are there need nobody else."""
    device = getattr(source, "_device", None)
    return ALONE if device is None else Ranks.present(torch.device(device))


def described(source: Any, options: Options) -> dict[str, str]:
    """What must be the same on every rank for predictions to be one posterior's."""
    prior, link = (getattr(source, n, None) for n in ("prior_precision", "tuned_link_approx"))
    return {
        "posterior": f"{type(source).__name__}, prior precision {prior}, link {link}",
        "options": f"{options.link_approx}, {options.pred_type}, {options.positions.value}",
    }


def predict(
    source: Any, loader: Targets, options: Options, ranks: Ranks = ALONE
) -> ClassPredictions | GaussianPredictions:
    """Predictions for a loader, beside its targets; ``source`` is what `evaluate` takes.

    Of a posterior each rank makes a part, and all have all.
    """
    _check_likelihood(source, options.likelihood)
    if options.positions is Positions.LAST and not isinstance(source, DebiasedPosterior):
        raise ValueError(
            "positions='last' needs a posterior of this library to predict with; of others "
            "take the last position's probabilities and labels yourself."
        )
    if isinstance(source, Values):
        likelihood = options.likelihood or "classification"
        return class_rows(source, collect_targets(loader), likelihood)
    if isinstance(source, tuple):
        if len(source) != 2 or not all(isinstance(part, Values) for part in source):
            raise TypeError(
                "la_or_probs as a tuple must be (mean, variance) tensors, got "
                f"({', '.join(type(part).__name__ for part in source)})."
            )
        return gaussian_predictions(*source, collect_targets(loader), noise=None)
    ask, has_labels = _ask(source, options), _likelihood(source) in _WITH_LABELS
    key, device = getattr(source, "dict_key_y", "labels"), getattr(source, "_device", None)

    def of_batch(x: Any, y: Any) -> Any:
        answer, y = ask(x), as_labels(y)
        if not has_labels:
            # Batch by batch: only the diagonals of n K×K covariances are worth keeping.
            noise = to_numpy(torch.as_tensor(source.sigma_noise)).astype(np.float64)
            mean, variance = map(_detached, answer)
            added = np.square(np.atleast_1d(noise))
            return gaussian_predictions(mean, variance, to_numpy(y), added)
        return answer, last_labels(source._keys.entered(x), y) if at_last else y

    bar, at_last = options.progress_bar, options.positions is Positions.LAST
    found = over_batches(of_batch, loader, "loader", key, device, _model(source), ranks, bar)
    if not has_labels:
        return joined(found)
    answers, labels = zip(*found, strict=True)
    ignored = source.ignore_index if at_last else None
    if ignored is not None and all(bool((y == ignored).all()) for y in labels):
        raise ValueError(f"every label is ignore_index={ignored}.{NO_LAST_LABEL}")
    return classified(source, answers, labels)


@dataclass(frozen=True)
class Unlabelled:
    """Predictions for inputs whose labels do not matter."""

    probs: Values  # [m, C], of sequences [m, T, C], of binary labels [m, K]
    information: FloatArray | None = None  # mutual information [m] ([m · T]), in nats


def predict_unlabelled(
    source: Any, loader: Iterable[Any], options: Options, ranks: Ranks = ALONE
) -> Unlabelled:
    """Predictions of a posterior for a loader whose targets do not matter."""
    ask, device = _ask(source, options), getattr(source, "_device", None)
    model, bar = _model(source), options.progress_bar
    return unlabelled(
        over_batches(lambda x, _: ask(x), loader, "ood_loader", None, device, model, ranks, bar)
    )


def unlabelled(answers: Sequence[Any]) -> Unlabelled:
    """A posterior's answers, batch by batch, to inputs whose labels do not matter."""
    probs, information = zip(*map(_with_information, answers), strict=True)
    return Unlabelled(torch.cat(probs), _known(information))


def classified(la: Any, answers: Sequence[Any], targets: Sequence[Any]) -> ClassPredictions:
    """A posterior's answers, batch by batch, as predictions beside their targets.

    Args:
        la: the posterior, which says what labels mean and which of them count.
        answers: probabilities [batch, ...], or pairs of them and the mutual information.
        targets: of every batch.
    """
    probs, informations, labels = [], [], []
    for answer, y in zip(answers, targets, strict=True):
        predicted, information = _with_information(answer)
        predicted, target = positions_as_samples(predicted, to_numpy(as_labels(y)))
        probs.append(predicted)
        informations.append(information)
        labels.append(target)
    ignored = getattr(la, "ignore_index", None)
    together, known = concatenate(labels), _known(informations)
    rows = class_rows(torch.cat(probs), together, la.likelihood, ignored)
    if known is not None:
        known = without_ignored(known, together, ignored)[0]
    return replace(rows, information=known)


def _with_information(answer: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Probabilities, and the mutual information as a vector where the answer has it."""
    if not isinstance(answer, tuple):
        return _detached(answer), None
    probs, information = answer
    return _detached(probs), None if information is None else _detached(information).reshape(-1)


def _known(parts: Sequence[torch.Tensor | None]) -> FloatArray | None:
    known = [part for part in parts if part is not None]
    return to_numpy(torch.cat(known)).astype(np.float64) if len(known) == len(parts) else None


def _likelihood(source: Any) -> str:
    """The posterior's likelihood by name, if it is a posterior and can be scored."""
    likelihood = getattr(source, "likelihood", None)
    if isinstance(source, nn.Module) or not callable(source) or likelihood is None:
        raise TypeError(
            "la_or_probs must be a fitted posterior, class probabilities (samples, classes), or a "
            f"(mean, variance) pair, got {type(source).__name__}; for a plain model pass "
            "torch.softmax(logits, -1)."
        )
    name = likelihood_name(likelihood)
    if name not in (*_WITH_LABELS, "regression"):
        raise ValueError(
            "likelihood must be 'classification', 'bernoulli' or 'regression' to be evaluated, got "
            f"{name!r}; pass probabilities instead."
        )
    return name


def _check_likelihood(source: Any, likelihood: str | None) -> None:
    if likelihood is not None and (
        not isinstance(likelihood, str) or likelihood not in _WITH_LABELS
    ):
        raise ValueError(
            "likelihood must be 'classification' or 'bernoulli' beside precomputed probabilities, "
            f"got {likelihood!r}; regression is a (mean, variance) pair."
        )
    if likelihood is not None and not isinstance(source, Values):
        raise ValueError(
            "likelihood says what precomputed probabilities are of; a posterior or a (mean, "
            "variance) pair knows its own, so leave it out."
        )


def _ask(la: Any, options: Options) -> Call:
    """The posterior's predictive under the options."""
    kwargs: dict[str, Any] = {}
    if options.pred_type is not None:
        kwargs["pred_type"] = options.pred_type
    if options.positions is Positions.LAST:
        kwargs["positions"] = options.positions
    if _likelihood(la) in _WITH_LABELS:
        link = options.link_approx
        if isinstance(la, DebiasedPosterior) and options.pred_type in (None, "glm"):
            return lambda x: informed_probabilities(la, x, link, positions=options.positions)
        if link is None:
            # Sampling weights leaves no other link; a link tuned for "glm" does not apply.
            sampled = options.pred_type == "nn"
            link = "mc" if sampled else getattr(la, "tuned_link_approx", None)
        if link is not None:
            kwargs["link_approx"] = link
    elif options.link_approx is not None:
        raise ValueError("link_approx applies to classification; leave it out for regression.")
    return lambda x: la(x, **kwargs)


def _model(la: Any) -> nn.Module | None:
    model = getattr(la, "model", None)
    return model if isinstance(model, nn.Module) else None


def _detached(value: Any) -> torch.Tensor:
    return torch.as_tensor(value).detach().cpu()
