"""Models and options that make no posterior."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from laplace.curvature.curvlinops import CurvlinopsEF, CurvlinopsGGN
from torch import nn

from laplace_debiased.factory import DebiasedLaplace
from tests.bad_input.models import Noisy, Tempered, Words, normalised
from tests.bad_input.rows import Row
from tests.bad_input.world import World, Wrapped

AREA = "Model and options"


def option(
    shown: str, error: str, *names: str, likelihood: str = "classification", **kw: Any
) -> Row:
    """A row of arguments of the constructor."""
    return Row(AREA, f"`{shown}`", lambda w: w.posterior(**kw), error, names, likelihood)


def _nan_bias(w: World) -> None:
    with torch.no_grad():
        w.model[2].bias[1] = torch.nan


def _infinite_weight(w: World) -> None:
    with torch.no_grad():
        w.model[0].weight[0, 0] = torch.inf


def _inference_model(w: World) -> nn.Module:
    with torch.inference_mode():
        return w.linear()


class _Detached(nn.Module):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    @torch.no_grad()
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)


def _wrapped(after: Any) -> Any:
    return lambda w: w.posterior(Wrapped(w.model, after)).fit(w.loader())


ROWS = [
    Row(
        AREA,
        "a function for a model",
        lambda w: DebiasedLaplace(lambda x: x),
        "TypeError",
        ("model", "torch.nn.Module"),
    ),
    Row(AREA, "no model", lambda w: DebiasedLaplace(None), "TypeError", ("model", "NoneType")),
    Row(
        AREA,
        "a model with every parameter frozen",
        lambda w: w.posterior(w.linear().requires_grad_(False)),
        "CoverageError",
        ("frozen by the user",),
    ),
    Row(
        AREA,
        "a model without parameters",
        lambda w: w.posterior(nn.Identity()),
        "CoverageError",
        ("parameter",),
    ),
    Row(
        AREA,
        "a parameter that cannot be covered, `strict=True`",
        lambda w: w.posterior(w.linear(normalised()), strict=True),
        "CoverageError",
        ("0.parametrizations.weight", "re-parametrised by WeightNorm"),
    ),
    Row(
        AREA,
        "NaN in a weight",
        lambda w: w.refit(w.loader()),
        "NumericalError",
        ("parameter", "'2.bias'"),
        spoil=_nan_bias,
    ),
    Row(
        AREA,
        "an infinite weight",
        lambda w: w.refit(w.loader()),
        "NumericalError",
        ("parameter", "'0.weight'"),
        spoil=_infinite_weight,
    ),
    Row(
        AREA,
        "a model on the meta device",
        lambda w: w.posterior(w.linear(device="meta")).fit(w.loader()),
        "ValueError",
        ("parameter", "'0.weight'", "meta"),
    ),
    Row(
        AREA,
        "a model made under `torch.inference_mode()`",
        lambda w: w.posterior(_inference_model(w)).fit(w.loader()),
        "ValueError",
        ("parameter", "'0.weight'", "inference_mode"),
    ),
    Row(
        AREA,
        "a model that ends in a softmax",
        _wrapped(lambda f: f.softmax(-1)),
        "ValueError",
        ("probabilities", "logits", "allow_probabilities"),
    ),
    Row(
        AREA,
        "a model that returns a tuple",
        _wrapped(lambda f: (f, f)),
        "TypeError",
        ("model must return a tensor", "tuple"),
    ),
    Row(
        AREA,
        "a model that returns one number per sample",
        _wrapped(lambda f: f[:, 0]),
        "ValueError",
        ("(batch, outputs)", "(2,)"),
    ),
    Row(
        AREA,
        "a model that returns images",
        _wrapped(lambda f: f[:, None, None]),
        "ValueError",
        ("(batch, outputs)",),
    ),
    Row(
        AREA,
        "a model that sums over the batch",
        _wrapped(lambda f: f.sum(0, keepdim=True)),
        "ValueError",
        ("(batch, outputs)", "(1, 3)"),
    ),
    Row(
        AREA,
        "a model that returns labels",
        _wrapped(lambda f: f.argmax(-1, keepdim=True)),
        "ValueError",
        ("outputs", "torch.int64"),
    ),
    Row(
        AREA,
        "a model with one logit for classification",
        _wrapped(lambda f: f[:, :1]),
        "ValueError",
        ("at least 2 classes", "bernoulli"),
    ),
    Row(
        AREA,
        "a model whose outputs carry no gradient",
        lambda w: w.posterior(_Detached(w.model)).fit(w.loader()),
        "CoverageError",
        ("net.0.weight",),
    ),
    Row(
        AREA,
        '`likelihood="poisson"`',
        lambda w: w.posterior(likelihood="poisson"),
        "ValueError",
        ("likelihood", "'classification'", "'bernoulli'"),
    ),
    option(
        'subset_of_weights="some"',
        "ValueError",
        "subset_of_weights",
        "'last_layer'",
        subset_of_weights="some",
    ),
    option(
        'hessian_structure="diag"',
        "ValueError",
        "hessian_structure",
        "'lowrank'",
        hessian_structure="diag",
    ),
    option('shceme="single"', "TypeError", "'shceme'", "scheme", shceme="single"),
    option('scheme="both"', "ValueError", "scheme", "'cross_fit'", scheme="both"),
    option("scheme=np.zeros(2)", "ValueError", "scheme", "'cross_fit'", scheme=np.zeros(2)),
    option('magnitudes="full"', "ValueError", "magnitudes", "'ggn'", magnitudes="full"),
    option('sampling="all"', "ValueError", "sampling", "'curvature'", sampling="all"),
    option('fisher="true"', "ValueError", "fisher", "'empirical'", fisher="true"),
    option("folds=1", "ValueError", "folds", folds=1),
    option("folds=True", "ArgumentTypeError", "folds", folds=True),
    option("mc_samples=0", "ValueError", "mc_samples", mc_samples=0),
    option("mc_samples=1.5", "ArgumentTypeError", "mc_samples", mc_samples=1.5),
    option("direction_fraction=1.0", "ValueError", "direction_fraction", direction_fraction=1.0),
    option(
        "direction_fraction=nan",
        "ValueError",
        "direction_fraction",
        direction_fraction=float("nan"),
    ),
    option("byte_budget=0", "ValueError", "byte_budget", byte_budget=0),
    option("pool_size=-1", "ValueError", "pool_size", pool_size=-1),
    option('strict="yes"', "ArgumentTypeError", "strict", strict="yes"),
    option(
        'magnitudes="kfac", sampling="curvature"',
        "ValueError",
        "magnitudes='ggn'",
        "sampling='uniform'",
        magnitudes="kfac",
        sampling="curvature",
    ),
    option("rank=3 with a Kronecker posterior", "ValueError", "rank", "lowrank", rank=3),
    option(
        'rank=0, hessian_structure="lowrank"',
        "ValueError",
        "rank",
        rank=0,
        hessian_structure="lowrank",
    ),
    option("damping=True", "ValueError", "damping", damping=True),
    option(
        'backend="CurvlinopsGGN", a string',
        "TypeError",
        "backend",
        "CurvatureInterface",
        backend="CurvlinopsGGN",
    ),
    option(
        'backend=CurvlinopsEF, fisher="type2"',
        "ValueError",
        "CurvlinopsEF",
        "fisher='type2'",
        backend=CurvlinopsEF,
        fisher="type2",
    ),
    option(
        'backend=CurvlinopsGGN, hessian_structure="lowrank"',
        "ValueError",
        "backend",
        "lowrank",
        backend=CurvlinopsGGN,
        hessian_structure="lowrank",
    ),
    option(
        "backend_kwargs without backend",
        "ValueError",
        "backend_kwargs",
        "backend",
        backend_kwargs={"a": 1},
    ),
    option(
        "backend_kwargs=True",
        "ArgumentTypeError",
        "backend_kwargs",
        "bool",
        backend=CurvlinopsGGN,
        backend_kwargs=True,
    ),
    Row(
        AREA,
        '`likelihood="bernoulli", backend=CurvlinopsGGN`',
        lambda w: w.posterior(likelihood="bernoulli", backend=CurvlinopsGGN),
        "ValueError",
        ("'bernoulli'", "backend"),
    ),
    option("ignore_index=True", "ArgumentTypeError", "ignore_index", ignore_index=True),
    option('ignore_index="pad"', "ArgumentTypeError", "ignore_index", "'pad'", ignore_index="pad"),
    option(
        "ignore_index in regression",
        "ValueError",
        "ignore_index",
        "'classification'",
        likelihood="regression",
        ignore_index=-100,
    ),
    option(
        "sigma_noise=2 in classification",
        "ValueError",
        "sigma_noise",
        "'regression'",
        sigma_noise=2.0,
    ),
    option(
        'sigma_noise="residual" in classification',
        "ValueError",
        "sigma_noise='residual'",
        "'regression'",
        sigma_noise="residual",
    ),
    option(
        'sigma_noise="auto"',
        "ValueError",
        "sigma_noise",
        "'residual'",
        likelihood="regression",
        sigma_noise="auto",
    ),
    *(
        option(
            f"{name}={value}",
            "ValueError",
            f"{name} must be positive",
            likelihood="regression",
            **{name: float(value)},
        )
        for name in ("prior_precision", "sigma_noise", "temperature")
        for value in ("-1", "0", "nan", "inf")
    ),
    option(
        'prior_precision="strong"',
        "ArgumentTypeError",
        "prior_precision",
        "str",
        prior_precision="strong",
    ),
    option('temperature="hot"', "ArgumentTypeError", "temperature", "str", temperature="hot"),
    option(
        "prior_precision of the wrong length",
        "ValueError",
        "prior_precision",
        "(3,)",
        "0.weight, 0.bias, 2.weight, 2.bias",
        prior_precision=torch.ones(3),
    ),
    Row(
        AREA,
        "`prior_mean=nan`",
        lambda w: w.posterior(prior_mean=float("nan")).fit(w.loader()),
        "ValueError",
        ("prior_mean must be finite",),
    ),
    Row(
        AREA,
        "`prior_mean` of the wrong length",
        lambda w: w.posterior(prior_mean=torch.zeros(3)).fit(w.loader()),
        "ValueError",
        ("prior_mean",),
    ),
    Row(
        AREA,
        "`last_layer_name` of no layer",
        lambda w: w.posterior(subset_of_weights="last_layer", last_layer_name="head"),
        "ValueError",
        ("last_layer_name", "'head'", "'2'"),
    ),
    option(
        "last_layer_name=2",
        "ArgumentTypeError",
        "last_layer_name",
        "int",
        subset_of_weights="last_layer",
        last_layer_name=2,
    ),
    Row(
        AREA,
        "a last layer that is not linear",
        lambda w: w.posterior(
            nn.Sequential(w.linear(), nn.Tanh()), subset_of_weights="last_layer"
        ).fit(w.loader()),
        "ValueError",
        ("last layer '0.0'", "linear"),
    ),
    Row(
        AREA,
        "a model that ends in a norm, for a last layer",
        lambda w: w.posterior(
            nn.Sequential(w.linear(), nn.BatchNorm1d(3)), subset_of_weights="last_layer"
        ).fit(w.loader()),
        "ValueError",
        ("layer '1'", "BatchNorm1d", "last_layer_name"),
    ),
    Row(
        AREA,
        "a last layer whose outputs are scaled, capped or normalised after it",
        lambda w: w.posterior(Tempered(w.linear()), subset_of_weights="last_layer").fit(w.loader()),
        "ValueError",
        ("last layer", "head.0"),
    ),
    Row(
        AREA,
        "an `Embedding` with `max_norm`, which overwrites its weight",
        lambda w: w.posterior(Words()).fit(w.loader(w.x.abs().long().clamp(max=4))),
        "ValueError",
        ("max_norm", "words"),
    ),
    Row(
        AREA,
        "a model that is stochastic in evaluation mode",
        lambda w: w.posterior(Noisy(w.linear())).fit(w.loader()),
        "ValueError",
        ("evaluation",),
    ),
    Row(
        AREA,
        "setting `prior_precision` to -1",
        lambda w: setattr(w.la, "prior_precision", -1.0),
        "ValueError",
        ("prior_precision must be positive",),
    ),
    Row(
        AREA,
        "setting `temperature` to 0",
        lambda w: setattr(w.la, "temperature", 0.0),
        "ValueError",
        ("temperature must be positive",),
    ),
    Row(
        AREA,
        "setting `sigma_noise` to NaN",
        lambda w: setattr(w.la, "sigma_noise", float("nan")),
        "ValueError",
        ("sigma_noise must be positive",),
        "regression",
    ),
]
