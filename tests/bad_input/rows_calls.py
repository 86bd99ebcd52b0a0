"""Predictions, draws and tuning with arguments of the wrong kind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torchmetrics
from torch import nn

from tests.bad_input.rows import Row
from tests.bad_input.world import World

AREA, TUNING = "Prediction", "Tuning"


def use(input: str, act: Callable[[World], Any], error: str, *names: str, **world: Any) -> Row:
    """A row of a use of the posterior."""
    return Row(AREA, input, act, error, names, **world)


def tune(
    shown: str,
    error: str,
    *names: str,
    likelihood: str = "classification",
    loader: Callable[[World], Any] = lambda w: w.loader(),
    **kwargs: Any,
) -> Row:
    """A row of a grid search."""

    def act(w: World) -> None:
        w.la.optimize_prior_precision(val_loader=loader(w), **kwargs)

    return Row(TUNING, shown, act, error, names, likelihood)


def sampled(shown: str, *names: str, targets: Callable[[Any], Any], likelihood: str) -> Row:
    """A row of a grid search of sampled networks with wrong targets."""
    return tune(
        f'{shown}, `pred_type="nn"`',
        "ValueError",
        *names,
        likelihood=likelihood,
        loader=lambda w: w.loader(y=targets(w.y)),
        pred_type="nn",
        n_samples=3,
    )


def _written_in_place(w: World) -> None:
    la = w.posterior()
    la.fit(w.loader())
    la.prior_precision.fill_(-1.0)
    la(w.x)


def _last_layer(w: World) -> Any:
    la = w.posterior(subset_of_weights="last_layer")
    la.fit(w.loader())
    return la


def _tiny_noise(w: World) -> None:
    la = w.posterior()
    la.fit(w.loader())
    la.sigma_noise = 1e-30
    la(w.x)


def _written_low_rank(w: World) -> None:
    la = w.posterior(hessian_structure="lowrank")
    la.fit(w.loader())
    la.prior_precision.fill_(-1.0)
    la.posterior_precision  # noqa: B018


def _overflowing(w: World) -> None:
    la = w.posterior(w.linear())
    la.fit(w.loader())
    la(w.x * 1e25)


ROWS = [
    use("`la.sample(-1)`", lambda w: w.la.sample(-1), "ValueError", "n_samples", "-1"),
    use("`la.sample(2.5)`", lambda w: w.la.sample(2.5), "ArgumentTypeError", "n_samples"),
    use(
        "`la.sample(3, generator=3)`",
        lambda w: w.la.sample(3, generator=3),
        "ValueError",
        "generator",
    ),
    use(
        "`la.functional_samples(x, n_samples=-1)`",
        lambda w: w.la.functional_samples(w.x, n_samples=-1),
        "ValueError",
        "n_samples",
    ),
    use("sparse inputs to predict", lambda w: w.la(w.x.to_sparse()), "ValueError", "to_dense"),
    use(
        '`pred_type="nn", link_aprox="bridge"`',
        lambda w: w.la(w.x, pred_type="nn", link_aprox="bridge"),
        "TypeError",
        "'link_aprox'",
    ),
    use('`joint="yes"`', lambda w: w.la(w.x, joint="yes"), "ArgumentTypeError", "joint"),
    use(
        '`diagonal_output="yes"`',
        lambda w: w.la(w.x, diagonal_output="yes"),
        "ArgumentTypeError",
        "diagonal_output",
    ),
    use('`fitting="yes"`', lambda w: w.la(w.x, fitting="yes"), "ArgumentTypeError", "fitting"),
    use('`n_samples="a"`', lambda w: w.la(w.x, n_samples="a"), "ArgumentTypeError", "n_samples"),
    use(
        "`fit(n_samples=np.ones(3))`",
        lambda w: w.la.fit(w.loader(), n_samples=np.ones(3)),
        "ArgumentTypeError",
        "n_samples",
        "ndarray",
    ),
    use(
        "`n_samples=10**12` points",
        lambda w: w.la(w.x, n_samples=10**12),
        "ValueError",
        "n_samples",
        "2**30",
    ),
    use(
        "a negative value written into `la.prior_precision`",
        _written_in_place,
        "ValueError",
        "prior_precision",
        "-1",
    ),
    use(
        "inputs whose variances overflow",
        _overflowing,
        "NumericalError",
        "sample 0",
        "prior_precision",
        likelihood="regression",
    ),
    use(
        "inputs whose variances overflow, classification",
        _overflowing,
        "NumericalError",
        "sample 0",
        "prior_precision",
    ),
    use(
        "sparse inputs to sampled networks",
        lambda w: w.la(w.x.to_sparse(), pred_type="nn", n_samples=2),
        "ValueError",
        "to_dense",
    ),
    use(
        "sparse inputs to a last layer",
        lambda w: _last_layer(w)(w.x.to_sparse()),
        "ValueError",
        "to_dense",
    ),
    use(
        "`la.log_prob` of a vector of another length",
        lambda w: w.la.log_prob(torch.zeros(3)),
        "ValueError",
        "value",
        "(3,)",
    ),
    use(
        "a `sigma_noise` whose square is zero in the dtype",
        _tiny_noise,
        "ValueError",
        "sigma_noise",
        "torch.float32",
        likelihood="regression",
    ),
    use(
        "a negative value written into `la.prior_precision`, low rank",
        _written_low_rank,
        "ValueError",
        "prior_precision",
        "-1",
    ),
    tune("`grid_size=10**9`", "ValueError", "grid_size", "10,000", grid_size=10**9),
    tune(
        "`loss=CrossEntropyLoss()`",
        "ValueError",
        "CrossEntropyLoss",
        "probabilities",
        loss=nn.CrossEntropyLoss(),
    ),
    tune(
        "a loss of the targets alone",
        "TypeError",
        "loss",
        "(probs, targets)",
        loss=lambda y: 0.0,
    ),
    tune(
        "sparse validation inputs",
        "ValueError",
        "to_dense",
        loader=lambda w: [(w.x.to_sparse(), w.y)],
    ),
    tune(
        "`loss=MeanSquaredError`, a class",
        "TypeError",
        "MeanSquaredError()",
        loss=torchmetrics.MeanSquaredError,
    ),
    tune(
        "`log_prior_prec_max=400`",
        "ValueError",
        "log_prior_prec_max",
        "±30",
        log_prior_prec_max=400,
    ),
    tune(
        "`log_prior_prec_min=-400`",
        "ValueError",
        "log_prior_prec_min",
        "±30",
        log_prior_prec_min=-400,
    ),
    tune(
        '`log_prior_prec_min="a"`',
        "ArgumentTypeError",
        "log_prior_prec_min",
        log_prior_prec_min="a",
    ),
    tune(
        '`log_prior_prec_base="10"`',
        "ArgumentTypeError",
        "log_prior_prec_base",
        log_prior_prec_base="10",
    ),
    tune(
        "`log_prior_prec_base=None`",
        "ArgumentTypeError",
        "log_prior_prec_base",
        log_prior_prec_base=None,
    ),
    tune(
        "a tensor for `val_loader`",
        "TypeError",
        "val_loader",
        "[(inputs, targets)]",
        loader=lambda w: torch.tensor(2),
    ),
    tune('`refine="yes"`', "ArgumentTypeError", "refine", refine="yes"),
    tune(
        "a `val_loader` that is an iterator",
        "TypeError",
        "val_loader",
        "iterator",
        loader=lambda w: iter(w.loader()),
    ),
    tune(
        "a pair of tensors for `val_loader`",
        "TypeError",
        "[(inputs, targets)]",
        loader=lambda w: (w.x, w.y),
    ),
    tune(
        "validation inputs on the meta device",
        "ValueError",
        "inputs",
        "meta",
        loader=lambda w: [(w.x.to("meta"), w.y)],
    ),
    tune(
        "validation targets on the meta device",
        "ValueError",
        "targets",
        "meta",
        loader=lambda w: [(w.x, w.y.to("meta"))],
    ),
    sampled(
        "labels of shape (m, 1)",
        "(5, 1)",
        targets=lambda y: y[:, None],
        likelihood="classification",
    ),
    sampled(
        "regression targets without the output's dimension",
        "unsqueeze",
        targets=lambda y: y[:, 0],
        likelihood="regression",
    ),
    sampled("binary labels of 1 and 2", "2.0", targets=lambda y: y + 1, likelihood="bernoulli"),
]
