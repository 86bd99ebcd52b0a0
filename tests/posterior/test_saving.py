"""A posterior comes back from its file with everything, on the model that it was fitted to only."""

from __future__ import annotations

import inspect
import json
from contextlib import nullcontext, suppress
from pathlib import Path

import pytest
import torch
from laplace.curvature import CurvlinopsEF

import laplace_debiased
from laplace_debiased import DebiasedLaplace
from laplace_debiased.curvature.rows.gram import dense
from laplace_debiased.errors import NotFittedError, StoredFileError
from laplace_debiased.files import nested
from tests.posterior.cases import (
    INPUTS,
    STRUCTURES,
    assert_equal,
    fitted,
    loader,
    network,
    numbers,
)

FIXTURES = Path(__file__).parent / "fixtures"
OPTIONS = {
    "kron": {"scheme": "two_batch", "magnitudes": "kfac", "sampling": "uniform", "strict": True},
    "kron_last_layer": {"fisher": "mc", "mc_samples": 3, "folds": 3, "temperature": 0.7},
    "lowrank": {"rank": 4, "pool_size": 20},
    "lowrank_last_layer": {"scheme": "single", "byte_budget": 2**20, "enable_backprop": True},
}


EDITS = {
    "mean": torch.tensor(1.0),
    "drawn[]": torch.zeros(3, device="meta"),
    "general[]": torch.zeros(3, device="meta"),
    "probe[1]": torch.zeros(1, 3, dtype=torch.int64),
}
"""One each that only its use would have found wanting."""


@pytest.mark.parametrize("structure", STRUCTURES)
def test_file_gives_back_class_numbers_and_every_option(structure: str, tmp_path: Path) -> None:
    la = fitted(structure, n=20, **OPTIONS[structure])
    la.optimize_prior_precision(
        val_loader=loader(), grid_size=5, link_approx="mc", n_samples=10, log_prior_prec_max=6
    )
    la.save(tmp_path / "la.pt")
    again = DebiasedLaplace.load(tmp_path / "la.pt", network())
    assert type(again) is type(la)
    assert_equal(again, la)
    assert vars(again.arguments) == vars(la.arguments)
    assert again.coverage == la.coverage
    assert again.tuned_link_approx is la.tuned_link_approx
    assert again.tuning_result == la.tuning_result
    assert again.effective_sample_size == la.effective_sample_size
    assert again._constructor_arguments() == la._constructor_arguments()
    # It goes on like the first: another fit on top gives the same.
    for one in (la, again):
        one.fit(loader(), n_samples=6, override=False, seed=3)
    assert_equal(again, la)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_every_constructor_argument_is_in_the_file_or_in_the_state(structure: str) -> None:
    la = fitted(structure)
    la._arguments = type(la.arguments)(**{**vars(la.arguments), "rank": 2})
    known = set(la._constructor_arguments()) | set(la.state_dict())
    optional = {"backend", "backend_kwargs", "asdl_fisher_kwargs", "feature_reduction"}
    refused = {"damping"}
    asked = set(inspect.signature(type(la).__init__).parameters) - {"self", "model", "options"}
    assert asked <= known | optional | refused


@pytest.mark.parametrize("structure", STRUCTURES)
def test_a_file_holds_the_data_whatever_the_default_device(structure: str, tmp_path: Path) -> None:
    la = fitted(structure)
    with torch.device("meta"):
        la.save(tmp_path / "la.pt")
    assert_equal(DebiasedLaplace.load(tmp_path / "la.pt", network()), la)


def test_regression_noise_and_vector_priors_come_back(tmp_path: Path) -> None:
    model = network()
    la = DebiasedLaplace(model, "regression", sigma_noise=0.4, prior_mean=0.1)
    la.fit([(INPUTS, INPUTS[:, :3])], n_data=100)
    la.prior_precision = torch.linspace(0.5, 2.0, la.n_layers, dtype=torch.float64)
    la.save(tmp_path / "la.pt")
    again = DebiasedLaplace.load(str(tmp_path / "la.pt"), network())
    for a, b in zip(again(INPUTS), la(INPUTS), strict=True):
        assert torch.equal(a, b)
    assert again.n_data == 100
    assert torch.equal(again.prior_mean.reshape(1), la.prior_mean.reshape(1))


def test_backend_comes_back_by_its_name(tmp_path: Path) -> None:
    la = DebiasedLaplace(network(), magnitudes="kfac", backend=CurvlinopsEF)
    la.fit(loader())
    la.save(tmp_path / "la.pt")
    again = DebiasedLaplace.load(tmp_path / "la.pt", network())
    assert again.arguments.backend.kind is CurvlinopsEF
    record = torch.load(tmp_path / "la.pt", weights_only=True)
    record["arguments/backend"] = "os.system"
    torch.save(record, tmp_path / "la.pt")
    with pytest.raises(StoredFileError, match=r"os\.system"):
        DebiasedLaplace.load(tmp_path / "la.pt", network())
    torch.save({**record, "state/H": 3}, tmp_path / "la.pt")
    with pytest.raises(StoredFileError, match=r"la\.pt.*'state/H'.*damaged or was edited"):
        DebiasedLaplace.load(tmp_path / "la.pt", network())


