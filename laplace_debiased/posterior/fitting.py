"""The fit of a posterior, and what is said of it."""

from __future__ import annotations

from laplace.utils.enums import LinkApprox
from torch.utils.data import DataLoader

from laplace_debiased.checks import checked_flag, shortened
from laplace_debiased.curvature import Coverage
from laplace_debiased.debiasing.bias import BiasReport
from laplace_debiased.debiasing.bias import bias_report as report_of
from laplace_debiased.errors import ReadOnlyError
from laplace_debiased.estimation.arguments import FitRequest
from laplace_debiased.estimation.checkpoint import DEFAULT_INTERVAL
from laplace_debiased.estimation.fit import run_fit
from laplace_debiased.files import PathLike
from laplace_debiased.likelihoods import residual_noise
from laplace_debiased.network.interrupts import uninterrupted
from laplace_debiased.network.locks import model_lock
from laplace_debiased.network.modes import public_call
from laplace_debiased.parallel.ranks import Ranks
from laplace_debiased.posterior.priors import check_prior, check_prior_mean
from laplace_debiased.posterior.shell import Shell
from laplace_debiased.predictive.call import MOMENTS


@public_call
def fit(
    self: Shell,
    train_loader: DataLoader,
    override: bool = True,
    progress_bar: bool = False,
    *,
    magnitude_loader: DataLoader | None = None,
    n_samples: int | str | None = "auto",
    n_data: int | None = None,
    seed: int = 0,
    checkpoint: PathLike | None = None,
    checkpoint_interval: float = DEFAULT_INTERVAL,
) -> None:
    """Estimate the curvature at the model's weights.

    Args:
        self: a posterior.
        train_loader: training data; B with a ``magnitude_loader``.
        override: replace an earlier fit; False adds to it. With ``n_samples`` further samples
            are drawn and N stays; without, the new data extend the training set.
        progress_bar: show every stage while it runs, and at the end ``fit_report``.
        magnitude_loader: B̃; both loaders are then walked whole.
        n_samples: curvature budget in all, drawn from the training set behind the loader; None
            for everything that the loader yields. "auto", Kronecker: 256 (2,048 for a last
            layer) where the loader can be drawn from and holds more, else everything, as with
            ``override=False`` and ``magnitude_loader``; low rank: everything or, without a
            ``rank``, as many samples as fit in memory (four times ``byte_budget``).
        n_data: N, when it is not the size of the training set behind the loader; 1 for
            per-sample means.
        seed: seed of every draw. The global generators are left as they are.
        checkpoint: file for what a Kronecker fit has so far. The same call goes on from there
            after a crash, loading but not computing the batches behind it, and gives the same
            posterior; on success the file is removed.
        checkpoint_interval: seconds between two writes of it; 0 writes after every batch.

    Raises:
        ValueError: for bad data, budgets, a checkpoint of another fit, or arguments that
            contradict each other.
        NumericalError: for NaN or infinite weights, outputs or curvature.
        CoverageError: if the forward pass shows that nothing can be covered.
        ModelChangedError: if ``override=False`` adds to a fit at other weights.
        An exception of the loader passes through. In all cases the earlier posterior and the
        model are left as they were.
    """

    def suits_priors(coverage: Coverage) -> None:
        check_prior(self._prior_precision, coverage, takes_diagonal=self._takes_diagonal_prior)
        check_prior_mean(self._prior_mean, coverage.n_covered)

    ranks = Ranks.present(self._target.device)
    with ranks.together("fit"):
        request = FitRequest(
            train_loader,
            magnitude_loader,
            n_samples,
            n_data,
            seed,
            override,
            checked_flag("progress_bar", progress_bar) and ranks.is_first,
            self._keys,
            checkpoint,
            checkpoint_interval,
        )
        fit = run_fit(
            self._structure,
            self._target,
            self._arguments,
            request,
            None if override else self._fit,
            self._chosen or self._coverage,
            suits_priors,
            ranks,
        )
        noise = None
        if self._arguments.residual_noise:
            noise = residual_noise(fit.mean_loss, fit.n_outputs)
        ranks.meet("the end of the fit")
        with uninterrupted():
            self._adopt(fit)
            self._fitted_on = request
            if noise is not None:
                self.sigma_noise = noise


def check_model(self: Shell) -> None:
    """Check that the model is as it was at the fit.

    Raises:
        ModelChangedError: naming what changed.
    """
    if self._watch is None:
        return
    model = self._target.model
    with model_lock(model), uninterrupted():
        if self._watch.check(model):
            # A layer may have been replaced by its equal: who refers to the old one sees none.
            assert self._fit is not None
            self._set_target(self._target, self._fit.coverage)
            engine = self._structure.engine(self._target, self._fit.coverage)
            self._predictor = self._structure.predictor(engine, self._fit)


def bias_report(self: Shell) -> BiasReport:
    """Own-batch against other-batch curvature along the posterior's directions.

    From the folds of the fit alone, no further pass.

    Raises:
        NotFittedError: before ``fit``.
        ValueError: under ``scheme="single"``, which has no other batch.
    """
    return report_of(self.fitted.comparisons)


def set_attribute(self: Shell, name: str, value: object) -> None:
    """Set what has a setter, which checks it, or is a user's own; the others follow from these.

    Raises:
        ReadOnlyError: for one that follows.
    """
    known = getattr(type(self), name, None)
    follows = known.fset is None if isinstance(known, property) else name in self._settled
    if self._settled and follows and not name.startswith("_"):
        raise ReadOnlyError(
            f"la.{name} cannot be set: it follows from how the posterior was made and fitted. Make "
            "another with the argument that you mean, or fit anew; what can be set is "
            "enable_backprop, prior_mean, prior_precision, sigma_noise, temperature and "
            "tuned_link_approx."
        )
    object.__setattr__(self, name, value)


def described(self: Shell) -> str:
    """A posterior in a line."""
    name, head = type(self).__name__, f"likelihood={self.likelihood!r}"
    if self._fit is None:
        return f"{name}({head}, not fitted)"
    fit = self._fit
    prior = shortened(self.prior_precision.detach(), digits=4)
    link = ""
    if self.likelihood not in MOMENTS:
        link = f", link={(self.tuned_link_approx or LinkApprox.MC).value!r}"
    time = "" if fit.report is None else f", fitted in {fit.report.seconds:.3g} s"
    return (
        f"{name}({head}, scheme={fit.scheme.value!r}, {fit.n_samples} of N={fit.n_data} "
        f"samples, {fit.coverage.n_covered} parameters ({100 * fit.coverage.share:.1f} % "
        f"covered), prior_precision={prior}{link}{time})"
    )
