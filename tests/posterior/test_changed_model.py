"""A prediction notices that its model is another one, and nothing else."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from laplace_debiased import DebiasedLaplace
from laplace_debiased.errors import ModelChangedError
from tests.posterior.cases import INPUTS, LABELS, STRUCTURES, fitted, loader, network
from tests.untouched import untouched

Change = Callable[[nn.Module], object]


def step(model: nn.Module, optimiser: torch.optim.Optimizer) -> None:
    model.train()
    nn.functional.cross_entropy(model(INPUTS), LABELS).backward()
    optimiser.step()
    model.zero_grad()


def set_data(model: nn.Module) -> None:
    model[0].weight.data = model[0].weight.data * 1.5


def replace_parameter(model: nn.Module) -> None:
    model[3].bias = nn.Parameter(model[3].bias.detach() + 1)


def replace_layer(model: nn.Module) -> None:
    model[3] = nn.Linear(5, 3).double()


def nudge(model: nn.Module) -> None:
    """Change the entry that counts least."""
    flat = model[0].weight.detach().view(-1)
    flat[flat.abs().argmin()] += 1e-9


CHANGES: dict[str, Change] = {
    "an optimiser's step": lambda m: step(m, torch.optim.SGD(m.parameters(), lr=1e-3)),
    "running statistics": lambda m: m.train()(INPUTS),
    "a write under no_grad": lambda m: nn.init.zeros_(m[3].bias),
    "a nudge of one small entry": nudge,
    "a write through data": lambda m: m[0].weight.data.mul_(1.1),
    "a frozen layer's write through data": lambda m: m[1].weight.data.zero_(),
    "other data": set_data,
    "another parameter": replace_parameter,
    "another layer": replace_layer,
    "other weights loaded": lambda m: m.load_state_dict(network(0.5).state_dict()),
    "another dtype": lambda m: m.float(),
}


@pytest.mark.parametrize(
    ("structure", "name"),
    [*(("kron", name) for name in CHANGES), ("lowrank", "a write through data")],
)
def test_changed_model_is_refused_at_every_prediction(structure: str, name: str) -> None:
    model = network()
    la = fitted(structure, model)
    expected = la(INPUTS)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    CHANGES[name](model)
    x = INPUTS.float() if name == "another dtype" else INPUTS
    for call in (
        lambda: la(x),
        lambda: la(x, pred_type="nn"),
        lambda: la.functional_samples(x, n_samples=2),
        lambda: la.optimize_prior_precision(val_loader=loader()),
        lambda: la.fit(loader(), override=False),
    ):
        with pytest.raises(ModelChangedError, match=r"[Cc]all fit again|Fit anew"):
            call()
    # The posterior itself is as good as before: with its weights back, it goes on.
    model.eval().double().load_state_dict(before)
    assert torch.equal(la(INPUTS), expected)


def reassign(model: nn.Module) -> None:
    state = {key: value.clone() for key, value in model.state_dict().items()}
    model.load_state_dict(state, assign=True)


def signed_zero(model: nn.Module) -> None:
    """A step of length zero turns −0 into 0."""
    with torch.no_grad():
        model[0].bias.copy_(model[0].bias + torch.zeros(5).double())


HARMLESS: dict[str, Change] = {
    "the same weights loaded": lambda m: m.load_state_dict(copy.deepcopy(m.state_dict())),
    "the same weights assigned": reassign,
    "a step of length zero": lambda m: step(m.eval(), _frozen_statistics(m)),
    "signs of zero": signed_zero,
    "train mode": lambda m: m.train(),
    "frozen": lambda m: m.requires_grad_(False),
    "channels": lambda m: setattr(m[0].weight, "data", m[0].weight.data.clone()),
    "gradients": lambda m: m(INPUTS).sum().backward(),
    "a hook": lambda m: m[0].register_forward_hook(lambda *_: None),
}


def _frozen_statistics(model: nn.Module) -> torch.optim.Optimizer:
    model[1].momentum = 0.0
    model[1].track_running_stats = False
    return torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9)


@pytest.mark.parametrize("name", HARMLESS)
def test_nothing_else_is_an_alarm(name: str) -> None:
    model = network()
    if name == "signs of zero":
        model[0].bias.data.fill_(-0.0)
    la = fitted("kron", model)
    la(INPUTS)
    HARMLESS[name](model)
    model[1].track_running_stats = True
    for _ in range(2):
        la(INPUTS)
        la(INPUTS, pred_type="nn", n_samples=2)
    la.fit(loader(), override=False)


LAST_LAYERS = ["kron_last_layer", "lowrank_last_layer"]


@pytest.mark.parametrize("structure", LAST_LAYERS)
def test_last_layer_posterior_watches_its_network(structure: str) -> None:
    la = fitted(structure)
    with torch.no_grad():
        la.model.model[3].weight += 1
    with pytest.raises(ModelChangedError, match=r"3\.weight has other values"):
        la(INPUTS)


@pytest.mark.parametrize(
    ("structure", "name"),
    [*((LAST_LAYERS[0], name) for name in CHANGES), (LAST_LAYERS[1], "an optimiser's step")],
)
def test_last_layer_posterior_follows_its_network(structure: str, name: str) -> None:
    model = network()
    la = fitted(structure, model)
    expected = la(INPUTS)
    before = copy.deepcopy(model)
    CHANGES[name](model)
    x = INPUTS.float() if name == "another dtype" else INPUTS
    for call in (
        lambda: la(x),
        lambda: la(x, pred_type="nn"),
        lambda: la.functional_samples(x, n_samples=2),
        lambda: la.optimize_prior_precision(val_loader=loader()),
        lambda: la.fit(loader(), override=False),
    ):
        with pytest.raises(ModelChangedError, match=r"[Cc]all fit again|Fit anew"):
            call()
    model.double().load_state_dict(before.state_dict())
    assert torch.equal(la(INPUTS), expected)
    if name == "another dtype":
        return
    CHANGES[name](model)
    la.fit(loader(), n_samples=None)
    torch.testing.assert_close(la(INPUTS), fitted(structure, copy.deepcopy(model))(INPUTS))
    assert not torch.allclose(la(INPUTS), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("structure", LAST_LAYERS)
def test_fit_is_at_the_weights_that_the_network_has_then(structure: str) -> None:
    """Trained between construction and fit; the name is found anew in another architecture."""
    subset, hessian = STRUCTURES[structure]
    for named in (None, "3"):
        model = network()
        la = DebiasedLaplace(model, "classification", subset, hessian, last_layer_name=named)
        step(model, torch.optim.SGD(model.parameters(), lr=0.5))
        la.fit(loader(), n_samples=None)
        expected = fitted(structure, copy.deepcopy(model))
        torch.testing.assert_close(la.mean, expected.mean)
        torch.testing.assert_close(la(INPUTS), expected(INPUTS))
        model.append(nn.Linear(3, 3).double())
        if named is None:
            la.fit(loader(), n_samples=None)
            assert la.coverage.covered == ("4.weight", "4.bias")
        else:
            with pytest.raises(ValueError, match="not those of its last layer '3'"):
                la.fit(loader(), n_samples=None)
            del model[4]
            torch.testing.assert_close(la(INPUTS), expected(INPUTS))


@pytest.mark.parametrize("structure", LAST_LAYERS)
def test_failed_refit_leaves_the_earlier_posterior(structure: str) -> None:
    model = network()
    la = fitted(structure, model)
    expected, state = la(INPUTS), copy.deepcopy(model.state_dict())
    own = la.model
    bad = DataLoader(TensorDataset(INPUTS, LABELS + 7), batch_size=7)
    for change in (step, replace_layer):
        step(model, torch.optim.SGD(model.parameters(), lr=0.5))
        if change is replace_layer:
            replace_layer(model)
        attributes = dict(vars(la))
        with pytest.raises(ValueError, match="class indices"):
            la.fit(bad, n_samples=None)
        assert la.model is own
        assert vars(la).keys() == attributes.keys()
        assert all(vars(la)[name] is value for name, value in attributes.items())
        with pytest.raises(ModelChangedError):
            la(INPUTS)
    model.load_state_dict(state)
    assert torch.equal(la(INPUTS), expected)


@pytest.mark.parametrize("structure", LAST_LAYERS)
@pytest.mark.parametrize("name", HARMLESS)
def test_nothing_else_is_an_alarm_for_a_last_layer(structure: str, name: str) -> None:
    model = network()
    if name == "signs of zero":
        model[0].bias.data.fill_(-0.0)
    la = fitted(structure, model)
    own = la.model
    la(INPUTS)
    HARMLESS[name](model)
    model[1].track_running_stats = True
    for _ in range(2):
        la(INPUTS)
        la(INPUTS, pred_type="nn", n_samples=2)
    la.fit(loader(), override=False, n_samples=None)
    assert la.model is own


@pytest.mark.parametrize("structure", LAST_LAYERS)
@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_of_a_last_layer_posterior_are_on_their_own(structure: str, how: str) -> None:
    model = network()
    la = fitted(structure, model)
    twin = copy.deepcopy(la) if how == "deepcopy" else pickle.loads(pickle.dumps(la))
    replace_layer(model)
    with pytest.raises(ModelChangedError):
        la(INPUTS)
    twin(INPUTS)
    twin.fit(loader(), n_samples=None)


@pytest.mark.parametrize("structure", LAST_LAYERS)
def test_loaded_last_layer_posterior_follows_its_network(structure: str, tmp_path: Path) -> None:
    model = network()
    la = fitted(structure, model)
    expected = la(INPUTS)
    la.save(tmp_path / "la")
    loaded = DebiasedLaplace.load(tmp_path / "la", model)
    assert torch.equal(loaded(INPUTS), expected)
    state = copy.deepcopy(model.state_dict())
    step(model, torch.optim.SGD(model.parameters(), lr=0.5))
    with pytest.raises(ModelChangedError):
        loaded(INPUTS)
    with pytest.raises(ValueError, match="other weights"):
        loaded.load_state_dict(la.state_dict())
    # A posterior that was made before the weights were loaded takes the state of these weights.
    early = DebiasedLaplace(model, "classification", *STRUCTURES[structure])
    model.load_state_dict(state)
    early.load_state_dict(la.state_dict())
    assert torch.equal(early(INPUTS), expected)
    assert torch.equal(loaded(INPUTS), expected)


@pytest.mark.parametrize("structure", LAST_LAYERS)
def test_last_layer_posterior_works_on_the_users_own_network(structure: str) -> None:
    model = network()
    la = fitted(structure, model)
    with untouched(model):
        la(INPUTS)
        la.fit(loader(), n_samples=None)
    assert la.model.model is model
    assert la.params[0] is model[3].weight
    assert not any(module._forward_hooks for module in model.modules())


def test_fitting_again_makes_the_present_weights_the_model() -> None:
    model = network()
    la = DebiasedLaplace(model)
    la.fit(loader())
    step(model, torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(ModelChangedError):
        la(INPUTS)
    la.fit(loader())
    assert torch.isfinite(la(INPUTS)).all()
