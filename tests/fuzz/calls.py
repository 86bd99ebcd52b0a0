"""Random public calls with random wrong arguments: ``python -m tests.fuzz.calls --calls 5000``.

Every outcome is a result, or an exception that the library raises itself and that names an
argument; and nothing of the user's changes.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import linecache
import random
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from laplace_debiased import (
    DebiasedLaplace,
    directional_profile,
    evaluate,
    fit_temperature,
)
from laplace_debiased.diagnostics import kfac_profile, top_eigenpairs
from laplace_debiased.network.memory import is_out_of_memory
from laplace_debiased.optim import MiniBatches, NewtonCG, debiased_cg, model_quadratic
from tests.bad_input.world import World, snapshot, world
from tests.untouched import equal, untouched

PACKAGE = str(Path(__file__).parents[2] / "laplace_debiased")
LIKELIHOODS = ("classification", "regression", "bernoulli")
WORDS = (
    "model",
    "input",
    "target",
    "label",
    "batch",
    "loader",
    "outputs",
    "parameter",
    "state",
    "path",
    "file",
    "folder",
    "logits",
    "probs",
    "likelihood",
    "fit(",
)
"""What messages call the arguments that come inside of another one."""


@dataclass(frozen=True)
class Entry:
    """A public entry point.

    Attributes:
        name: for reports.
        call: calls it on a world with keyword arguments.
        good: arguments that it takes.
        changes: whether a result may leave another posterior.
        only_wrong: whether it is called without the good arguments.
    """

    name: str
    call: Callable[[World, dict[str, Any]], Any]
    good: Callable[[World, Path], dict[str, Any]]
    changes: bool = False
    only_wrong: bool = False


def _constructed(w: World, given: dict[str, Any]) -> Any:
    la = DebiasedLaplace(**given)
    la.fit(w.loader())
    return la(w.x)


def _fit_good(w: World, folder: Path) -> dict[str, Any]:
    return {
        "train_loader": w.loader(),
        "override": True,
        "progress_bar": False,
        "n_samples": 8,
        "n_data": 12,
        "seed": 0,
        "checkpoint": folder / "fit.pt",
        "checkpoint_interval": 60.0,
        "magnitude_loader": None,
    }


def _options(w: World, folder: Path) -> dict[str, Any]:
    return {
        "model": w.model,
        "likelihood": w.likelihood,
        "subset_of_weights": "all",
        "hessian_structure": "kron",
        "prior_precision": 1.0,
        "prior_mean": 0.0,
        "sigma_noise": 1.0,
        "temperature": 1.0,
        "enable_backprop": False,
        "dict_key_x": "input_ids",
        "dict_key_y": "labels",
        "backend": None,
        "damping": False,
        "backend_kwargs": None,
        "scheme": "cross_fit",
        "magnitudes": "ggn",
        "sampling": "uniform",
        "fisher": "type2",
        "mc_samples": 1,
        "folds": 2,
        "direction_fraction": 0.5,
        "pool_size": None,
        "byte_budget": 2**20,
        "max_rank": 64,
        "strict": False,
        "allow_probabilities": False,
    }


def _predict(w: World, folder: Path) -> dict[str, Any]:
    return {
        "x": w.x,
        "pred_type": "glm",
        "joint": False,
        "link_approx": None,
        "n_samples": 8,
        "diagonal_output": False,
        "generator": None,
        "fitting": False,
    }


def _draws(w: World, folder: Path) -> dict[str, Any]:
    good = {"x": w.x, "pred_type": "glm", "n_samples": 3, "diagonal_output": False}
    return {**good, "generator": None}


def _tuning(w: World, folder: Path) -> dict[str, Any]:
    return {
        "pred_type": "glm",
        "method": "gridsearch",
        "n_steps": 2,
        "lr": 0.1,
        "init_prior_prec": 1.0,
        "prior_structure": "scalar",
        "val_loader": w.loader(),
        "loss": None,
        "log_prior_prec_min": -2,
        "log_prior_prec_max": 2,
        "grid_size": 3,
        "link_approx": None,
        "n_samples": 8,
        "verbose": False,
        "progress_bar": False,
        "log_prior_prec_base": 10.0,
        "refine": True,
        "seed": 0,
    }


def _halves(w: World) -> tuple[Any, Any]:
    return (w.x[:6], w.y[:6]), (w.x[6:], w.y[6:])


def _profile(w: World, folder: Path) -> dict[str, Any]:
    own, other = _halves(w)
    likelihood = "classification" if w.likelihood == "bernoulli" else w.likelihood
    return {
        "model": w.model,
        "likelihood": likelihood,
        "batch": own,
        "other_batch": other,
        "reference_loader": None,
        "dict_key_y": "labels",
        "progress_bar": False,
    }


def _newton(w: World, given: dict[str, Any]) -> Any:
    batches = given.pop("directions"), given.pop("magnitudes")
    net = copy.deepcopy(w.model)
    given = {"params": net.parameters(), "model": net} | given
    return NewtonCG(**given).step(lambda: MiniBatches(*batches))


def _newton_good(w: World, folder: Path) -> dict[str, Any]:
    own, other = _halves(w)
    loss: nn.Module = nn.CrossEntropyLoss()
    if w.likelihood != "classification":
        loss = nn.MSELoss()
    return {
        "loss_func": loss,
        "lr": 1.0,
        "damping": 0.01,
        "curvature": "ggn",
        "directions": own,
        "magnitudes": other,
    }


def _solve(w: World, given: dict[str, Any]) -> Any:
    names = ("model", "loss_func", "data", "curvature", "damping")
    quadratic = model_quadratic(**{name: given.pop(name) for name in names})
    return debiased_cg(quadratic, **given)


def _solve_good(w: World, folder: Path) -> dict[str, Any]:
    loss = _newton_good(w, folder)["loss_func"]
    good = {"model": w.model, "loss_func": loss, "data": [_halves(w)[0]], "curvature": "ggn"}
    return {**good, "damping": 0.1, "quadratic_magnitudes": None, "preconditioner": None}


def _attribute(w: World, given: dict[str, Any]) -> None:
    for name, value in given.items():
        setattr(w.la, name, value)


def _loaded(w: World, given: dict[str, Any]) -> Any:
    path = given["path"]
    if isinstance(path, Path):
        w.la.save(path)
    return DebiasedLaplace.load(**given)


ENTRIES = (
    Entry("DebiasedLaplace", _constructed, _options),
    Entry("fit", lambda w, given: w.la.fit(**given), _fit_good, changes=True),
    Entry("la", lambda w, given: w.la(**given), _predict),
    Entry("functional_samples", lambda w, given: w.la.functional_samples(**given), _draws),
    Entry("predictive_samples", lambda w, given: w.la.predictive_samples(**given), _draws),
    Entry(
        "sample",
        lambda w, given: w.la.sample(**given),
        lambda w, folder: {"n_samples": 3, "generator": None},
    ),
    Entry(
        "optimize_prior_precision",
        lambda w, given: w.la.optimize_prior_precision(**given),
        _tuning,
        changes=True,
    ),
    Entry(
        "log_marginal_likelihood",
        lambda w, given: w.la.log_marginal_likelihood(**given),
        lambda w, folder: {"prior_precision": None, "sigma_noise": None},
        changes=True,
    ),
    Entry(
        "attributes",
        _attribute,
        lambda w, folder: {
            "prior_precision": 1.0,
            "prior_mean": 0.0,
            "temperature": 1.0,
            "enable_backprop": False,
            "tuned_link_approx": "probit",
        },
        changes=True,
        only_wrong=True,
    ),
    Entry("save", lambda w, given: w.la.save(**given), lambda w, folder: {"path": folder / "la"}),
    Entry(
        "load",
        _loaded,
        lambda w, folder: {
            "path": folder / "la",
            "model": w.model,
            "map_location": None,
            "check_weights": True,
        },
    ),
    Entry(
        "load_state_dict",
        lambda w, given: w.la.load_state_dict({**w.la.state_dict(), **given}),
        lambda w, folder: w.la.state_dict(),
        changes=True,
    ),
    Entry(
        "evaluate",
        lambda w, given: evaluate(**given),
        lambda w, folder: {"la_or_probs": w.la, "loader": w.loader(), "n_bins": 5},
    ),
    Entry(
        "fit_temperature",
        lambda w, given: fit_temperature(**given),
        lambda w, folder: {
            "logits_or_model": w.model,
            "val_loader": w.loader(y=w.y.reshape(12, -1)[:, 0].long().clamp(0, 2)),
            "ignore_index": None,
            "dict_key_x": "input_ids",
            "dict_key_y": "labels",
            "progress_bar": False,
        },
    ),
    Entry(
        "directional_profile",
        lambda w, given: directional_profile(**given),
        lambda w, folder: {
            **_profile(w, folder),
            "k": 3,
            "matrix": "ggn",
            "solver": "auto",
            "derivatives": "auto",
            "seed": 0,
        },
    ),
    Entry(
        "kfac_profile",
        lambda w, given: kfac_profile(**given),
        lambda w, folder: {**_profile(w, folder), "n_bands": 3, "byte_budget": 2**20},
    ),
    Entry(
        "top_eigenpairs",
        lambda w, given: top_eigenpairs(**given),
        lambda w, folder: {
            "model": w.model,
            "likelihood": _profile(w, folder)["likelihood"],
            "batch": _halves(w)[0],
            "k": 3,
            "matrix": "ggn",
            "solver": "auto",
            "seed": 0,
            "dict_key_y": "labels",
            "progress_bar": False,
        },
    ),
    Entry("NewtonCG", _newton, _newton_good),
    Entry("debiased_cg", _solve, _solve_good),
)


def _numbers() -> list[Any]:
    big = [10**30, -(10**30), 2**64]
    return [None, 0, -1, 3, 2.5, -0.1, float("nan"), float("inf"), 1e300, 1e-300, True, *big]


def _objects(w: World, folder: Path) -> list[Any]:
    values: list[Any] = ["a", "", b"x", [], (), {}, object(), 1j, [1, 2], {"a": 1}, {1: 2}, int]
    values += [nn.Linear, lambda *args: None, lambda *args: "text", np.float64(2), np.int64(2)]
    return [*values, Path("nowhere"), folder, folder / "none" / "file", range(3), {3}]


def _tensors(w: World) -> list[Any]:
    x, y = w.x, w.y
    values = [x[:0], x[:1], x[0], x[:, :3], x.double(), x.half(), x.bfloat16(), x.long(), x > 0]
    values += [x.to(torch.complex64), x.to("meta"), x.to_sparse(), x * torch.nan, x * torch.inf]
    values += [x * 1e30, x[None], x.numpy(), y, y[:3], torch.tensor(2), torch.tensor(torch.nan)]
    values += [torch.tensor(-1.0), torch.ones(2), torch.zeros(3, 0), torch.tensor([])]
    return [*values, [x], (x, y), {"x": x}, {"input_ids": x, "labels": y}, (x, y, y), x.tolist()]


def _loaders(w: World) -> list[Any]:
    x, y = w.x, w.y
    bad = [x[:0], x.half(), x.to("meta"), x * torch.nan, x[:, :2], x.to_sparse(), x.long()]
    values: list[Any] = [[(one, y[: len(one)])] for one in bad]
    values += [[(x, one)] for one in (y[:3], y + 7, y.to("meta"), y[None], None, "a", y * 1j)]
    values += [[(x, y, y)], [x], [None], ["a"], [{"labels": y}], [{"x": x}], iter([(x, y)]), []]
    values += [DataLoader(TensorDataset(x[:0], y[:0])), TensorDataset(x, y), [(x, y)], _walk(w)]
    return values


def _walk(w: World) -> Iterator[Any]:
    yield w.x, w.y


def wrong_value(w: World, folder: Path, rng: random.Random) -> Any:
    """A value that some argument may be given by mistake."""
    pools = (_numbers(), _objects(w, folder), _tensors(w), _loaders(w))
    return rng.choice(rng.choice(pools))


@dataclass(frozen=True)
class Failure:
    """A call that did not end as it should."""

    entry: str
    given: str
    problem: str


def one_call(w: World, rng: random.Random) -> Failure | None:
    """Call a random entry point with one or two wrong arguments."""
    entry = rng.choice(ENTRIES)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        good = entry.good(w, folder)
        most = 1 if entry.only_wrong else rng.choice((1, 1, 2))
        chosen = rng.sample(sorted(good), k=min(len(good), most))
        wrong = {argument: wrong_value(w, folder, rng) for argument in chosen}
        problem = _outcome(entry, w, wrong if entry.only_wrong else {**good, **wrong})
    shown = ", ".join(f"{name}={_shown(value)}" for name, value in wrong.items())
    return None if problem is None else Failure(entry.name, shown, problem)


def _shown(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"tensor{tuple(value.shape)} {value.dtype} {value.device} {value.layout}"
    return " ".join(repr(value).split())[:80]


def _outcome(entry: Entry, w: World, given: dict[str, Any]) -> str | None:
    """What is wrong with how a call ended; None if nothing is."""
    before = snapshot(w.la)
    names = [name.removeprefix("tuned_") for name in given]
    torch.manual_seed(0)
    try:
        with _quiet(), untouched(w.model):
            state = torch.get_rng_state()
            try:
                entry.call(w, given)
            finally:
                torch.set_rng_state(state)
    except AssertionError as error:
        return f"touched: {error}"
    except Exception as error:
        problem = _raised(error, names)
        if problem is None and not equal(snapshot(w.la), before):
            return "the posterior changed"
        return problem
    return None if entry.changes or equal(snapshot(w.la), before) else "the posterior changed"


class _quiet(redirect_stdout):  # noqa: N801
    """No prints and warnings."""

    def __init__(self) -> None:
        super().__init__(StringIO())
        self._errors, self._warnings = redirect_stderr(StringIO()), warnings.catch_warnings()

    def __enter__(self) -> Any:
        self._warnings.__enter__()
        warnings.simplefilter("ignore")
        self._errors.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._errors.__exit__(*error)
        self._warnings.__exit__(*error)


def _raised(error: Exception, names: list[str]) -> str | None:
    """What is wrong with an exception: not the library's own, or without a name."""
    if is_out_of_memory(error):
        return None
    frames = traceback.extract_tb(error.__traceback__)
    last = frames[-1]
    where = f"{Path(last.filename).name}:{last.lineno}"
    text = f"{type(error).__name__}: {' '.join(str(error).split())[:160]} @ {where}"
    missing_argument = isinstance(error, TypeError) and "argument" in str(error)
    if isinstance(error, OSError):
        return None
    if not last.filename.startswith(PACKAGE):
        return f"raised elsewhere: {text}"
    line = linecache.getline(last.filename, last.lineno or 0).strip()
    if not line.startswith("raise") and not missing_argument:
        return f"no error of ours: {text}"
    if not any(word in str(error) for word in (*names, *WORDS)):
        return f"names no argument: {text}"
    return None


def failures(n_calls: int, seed: int = 0) -> list[Failure]:
    """Make so many calls."""
    rng = random.Random(seed)
    worlds = {name: world(name) for name in LIKELIHOODS}
    found = []
    for _ in range(n_calls):
        failure = one_call(copy.deepcopy(worlds[rng.choice(LIKELIHOODS)]), rng)
        if failure is not None:
            found.append(failure)
    return found


def main() -> None:
    """Print failures, one per kind."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--calls", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        found = failures(arguments.calls, arguments.seed)  # a file name may be a wrong argument
    kinds = {failure.problem[-60:]: failure for failure in found}
    for failure in kinds.values():
        print(f"{failure.entry}({failure.given})\n    {failure.problem}")
    print(f"{arguments.calls} calls, {len(found)} wrong, {len(kinds)} kinds")
    raise SystemExit(bool(found))


if __name__ == "__main__":
    main()
