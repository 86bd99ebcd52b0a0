"""States and files that were edited, or belong to another model."""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from laplace_debiased.factory import DebiasedLaplace
from tests.bad_input.rows import Row
from tests.bad_input.world import World

AREA = "Files and states"


def edited(key: str, value: Any) -> Row:
    """A row of a state with one entry replaced."""

    def act(w: World) -> None:
        w.la.load_state_dict({**w.la.state_dict(), key: value})

    shown = repr(value)
    if isinstance(value, torch.Tensor):
        shown = f"tensor of shape {tuple(value.shape)}" if value.isfinite().all() else "nan"
    return Row(AREA, f"a state with `{key}={shown}`", act, "ValueError", (key,))


def loaded(w: World, change: Any) -> None:
    """Save, and load into a changed copy of the model."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "posterior.pt"
        w.la.save(path)
        DebiasedLaplace.load(path, change(copy.deepcopy(w.model)))


def saved_with_prior(w: World, value: float) -> None:
    """Write into another posterior's prior precision, and save it."""
    la = w.posterior()
    la.fit(w.loader())
    la.prior_precision.fill_(value)
    la.state_dict()


def with_other_activation(model: Any) -> nn.Module:
    """The same modules and weights, one of which computes another function."""
    activation = next(m for m in model.modules() if isinstance(m, nn.Tanh | nn.ReLU))
    activation.forward = nn.functional.gelu
    return model


EDITS = {
    "version": -1,
    "mean": None,
    "loss": "a",
    "prior_precision": None,
    "prior_mean": torch.tensor(torch.nan),
    "sigma_noise": {},
    "temperature": -1,
    "enable_backprop": "no",
    "tuned_link_approx": "foo",
    "tuning_result": 3,
    "n_data": -1,
    "n_outputs": None,
    "n_samples": "a",
    "mean_loss": torch.tensor(torch.nan),
    "covered": None,
    "excluded": None,
    "drawn": 3,
    "probe": [3],
    "likelihood": np.zeros(2),
}
ROWS = [
    *(edited(key, value) for key, value in EDITS.items()),
    *(
        edited(f"comparisons[1]/{entry}", value)
        for entry, value in (
            ("own", "a"),
            ("other", torch.full((10,), torch.nan)),
            ("own", torch.ones(3)),
            ("other", torch.ones(4, 1)),
        )
    ),
    Row(
        AREA,
        "a number for a state",
        lambda w: w.la.load_state_dict(3),
        "ArgumentTypeError",
        ("state_dict", "int"),
    ),
    Row(
        AREA,
        "saving a prior precision into which a negative number was written",
        lambda w: saved_with_prior(w, -1.0),
        "ValueError",
        ("prior_precision", "-1"),
    ),
    Row(
        AREA,
        "a state whose factors are no tensors",
        lambda w: w.la.load_state_dict({**w.la.state_dict(), "H": "a"}),
        "ValueError",
        ("the state", "edited"),
    ),
    Row(
        AREA,
        "a state with a prior precision of the wrong length",
        lambda w: w.la.load_state_dict(
            {**w.la.state_dict(), "prior_precision": torch.ones(3), "loss": 7.0}
        ),
        "ValueError",
        ("prior_precision", "(3,)"),
    ),
    Row(
        AREA,
        "a file for a model of another floating type",
        lambda w: loaded(w, lambda m: m.double()),
        "ValueError",
        ("torch.float64, not torch.float32", "check_weights=False"),
    ),
    Row(
        AREA,
        "a file for a model of equal weights with another activation function",
        lambda w: loaded(w, with_other_activation),
        "ValueError",
        ("a made-up sample", "a function"),
    ),
]
