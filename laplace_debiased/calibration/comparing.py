"""`compare`: a posterior beside the baselines that it has to beat, on the same data."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from laplace.utils.enums import LinkApprox, PredType

from laplace_debiased.calibration import metrics
from laplace_debiased.calibration.asking import (
    Options,
    classified,
    described,
    ranks_for,
    unlabelled,
)
from laplace_debiased.calibration.batches import (
    over_batches,
    to_numpy,
)
from laplace_debiased.calibration.comparison import ComparedRow, Comparison
from laplace_debiased.calibration.evaluation import score_classification
from laplace_debiased.calibration.predictions import count
from laplace_debiased.calibration.temperature import (
    TemperatureScaling,
    collect_logits,
    scaling_of,
)
from laplace_debiased.checks import checked_integer
from laplace_debiased.data.loaders import check_loader, loader_generators
from laplace_debiased.errors import CoverageError, RankFailedError
from laplace_debiased.estimation.arguments import FitRequest
from laplace_debiased.likelihoods import LikelihoodName
from laplace_debiased.network.modes import public_call, undisturbed
from laplace_debiased.network.precision import exact_arithmetic
from laplace_debiased.parallel.ranks import ALONE, Ranks
from laplace_debiased.posterior import DebiasedKronLLLaplace, predicting
from laplace_debiased.posterior.host import DebiasedPosterior
from laplace_debiased.posterior.priors import subject_of
from laplace_debiased.predictive.probabilities import informed_probabilities
from laplace_debiased.tuning import GridSearch, PriorGrid, Validation

_NAMES = {
    "map": "MAP",
    "temperature": "temperature scaling",
    "prior_only": "prior only",
    "last_layer": "last layer",
    "posterior": "this posterior",
}

Answers = dict[str, Any]
"""Of every row, for one batch: probabilities, or a pair of them and the mutual information."""


@public_call
def compare(
    la: Any,
    val_loader: Iterable[Any],
    test_loader: Iterable[Any],
    *,
    ood_loader: Iterable[Any] | None = None,
    train_loader: Any = None,
    n_bins: int = 15,
    seed: int = 0,
    progress_bar: bool = True,
) -> Comparison:
    """Compare a tuned classification posterior with the baselines that it has to beat.

    The rows: the MAP model; temperature scaling, chosen on the validation data; the posterior's
    prior alone (λ = 0), at a prior precision and under a link of its own; a last-layer posterior in
    closed form, fitted on the way on the same training data and tuned on the validation data; and
    ``la`` as it is. ``la`` and its model are left as they were.

    Args:
        la: a fitted classification posterior of this library, tuned on ``val_loader``.
        val_loader: labelled batches on which baselines are chosen.
        test_loader: labelled batches that are scored.
        ood_loader: inputs from elsewhere, with or without labels.
        train_loader: training data for the last layer; by default those of ``la.fit``. A posterior
            from a file knows none: its table has no such row without it.
        n_bins: bins of the calibration errors.
        seed: of the last layer's draws and of the bootstrap.
        progress_bar: show progress.

    Returns:
        Table (``.table``, or print it), ``.plot()`` of reliability and risk-coverage, and
        ``.to_dict()``; paired bootstrap intervals of the NLL against temperature scaling.

    Raises:
        TypeError: if ``la`` is no posterior of this library.
        NotFittedError: before ``fit``.
        ModelChangedError: if the model is no longer the one of the fit.
        ValueError: for another likelihood, or data that cannot be scored.
    """
    ranks = ranks_for(la)
    with ranks.together("compare"):
        n_bins, seed = count(n_bins, "n_bins"), checked_integer("seed", seed, 0)
        _check_posterior(la)
        check_loader(val_loader, "val_loader")
        check_loader(test_loader, "test_loader", walks=1)
        if ood_loader is not None:
            check_loader(ood_loader, "ood_loader", walks=1)
        progress_bar = progress_bar if ranks.is_first else False
        ranks.agree("compare", {**described(la, Options()), "n_bins": n_bins, "seed": seed})
        ways = ways_to_predict(la, val_loader, train_loader, seed, progress_bar, ranks)
        key = la.dict_key_y
        inside, labels = ways.over(test_loader, "test_loader", key, ranks, progress_bar)
        outside: dict[str, list[Any]] = {}
        if ood_loader is not None:
            outside, _ = ways.over(ood_loader, "ood_loader", None, ranks, progress_bar)
        return _scored(ways, inside, labels, outside, n_bins, seed)


def ways_to_predict(
    la: Any,
    val_loader: Any,
    train_loader: Any = None,
    seed: int = 0,
    progress_bar: bool = False,
    ranks: Ranks = ALONE,
) -> Ways:
    """All that :func:`compare` compares, chosen on the validation data; arguments as there."""
    logits, labels = collect_logits(
        la._target.model,
        val_loader,
        dict_key_x=la.dict_key_x,
        dict_key_y=la.dict_key_y,
        progress_bar=progress_bar,
        ranks=ranks,
    )
    scaling = scaling_of(logits, to_numpy(labels), la.ignore_index)
    prior, link = _prior_only(la, val_loader, progress_bar, ranks)
    last_layer = _last_layer(la, train_loader, val_loader, seed, progress_bar)
    return Ways(la, scaling, prior, link, last_layer)


def _check_posterior(la: Any) -> None:
    if not isinstance(la, DebiasedPosterior):
        raise TypeError(
            f"la must be a posterior of this library; got {type(la).__name__}. Score others by "
            "evaluate."
        )
    la._check_H_init()
    la._check_model()
    if la.likelihood != LikelihoodName.CLASSIFICATION:
        raise ValueError(
            f"compare is for likelihood='classification'; this one's is {la.likelihood!r}: score "
            "it by evaluate."
        )


def _prior_only(
    la: Any, val_loader: Any, progress_bar: bool, ranks: Ranks
) -> tuple[float, LinkApprox]:
    """Prior precision and link of the prior alone: as the tuning found them, else by a search."""
    found = la.tuning_result
    if found is None or found.prior_only_precision is None:
        validation = Validation(subject_of(la), val_loader, None, ranks)
        search = GridSearch(validation, PriorGrid(), PredType.GLM)
        with undisturbed(la._target.model, generators=loader_generators(val_loader)):
            found = search.run(progress_bar)
    return found.prior_only_precision, LinkApprox(found.prior_only_link)


def _last_layer(
    la: Any, train_loader: Any, val_loader: Any, seed: int, progress_bar: bool
) -> DebiasedKronLLLaplace | None:
    """A tuned last-layer posterior of the same training data; None, with a reason, without one."""
    if isinstance(la, DebiasedKronLLLaplace):
        return None
    remembered: FitRequest | None = la._fitted_on
    if train_loader is None and remembered is not None:
        train_loader = remembered.train_loader
    if train_loader is None:
        warnings.warn(
            "the training data of this posterior are not known (it was not fitted here): pass "
            "train_loader for the row of the last layer.",
            UserWarning,
            stacklevel=4,
        )
        return None
    asked = la.arguments
    ll = DebiasedKronLLLaplace(
        la._target.model,
        la.likelihood,
        dict_key_x=asked.dict_key_x,
        dict_key_y=asked.dict_key_y,
        ignore_index=asked.ignore_index,
        allow_probabilities=asked.allow_probabilities,
        n_outputs=asked.n_outputs,
    )
    try:
        ll.fit(train_loader, n_data=la.n_data, seed=seed, progress_bar=progress_bar)
    except (CoverageError, ValueError, RankFailedError) as error:
        warnings.warn(f"there is no row of the last layer: {error}", UserWarning, stacklevel=4)
        return None
    with warnings.catch_warnings():
        # Where its prior helps nothing, the table shows it.
        warnings.filterwarnings("ignore", "the best prior precision", UserWarning)
        ll.optimize_prior_precision(val_loader=val_loader, progress_bar=progress_bar)
    return ll


@dataclass(frozen=True, eq=False)
class Ways:
    """All ways to predict, batch by batch."""

    la: Any
    scaling: TemperatureScaling
    prior: float  # precision of the prior alone
    link: LinkApprox  # of the prior alone
    last_layer: DebiasedKronLLLaplace | None

    @property
    def settings(self) -> dict[str, dict[str, float | str]]:
        """What was chosen on validation data, by row."""
        chosen: dict[str, dict[str, float | str]] = {
            "temperature": {"temperature": self.scaling.temperature},
            "prior_only": {"prior precision": self.prior, "link": self.link.value},
        }
        for key, la in (("last_layer", self.last_layer), ("posterior", self.la)):
            if la is not None:
                priors, link = la.prior_precision, la.tuned_link_approx or LinkApprox.MC
                scalar = {"prior precision": float(priors)} if len(priors) == 1 else {}
                chosen[key] = {**scalar, "link": link.value}
        return chosen

    def answers(self, inputs: Any) -> Answers:
        """Predictions of one batch; one pass serves the posterior and its prior alone."""
        subject, priors = subject_of(self.la), self.la.prior_precision.detach()
        inputs = subject.keys.entered(inputs)
        scalar = len(priors) == 1
        with exact_arithmetic(subject.device):
            swept = subject.predictor.sweep(
                inputs, subject.h, priors[:1], subject.selection, diagonal=False
            )
        mean, chosen = swept.outputs, swept.chosen
        found: Answers = {
            "map": torch.softmax(mean.double(), -1),
            "temperature": self.scaling.probs(mean.double()),
            "prior_only": informed_probabilities(
                mean, swept.prior_only / self.prior, self.link, chosen=chosen
            ),
        }
        if self.last_layer is not None:
            found["last_layer"] = predicting.informed_probabilities(self.last_layer, inputs)
        if scalar:
            link = self.la.tuned_link_approx or LinkApprox.MC
            found["posterior"] = informed_probabilities(
                mean, swept.covariances[0], link, chosen=chosen
            )
        else:
            found["posterior"] = predicting.informed_probabilities(self.la, inputs)
        return found

    def over(
        self,
        loader: Any,
        name: str,
        key: str | None,
        ranks: Ranks,
        progress_bar: bool,
    ) -> tuple[dict[str, list[Any]], tuple[Any, ...]]:
        """By row the answers to every batch of a loader, and the batches' targets."""

        def of_batch(x: Any, y: Any) -> tuple[Answers, Any]:
            return self.answers(x), y

        device, model = self.la._device, self.la._target.model
        walked = over_batches(of_batch, loader, name, key, device, model, ranks, progress_bar)
        answers, targets = zip(*walked, strict=True)
        return {key: [found[key] for found in answers] for key in answers[0]}, targets


def _scored(
    ways: Ways,
    inside: dict[str, list[Any]],
    labels: Sequence[Any],
    outside: dict[str, list[Any]],
    n_bins: int,
    seed: int,
) -> Comparison:
    """All rows of answers to labelled data, and to inputs from elsewhere where there are such."""
    settings = ways.settings

    def row(key: str) -> ComparedRow:
        found = classified(ways.la, inside[key], labels)
        elsewhere = unlabelled(outside[key]) if key in outside else None
        confidence, correct = found.probs.max(axis=1), found.probs.argmax(axis=1) == found.labels
        scores = score_classification(found, elsewhere, n_bins)
        risk = metrics.risk_coverage(confidence, correct)
        return ComparedRow(key, _NAMES[key], scores, found.nll, risk, settings.get(key, {}))

    rows = {key: row(key) for key in inside}
    baseline = rows["temperature"].nlls
    for key in rows.keys() - {"temperature"}:
        interval = metrics.paired_interval(rows[key].nlls, baseline, seed)
        rows[key] = replace(rows[key], interval=interval)
    return Comparison(tuple(rows.values()))
