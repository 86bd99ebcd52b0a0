"""The names that the package promises."""

import importlib
import inspect

import pytest

import laplace_debiased
from laplace_debiased.posterior import DebiasedKronLaplace

ROOMS = [
    "likelihoods",
    "curvature",
    "operators",
    "predictive",
    "posterior",
]
FIT = {
    "train_loader": inspect.Parameter.empty,
    "override": True,
    "progress_bar": False,
    "magnitude_loader": None,
    "n_samples": "auto",
    "n_data": None,
    "seed": 0,
    "checkpoint": None,
    "checkpoint_interval": 60.0,
}


@pytest.mark.parametrize("room", ROOMS)
def test_every_name_of_a_room_exists_and_is_documented(room: str) -> None:
    module = importlib.import_module(f"laplace_debiased.{room}")
    assert module.__all__
    for name in module.__all__:
        value = getattr(module, name)
        if inspect.isclass(value) or inspect.isfunction(value):
            assert value.__doc__, name


def test_package_names_exist() -> None:
    for name in getattr(laplace_debiased, "__all__", ()):
        assert hasattr(laplace_debiased, name), name


def test_fit_has_the_promised_arguments() -> None:
    parameters = inspect.signature(DebiasedKronLaplace.fit).parameters
    assert {k: v.default for k, v in parameters.items() if k != "self"} == FIT
    keyword_only = [k for k, v in parameters.items() if v.kind is inspect.Parameter.KEYWORD_ONLY]
    assert keyword_only == [
        "magnitude_loader",
        "n_samples",
        "n_data",
        "seed",
        "checkpoint",
        "checkpoint_interval",
    ]
