"""Predictions and tuning with what does not fit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torchmetrics.classification import MulticlassAccuracy

from tests.bad_input.rows import Row
from tests.bad_input.rows_loaders import breaking
from tests.bad_input.world import Walks, World

AREA, TUNING = "Prediction", "Tuning"


def unfitted(shown: str, use: Callable[[Any, World], Any]) -> Row:
    """A row of a use before the fit."""
    return Row(
        AREA,
        f"`{shown}` before `fit`",
        lambda w: use(w.posterior(), w),
        "NotFittedError",
        ("not fitted", "fit(train_loader)"),
    )


def call(
    input: str,
    make: Callable[[World], Any],
    error: str,
    *names: str,
    likelihood: str = "classification",
    **kwargs: Any,
) -> Row:
    """A row of a prediction."""
    return Row(AREA, input, lambda w: w.la(make(w), **kwargs), error, names, likelihood)


def option(
    shown: str, error: str, *names: str, likelihood: str = "classification", **kw: Any
) -> Row:
    """A row of arguments of a prediction."""
    return call(f"`{shown}`", lambda w: w.x, error, *names, likelihood=likelihood, **kw)


def setting(name: str, value: Any, error: str, *names: str) -> Row:
    """A row of an attribute that is set."""
    shown = value if isinstance(value, str | float) else f"torch.ones({len(value)})"
    return Row(
        AREA,
        f"`la.{name} = {shown!r}`" if isinstance(shown, str) else f"`la.{name} = {shown}`",
        lambda w: setattr(w.la, name, value),
        error,
        (name.removeprefix("tuned_"), *names),
    )


def tune(
    input: str,
    error: str,
    *names: str,
    loader: Callable[[World], Any] = World.loader,
    likelihood: str = "classification",
    **kwargs: Any,
) -> Row:
    """A row of ``optimize_prior_precision`` with a validation loader."""

    def act(w: World) -> None:
        w.la.optimize_prior_precision(val_loader=loader(w), **{"grid_size": 3, **kwargs})

    return Row(TUNING, input, act, error, names, likelihood)


def _nan_late(w: World) -> Any:
    x = w.x.clone()
    x[11] = torch.nan
    return w.loader(x)


def _label(value: int) -> Callable[[World], Any]:
    def make(w: World) -> Any:
        y = w.y.clone()
        y[7] = value
        return w.loader(y=y)

    return make


def _broken_metric(probs: Any, y: Any) -> float:
    raise OSError("the metric's server is gone")


def no_samples() -> Iterator[Row]:
    """Rows of inputs without a sample: the same of every kind of posterior, and of every call."""
    kinds = [(s, h) for s in ("all", "last_layer") for h in ("kron", "lowrank")]
    for subset, structure in kinds:

        def act(w: World, subset: str = subset, structure: str = structure, **kwargs: Any) -> None:
            la = w.posterior(subset_of_weights=subset, hessian_structure=structure)
            la.fit(w.loader())
            la(w.x[:0], **kwargs)

        shown = f"no samples, `{subset}`, `{structure}`"
        error = "ValueError", ("hold no sample", "at least one")
        yield Row(AREA, shown, act, *error)
        yield Row(AREA, f'{shown}, `pred_type="nn"`', partial(act, pred_type="nn"), *error)


def fixed(name: str) -> Row:
    """A row of an attribute that nobody sets."""
    return Row(
        AREA,
        f"`la.{name} = 3`",
        lambda w: setattr(w.la, name, 3),
        "ReadOnlyError",
        (f"la.{name}", "what can be set is", "prior_precision"),
    )


ROWS = [
    *map(fixed, ("model", "likelihood", "n_data", "mean", "dict_key_x", "backend", "coverage")),
    unfitted("la(x)", lambda la, w: la(w.x)),
    unfitted("la.log_marginal_likelihood()", lambda la, w: la.log_marginal_likelihood()),
    unfitted("la.posterior_precision", lambda la, w: la.posterior_precision),
    unfitted("la.sample()", lambda la, w: la.sample()),
    unfitted("la.state_dict()", lambda la, w: la.state_dict()),
    unfitted("la.bias_report()", lambda la, w: la.bias_report()),
    unfitted("la.optimize_prior_precision()", lambda la, w: la.optimize_prior_precision()),
    unfitted("la.predictive_samples(x)", lambda la, w: la.predictive_samples(w.x)),
    unfitted("la.functional_samples(x)", lambda la, w: la.functional_samples(w.x)),
    *(
        Row(
            AREA,
            f"`la.{name}` of several sets of weights",
            lambda w, name=name: getattr(w.la, name)(w.la.mean.expand(2, -1)),
            "ValueError",
            ("value", "one entry per covered weight"),
        )
        for name in ("log_prob", "square_norm")
    ),
    call(
        "inputs with another number of features",
        lambda w: w.x[:, :3],
        "ModelCallError",
        "inputs",
        "shapes",
    ),
    call(
        "a single sample without its batch dimension",
        lambda w: w.x[0],
        "ModelCallError",
        "inputs",
    ),
    call("integer inputs", lambda w: w.x.long(), "ModelCallError", "torch.int64"),
    call("inputs with NaN", lambda w: w.x * torch.nan, "NumericalError", "NaN"),
    *no_samples(),
    call("a numpy array", lambda w: w.x.numpy(), "TypeError", "model inputs", "ndarray"),
    call("a list of numbers", lambda w: [1.0, 2.0], "TypeError", "model inputs", "list"),
    call("`None`", lambda w: None, "TypeError", "model inputs", "NoneType"),
    call("inputs on the meta device", lambda w: w.x.to("meta"), "ValueError", "meta"),
    call(
        "a mapping for a model of one tensor",
        lambda w: {"x": w.x},
        "ModelCallError",
        "dict_key_x='x'",
    ),
    option('pred_type="mcmc"', "ValueError", "pred_type", "'glm'", pred_type="mcmc"),
    option('link_approx="logit"', "ValueError", "link_approx", "'probit'", link_approx="logit"),
    option(
        'pred_type="nn", link_approx="probit"',
        "ValueError",
        "link_approx='mc'",
        pred_type="nn",
        link_approx="probit",
    ),
    option(
        'link_approx="bridge" of binary labels',
        "ValueError",
        "'bridge'",
        "'probit' or 'mc'",
        likelihood="bernoulli",
        link_approx="bridge",
    ),
    option(
        'link_approx="mc", n_samples=0', "ValueError", "n_samples", link_approx="mc", n_samples=0
    ),
    option('pred_type="nn", n_samples=-1', "ValueError", "n_samples", pred_type="nn", n_samples=-1),
    option(
        'pred_type="nn", n_samples=True',
        "ArgumentTypeError",
        "n_samples",
        "bool",
        pred_type="nn",
        n_samples=True,
    ),
    option(
        'pred_type="nn", n_samples=1 in regression',
        "ValueError",
        "n_samples",
        "at least 2",
        likelihood="regression",
        pred_type="nn",
        n_samples=1,
    ),
    option('link_aprox="bridge"', "TypeError", "'link_aprox'", link_aprox="bridge"),
    call(
        "inputs with NaN, sampled networks",
        lambda w: w.x * torch.nan,
        "NumericalError",
        "sample 0",
        "NaN",
        pred_type="nn",
        n_samples=2,
    ),
    setting("prior_precision", 1e-60, "ValueError", "torch.float32"),
    setting("temperature", torch.ones(2), "ValueError", "one number"),
    setting("temperature", 1e60, "ValueError", "torch.float32"),
    setting("prior_mean", float("nan"), "ValueError", "finite"),
    setting("prior_mean", "zero", "ArgumentTypeError", "str"),
    setting("enable_backprop", "no", "ArgumentTypeError", "True or False"),
    setting("tuned_link_approx", "foo", "ValueError", "link_approx", "'probit'"),
    option(
        'link_approx="mc", generator=3', "ValueError", "generator", link_approx="mc", generator=3
    ),
    Row(
        AREA,
        "`sigma_noise` for the marginal likelihood of a classification",
        lambda w: w.la.log_marginal_likelihood(sigma_noise=torch.tensor(2.0)),
        "ValueError",
        ("sigma_noise", "regression"),
    ),
    Row(
        AREA,
        "a negative prior for the marginal likelihood",
        lambda w: w.la.log_marginal_likelihood(prior_precision=torch.tensor(-2.0)),
        "ValueError",
        ("prior_precision must be positive",),
    ),
    tune('`method="CV"`', "ValueError", "method", "'gridsearch'", method="CV"),
    Row(
        TUNING,
        '`method="gridsearch"` without `val_loader`',
        lambda w: w.la.optimize_prior_precision(method="gridsearch"),
        "ValueError",
        ("val_loader",),
    ),
    tune("an empty `val_loader`", "ValueError", "val_loader is empty", loader=lambda w: []),
    tune("a `val_loader` that is a number", "TypeError", "val_loader", "int", loader=lambda w: 3),
    tune("NaN in a late validation batch", "NumericalError", "NaN", loader=_nan_late),
    tune("a validation label out of range", "ValueError", "0..2", "3", loader=_label(3)),
    tune(
        "a validation label of -100", "ValueError", "0..2", "ignore_index=-100", loader=_label(-100)
    ),
    tune("validation batches without targets", "TypeError", "pairs", loader=lambda w: [w.x[:5]]),
    tune(
        "a `val_loader` that raises half-way",
        "OSError",
        "the disk is gone",
        loader=lambda w: Walks(lambda: breaking(w)),
    ),
    tune(
        "validation targets of the wrong width",
        "ValueError",
        "(5, 1)",
        "(5, 3)",
        loader=lambda w: w.loader(y=w.y[:, :1]),
        likelihood="regression",
    ),
    tune("`grid_size=0`", "ValueError", "grid_size", grid_size=0),
    tune("`grid_size=True`", "ArgumentTypeError", "grid_size", grid_size=True),
    tune(
        "`log_prior_prec_min` above `log_prior_prec_max`",
        "ValueError",
        "log_prior_prec_min",
        "log_prior_prec_max",
        log_prior_prec_min=5,
    ),
    tune(
        "`log_prior_prec_max=nan`",
        "ValueError",
        "log_prior_prec_max",
        "finite",
        log_prior_prec_max=float("nan"),
    ),
    tune("`log_prior_prec_base=1`", "ValueError", "log_prior_prec_base", log_prior_prec_base=1.0),
    tune(
        '`link_approx="mc", n_samples=0`', "ValueError", "n_samples", link_approx="mc", n_samples=0
    ),
    tune('`loss="nll"`', "TypeError", "loss", "str", loss="nll"),
    tune(
        "a metric that is better the higher it is",
        "ValueError",
        "MulticlassAccuracy",
        "minimises",
        loss=MulticlassAccuracy(3),
    ),
    tune(
        "a loss that is NaN everywhere",
        "NumericalError",
        "3 grid points",
        "finite",
        loss=lambda probs, y: float("nan"),
    ),
    tune(
        "a loss that returns text",
        "TypeError",
        "loss must return",
        "str",
        loss=lambda probs, y: "good",
    ),
    tune(
        "a loss that returns nothing",
        "TypeError",
        "loss must return",
        "NoneType",
        loss=lambda probs, y: None,
    ),
    tune(
        "a loss per sample",
        "TypeError",
        "loss must return",
        "(12,)",
        loss=lambda probs, y: probs[:, 0],
    ),
    tune("a loss that raises", "OSError", "server is gone", loss=_broken_metric),
    *(
        Row(
            TUNING,
            f"`{name}={value}`",
            lambda w, name=name, value=value: w.la.optimize_prior_precision(
                method="marglik", **{name: float(value) if name != "n_steps" else int(value)}
            ),
            "ValueError",
            (name,),
        )
        for name, value in (
            ("init_prior_prec", "-1"),
            ("init_prior_prec", "nan"),
            ("lr", "0"),
            ("lr", "nan"),
            ("n_steps", "-1"),
        )
    ),
    Row(
        TUNING,
        '`prior_structure="diag"` of a Kronecker posterior',
        lambda w: w.la.optimize_prior_precision(method="marglik", prior_structure="diag"),
        "ValueError",
        ("'layerwise'",),
    ),
    Row(
        TUNING,
        '`prior_structure="blocks"`',
        lambda w: w.la.optimize_prior_precision(method="marglik", prior_structure="blocks"),
        "ValueError",
        ("prior_structure", "'scalar'"),
    ),
]