@pytest.mark.parametrize("structure", ["kron", "lowrank_last_layer"])
def test_an_edit_of_any_entry_is_a_state_or_named_and_loses_nothing(structure: str) -> None:
    la = fitted(structure)
    state, before = la.state_dict(), numbers(la)
    for key in state:
        others = {name: value for name, value in state.items() if name != key}
        edits = [{key: junk} for junk in (None, "a", -1, [], torch.zeros(3, 3, 3))]
        for edit in ({}, *edits):
            with suppress(ValueError):
                la.load_state_dict(others | edit)
                numbers(la)
                la.state_dict()
            la.load_state_dict(state)
    for a, b in zip(numbers(la), before, strict=True):
        assert torch.equal(a, b)


def test_a_missing_eigenbasis_and_other_tensors_are_named_when_a_state_is_read() -> None:
    la = fitted("kron", n=None)
    state, before = la.state_dict(), numbers(la)
    bases = [key for key, value in state.items() if key.endswith("_basis") and value is not None]
    edits = {f"{key} {value}": {key: value} for key in bases for value in (None, "sparse", "meta")}
    edits |= {key: {key: value} for key, value in EDITS.items()}
    edits |= {f"{key} twice": {key: torch.cat([state[key]] * 2, -1)} for key in bases}
    edits |= {f"{key} nan": {key: state[key] * torch.nan} for key in (*bases, "tables[0]")}
    edits |= {f"{key} half": {key: state[key].half()} for key in (*bases, "tables[0]")}
    triangle = next(key for key in state if key.endswith("/triangle"))
    for edit in edits.values():
        [(key, value)] = edit.items()
        if isinstance(value, str):
            value = state[key].to_sparse() if value == "sparse" else state[key].to("meta")
        with pytest.raises(ValueError, match="damaged or was edited"):
            la.load_state_dict({**state, key: value})
    rows = {triangle.replace("/triangle", "/rows"): 3}
    with pytest.raises(ValueError, match="damaged or was edited"):
        la.load_state_dict({k: v for k, v in state.items() if k != triangle} | rows)
    for a, b in zip(numbers(la), before, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("edit", [{"H[0]": torch.nan}, {"H[1]": torch.inf}, {"H[1]": -1.0}])
def test_eigenpairs_that_are_none_are_named_when_a_state_is_read(edit: dict[str, float]) -> None:
    la = fitted("lowrank")
    state, before = la.state_dict(), numbers(la)
    [(key, factor)] = edit.items()
    with pytest.raises(ValueError, match=r"damaged or was edited.*eigenpairs"):
        la.load_state_dict({**state, key: state[key] * factor})
    assert all(torch.equal(*pair) for pair in zip(numbers(la), before, strict=True))


def test_an_option_that_is_no_more_is_named_unless_it_means_what_is_done_now(
    tmp_path: Path,
) -> None:
    fitted().save(tmp_path / "la.pt")
    record = torch.load(tmp_path / "la.pt", weights_only=True)
    for value in (False, True):
        torch.save({**record, "arguments/ratio_step": value}, tmp_path / "la.pt")
        with pytest.raises(StoredFileError, match="ratio_step") if value else nullcontext():
            DebiasedLaplace.load(tmp_path / "la.pt", network())
    torch.save({**record, "arguments/magnitudes": "rayleigh_ritz"}, tmp_path / "la.pt")
    with pytest.raises(StoredFileError, match="magnitudes='rayleigh_ritz'"):
        DebiasedLaplace.load(tmp_path / "la.pt", network())


@pytest.mark.parametrize("structure", STRUCTURES)
def test_states_and_files_hold_no_containers(structure: str, tmp_path: Path) -> None:
    la = fitted(structure, **OPTIONS[structure])
    la.optimize_prior_precision(val_loader=loader(), grid_size=3, n_samples=5)
    la.save(tmp_path / "la.pt")
    state, record = la.state_dict(), torch.load(tmp_path / "la.pt", weights_only=True)
    for value in (*state.values(), *record.values()):
        assert value is None or isinstance(value, torch.Tensor | str | int | float)
    host = {"mean", "loss", "prior_mean", "prior_precision", "sigma_noise", "n_data", "n_outputs"}
    assert host | {"likelihood", "temperature", "enable_backprop", "cls_name"} <= set(state)


@pytest.mark.parametrize("version", [1, 5, 6])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_files_of_earlier_versions_are_read(structure: str, version: int) -> None:
    """Files that earlier versions of the format wrote; never written again."""
    model = network()
    model.load_state_dict(torch.load(FIXTURES / f"model_v{version}.pt", weights_only=True))
    la = DebiasedLaplace.load(FIXTURES / f"{structure}_v{version}.pt", model)
    expected = json.loads((FIXTURES / f"expected_v{version}.json").read_text())[structure]
    actual = la(INPUTS[:5], link_approx="probit")
    assert torch.allclose(actual, torch.tensor(expected, dtype=torch.float64), rtol=1e-8)
    assert la.tuned_link_approx.value == "mc"
    assert la.temperature == 1.5
    assert la._constructor_arguments()["scheme"].value == "cross_fit"


@pytest.mark.parametrize("structure", ["kron", "lowrank"])
def test_states_of_version_1_load_with_a_warning(structure: str) -> None:
    la = fitted(structure)
    state = {
        k: v for k, v in nested(la.state_dict()).items() if k not in ("model", "tuning_result")
    }
    state["version"] = 1
    if structure == "kron":
        state["H"] = [[t for t in block.values() if t is not None] for block in state["H"]]
        for fold, kept in zip(state["folds"], la.fitted.curvature.folds, strict=True):
            sides = [(block.output, block.input) for block in kept.blocks]
            fold["blocks"] = [[dense(f) for f in pair if f is not None] for pair in sides]
    subset, hessian = STRUCTURES[structure]
    other = DebiasedLaplace(network(), "classification", subset, hessian)
    with pytest.warns(UserWarning, match="cannot be checked"):
        other.load_state_dict(state)
    assert_equal(other, la)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_other_weights_are_refused_by_file_and_state(structure: str, tmp_path: Path) -> None:
    la = fitted(structure)
    la.save(tmp_path / "la.pt")
    other = network()
    with torch.no_grad():
        other[0].bias[0] += 1e-6
    with pytest.raises(ValueError, match=r"0\.bias has other values.*check_weights"):
        DebiasedLaplace.load(tmp_path / "la.pt", other)
    subset, hessian = STRUCTURES[structure]
    fresh = DebiasedLaplace(other, "classification", subset, hessian)
    with pytest.raises(ValueError, match=r"0\.bias has other values"):
        fresh.load_state_dict(la.state_dict())
    assert fresh.H is None
    loose = DebiasedLaplace.load(tmp_path / "la.pt", other, check_weights=False)
    assert torch.allclose(loose(INPUTS), la(INPUTS), atol=1e-4)


def test_other_architecture_is_refused_even_without_the_weights(tmp_path: Path) -> None:
    la = fitted()
    la.save(tmp_path / "la.pt")
    wider = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Linear(6, 3)).double()
    with pytest.raises(ValueError, match=r"parameter|shape"):
        DebiasedLaplace.load(tmp_path / "la.pt", wider, check_weights=False)


