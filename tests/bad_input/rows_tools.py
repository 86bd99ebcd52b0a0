"""Scores, diagnostics and optimisers with arguments of the wrong kind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from laplace_debiased import (
    NextTokenLabels,
    compare,
    directional_profile,
    evaluate,
    fit_temperature,
)
from laplace_debiased.diagnostics import (
    batch_size_sweep,
    disjoint_batches,
    eigenspace_overlap,
    kfac_profile,
    top_eigenpairs,
)
from laplace_debiased.optim import MiniBatches, NewtonCG, Quadratic, debiased_cg, model_quadratic
from tests.bad_input.rows import Row
from tests.bad_input.world import World, Wrapped

AREA = "Scores, diagnostics and optimisers"


def tool(input: str, act: Callable[[World], Any], error: str, *names: str) -> Row:
    """A row of a call."""
    return Row(AREA, input, act, error, names)


def profile(shown: str, error: str, *names: str, **kwargs: Any) -> Row:
    """A row of a directional profile."""
    return tool(
        f"`directional_profile({shown})`",
        lambda w: directional_profile(
            **{
                "model": w.model,
                "likelihood": "classification",
                "batch": (w.x[:6], w.y[:6]),
                "other_batch": (w.x[6:], w.y[6:]),
                **{k: v(w) if callable(v) else v for k, v in kwargs.items()},
            }
        ),
        error,
        *names,
    )


def sweep(w: World, **kwargs: Any) -> None:
    """A sweep over batch sizes with one argument replaced."""
    good = {"dataset": w.loader().dataset, "reference_loader": w.loader(), "batch_sizes": (4,)}
    batch_size_sweep(w.model, "classification", **{**good, "k": 2, **kwargs})


def newton(shown: str, error: str, *names: str, **kwargs: Any) -> Row:
    """A row of an optimiser's argument."""

    def act(w: World) -> None:
        given = {"params": w.model.parameters(), "model": w.model} | kwargs
        loss = given.pop("loss_func", nn.CrossEntropyLoss())
        batches = MiniBatches((w.x[:6], w.y[:6]), (w.x[6:], w.y[6:]))
        NewtonCG(loss_func=loss, **given).step(lambda: batches)

    return tool(f"`NewtonCG({shown})`", act, error, *names)


def _skewed() -> Quadratic:
    matrix = 5 * torch.eye(6) + torch.triu(torch.ones(6, 6), 1) - torch.tril(torch.ones(6, 6), -1)
    return Quadratic(lambda v: matrix @ v, torch.arange(6.0))


def _plain(v: torch.Tensor) -> torch.Tensor:
    return torch.arange(1.0, 7.0) * v


ROWS = [
    tool(
        "`evaluate` of booleans for more than two classes",
        lambda w: evaluate(torch.full((12, 3), 1 / 3), w.y.bool()),
        "ValueError",
        "labels are booleans",
        "3 classes",
    ),
    tool(
        "`evaluate` of labels that are words",
        lambda w: evaluate(w.la, [(w.x, ["cat"] * len(w.x))]),
        "TypeError",
        "targets",
        "list",
    ),
    tool(
        "`eigenspace_overlap` of a list",
        lambda w: eigenspace_overlap([1.0], torch.eye(2)),  # type: ignore[arg-type]
        "ArgumentTypeError",
        "u must be a tensor",
        "list",
    ),
    tool(
        "`fit_temperature` of a model that ends in a softmax",
        lambda w: fit_temperature(Wrapped(w.model, lambda z: z.softmax(-1)), w.loader()),
        "ValueError",
        "probabilities",
        "softmax",
    ),
    tool(
        "`debiased_cg` of a matrix that is not symmetric",
        lambda w: debiased_cg(_skewed()),
        "ValueError",
        "quadratic_directions",
        "symmetric",
    ),
    tool(
        "`debiased_cg` of magnitudes of a matrix that is not symmetric",
        lambda w: debiased_cg(Quadratic(_plain, torch.arange(6.0)), _skewed()),
        "ValueError",
        "quadratic_magnitudes",
        "symmetric",
    ),
    *(
        tool(f"`{shown}`", act, "TypeError", *names)
        for shown, act, names in (
            ("evaluate(la, (x, y))", lambda w: evaluate(w.la, (w.x, w.y)), ("loader=[(inputs",)),
            (
                "evaluate(la, dataset)",
                lambda w: evaluate(w.la, w.loader().dataset),
                ("loader", "DataLoader", "TensorDataset"),
            ),
            (
                "evaluate(la, loader, ood_loader=x)",
                lambda w: evaluate(w.la, w.loader(), ood_loader=w.x),
                ("ood_loader", "[(inputs, targets)]"),
            ),
            (
                "compare(la, iter(loader), loader)",
                lambda w: compare(w.la, iter(w.loader()), w.loader(), progress_bar=False),
                ("val_loader", "only once"),
            ),
            (
                "compare(la, loader, (x, y))",
                lambda w: compare(w.la, w.loader(), (w.x, w.y), progress_bar=False),
                ("test_loader=[(inputs",),
            ),
            (
                "evaluate(la, [(x1, x2, y)])",
                lambda w: evaluate(w.la, [(w.x, w.x, w.y)]),
                ("((x1, x2), y)",),
            ),
        )
    ),
    tool(
        "`fit_temperature` of mappings with `label` for `labels`",
        lambda w: fit_temperature(w.model, [{"x": w.x, "label": w.y}]),
        "MissingKeyError",
        "dict_key_y='label'",
    ),
    tool(
        "`evaluate` of sparse inputs",
        lambda w: evaluate(w.la, [(w.x.to_sparse(), w.y)]),
        "ValueError",
        "to_dense",
    ),
    tool(
        "`evaluate(n_bins=2**64)`",
        lambda w: evaluate(w.la, w.loader(), n_bins=2**64),
        "ValueError",
        "n_bins",
        "at most",
    ),
    tool(
        "`fit_temperature(dict_key_y={})` of mappings",
        lambda w: fit_temperature(w.model, [{"x": w.x, "labels": w.y}], dict_key_y={}),  # type: ignore[arg-type]
        "ArgumentTypeError",
        "dict_key_y",
        "dict",
    ),
    profile(
        "reference_loader=[(x.to_sparse(), y)]",
        "ValueError",
        "to_dense",
        reference_loader=lambda w: [(w.x.to_sparse(), w.y)],
    ),
    tool(
        "`model_quadratic` of targets on the meta device",
        lambda w: model_quadratic(w.model, nn.CrossEntropyLoss(), [(w.x, w.y.to("meta"))]),
        "ValueError",
        "targets",
        "meta",
    ),
    profile("model=3", "ArgumentTypeError", "model", "int", model=3),
    profile('k="a"', "ArgumentTypeError", "k must be", k="a"),
    profile("batch=3", "TypeError", "pairs", "int", batch=3),
    tool(
        "`kfac_profile(model=3)`",
        lambda w: kfac_profile(3, "classification", (w.x, w.y), (w.x, w.y)),  # type: ignore[arg-type]
        "ArgumentTypeError",
        "model",
    ),
    tool(
        "`kfac_profile` of sparse reference inputs",
        lambda w: kfac_profile(
            w.model, "classification", (w.x, w.y), (w.x, w.y), [(w.x.to_sparse(), w.y)]
        ),
        "ValueError",
        "to_dense",
    ),
    tool(
        "`model_quadratic` of inputs that the model does not take",
        lambda w: model_quadratic(w.model, nn.CrossEntropyLoss(), [(w.x[:, :1], w.y)]),
        "ModelCallError",
        "the model failed on inputs",
    ),
    tool(
        "`model_quadratic` of targets that `loss_func` does not take",
        lambda w: model_quadratic(w.model, nn.CrossEntropyLoss(), [(w.x, w.y[:-1])]),
        "ValueError",
        "loss_func",
        "targets",
    ),
    tool(
        "`top_eigenpairs(model=3)`",
        lambda w: top_eigenpairs(3, "classification", (w.x, w.y)),  # type: ignore[arg-type]
        "ArgumentTypeError",
        "model",
    ),
    *(
        tool(
            f"`batch_size_sweep({name}={shown})`",
            lambda w, name=name, value=value: sweep(w, **{name: value}),  # type: ignore[misc]
            "ArgumentTypeError",
            name,
            names,
        )
        for name, shown, value, names in (
            ("dataset", "iter(data)", iter([]), "list_iterator"),
            ("dataset", "3", 3, "int"),
            ("batch_sizes", "4", 4, "int"),
            ("progress_bar", '"no"', "no", "True or False"),
        )
    ),
    tool(
        '`compare(seed="a")`',
        lambda w: compare(w.la, w.loader(), w.loader(), seed="a"),  # type: ignore[arg-type]
        "ArgumentTypeError",
        "seed",
    ),
    tool(
        '`disjoint_batches(data, "a", generator)`',
        lambda w: disjoint_batches(w.loader().dataset, "a", torch.Generator()),  # type: ignore[arg-type]
        "ArgumentTypeError",
        "batch_size",
    ),
    tool(
        "`disjoint_batches(data, 4, 0)`, a seed for a generator",
        lambda w: disjoint_batches(w.loader().dataset, 4, 0),  # type: ignore[arg-type]
        "ArgumentTypeError",
        "generator",
    ),
    tool(
        "`NextTokenLabels(3)`",
        lambda w: NextTokenLabels(3),  # type: ignore[arg-type]
        "ArgumentTypeError",
        "collate_fn",
        "int",
    ),
    tool(
        '`debiased_cg(keep_vectors="yes")`',
        lambda w: debiased_cg(
            Quadratic(torch.eye(2), torch.ones(2)),
            keep_vectors="yes",  # type: ignore[arg-type]
        ),
        "ArgumentTypeError",
        "keep_vectors",
    ),
    tool(
        "`debiased_cg(preconditioner=int)`, a class",
        lambda w: debiased_cg(Quadratic(torch.eye(2), torch.ones(2)), preconditioner=int),
        "TypeError",
        "preconditioner",
        "type",
    ),
    tool(
        "`fit_temperature` of logits on the meta device",
        lambda w: fit_temperature(torch.ones(12, 3, device="meta"), w.loader(), ignore_index=9),
        "ValueError",
        "logits",
        "meta",
    ),
    tool(
        '`NewtonCG.step("x")`',
        lambda w: NewtonCG(w.model.parameters(), w.model, nn.CrossEntropyLoss()).step("x"),  # type: ignore[arg-type]
        "ArgumentTypeError",
        "closure",
        "MiniBatches",
        "str",
    ),
    newton('lr="a"', "ArgumentTypeError", "lr", "str", lr="a"),
    newton("damping=1e300", "ValueError", "damping", "finite", damping=1e300),
    newton("damping=10**400", "ValueError", "damping", "1e308", damping=10**400),
    newton('damping="a"', "ArgumentTypeError", "damping", "str", damping="a"),
    newton('curvature="x"', "ValueError", "curvature", "'ggn'", curvature="x"),
    newton("termination=3", "ArgumentTypeError", "termination", "int", termination=3),
    newton("line_search=3", "ArgumentTypeError", "line_search", "True", line_search=3),
    newton(
        "levenberg_marquardt=3",
        "ArgumentTypeError",
        "levenberg_marquardt",
        "True",
        levenberg_marquardt=3,
    ),
    newton("params=3", "ArgumentTypeError", "params", "int", params=3),
    newton("model=3", "ArgumentTypeError", "model", "int", model=3),
    newton(
        "loss_func=nn.CrossEntropyLoss",
        "TypeError",
        "loss_func",
        "instance",
        loss_func=nn.CrossEntropyLoss,
    ),
]