def test_wrong_class_unfitted_posterior_and_wrong_model_say_what_to_do(tmp_path: Path) -> None:
    la = fitted()
    la.save(tmp_path / "la.pt")
    with pytest.raises(StoredFileError, match=r"DebiasedKronLaplace\.load"):
        laplace_debiased.DebiasedLowRankLaplace.load(tmp_path / "la.pt", network())
    again = laplace_debiased.DebiasedKronLaplace.load(tmp_path / "la.pt", network())
    assert_equal(again, la)
    with pytest.raises(TypeError, match="model must be"):
        DebiasedLaplace.load(tmp_path / "la.pt", "model")  # type: ignore[arg-type]
    with pytest.raises(NotFittedError):
        DebiasedLaplace(network()).save(tmp_path / "b.pt")
    torch.save(la.state_dict(), tmp_path / "state.pt")
    with pytest.raises(StoredFileError, match="load_state_dict"):
        DebiasedLaplace.load(tmp_path / "state.pt", network())


@pytest.mark.parametrize("structure", STRUCTURES)
def test_frozen_network_that_is_served_loads_and_predicts(structure: str, tmp_path: Path) -> None:
    """Freezing after the training is common; strict coverage was the fit's business."""
    la = fitted(structure, strict=True)
    expected = numbers(la)
    la.save(tmp_path / "la.pt")
    frozen = network().requires_grad_(False)
    again = DebiasedLaplace.load(tmp_path / "la.pt", frozen)
    assert not any(p.requires_grad for p in frozen.parameters())
    assert again.arguments.strict
    for a, b in zip(numbers(again), expected, strict=True):
        assert torch.equal(a, b)


def test_map_location_ends_on_the_models_device(tmp_path: Path) -> None:
    la = fitted()
    la.save(tmp_path / "la.pt")
    again = DebiasedLaplace.load(tmp_path / "la.pt", network(), map_location=torch.device("cpu"))
    assert again.H.device == next(again.model.parameters()).device
    with pytest.raises(StoredFileError, match="map_location"):
        DebiasedLaplace.load(tmp_path / "la.pt", network(), map_location="cuda:99")
