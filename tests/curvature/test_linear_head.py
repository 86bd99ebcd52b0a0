"""A last-layer posterior takes networks only whose outputs are W φ + b."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from laplace.curvature import CurvlinopsGGN
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from laplace_debiased import DebiasedLaplace

STRUCTURES = ["kron", "lowrank"]
GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(24, 4, generator=GENERATOR)
SEQUENCES = torch.randn(24, 6, 4, generator=GENERATOR)
Y = torch.arange(24) % 3


AFTER = {
    "nothing": lambda f: f,
    "a temperature": lambda f: f / 0.25,
    "a small temperature": lambda f: f * 1.01,
    "a cap": lambda f: 2 * torch.tanh(f / 2),
    "a normalisation": lambda f: f.log_softmax(-1),
    "a sum": lambda f: f.sum(1),
    "the first": lambda f: f[:, 0],
    "the last": lambda f: f[:, -1],
    "the average": lambda f: f.mean(1),
    "fewer outputs": lambda f: f[:, :2],
}


class Network(nn.Module):
    """A linear head with something after it."""

    def __init__(self, after: str = "nothing") -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            self.body, self.head = nn.Linear(4, 5), nn.Linear(5, 3)
        self.after = after

    def forward(self, x: Tensor) -> Tensor:
        if self.after == "a cast":
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return self.head(torch.tanh(self.body(x)).float()).float()
        return AFTER[self.after](self.head(torch.tanh(self.body(x))))


def loader(x: Tensor, dtype: torch.dtype = torch.float32) -> DataLoader:
    return DataLoader(TensorDataset(x.to(dtype), Y), batch_size=7)


def posterior(model: nn.Module, structure: str, x: Tensor = X, **options: Any) -> Any:
    dtype = next(model.parameters()).dtype
    la = DebiasedLaplace(
        model, "classification", "last_layer", structure, last_layer_name="head", **options
    )
    la.fit(loader(x, dtype), n_samples=None)
    return la


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize(
    "after", ["a temperature", "a small temperature", "a cap", "a normalisation"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_outputs_that_are_changed_after_the_layer_are_refused(structure, after, dtype):
    with pytest.raises(ValueError, match=r"not those of its last layer 'head'.*subset_of_weights"):
        posterior(Network(after).to(dtype), structure)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_outputs_of_another_shape_are_refused(structure):
    model = Network("fewer outputs")
    loaded = DataLoader(TensorDataset(X, Y % 2), batch_size=7)
    la = DebiasedLaplace(model, "classification", "last_layer", structure, last_layer_name="head")
    with pytest.raises(ValueError, match=r"shape \(\d+, 2\), the layer's \(\d+, 3\)"):
        la.fit(loaded, n_samples=None)


REDUCTIONS = {"the first": "pick_first", "the last": "pick_last", "the average": "average"}


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("reduction", REDUCTIONS.values())
@pytest.mark.parametrize("after", [*REDUCTIONS, "a sum"])
def test_only_the_models_own_reduction_is_taken(structure, after, reduction):
    model = Network(after)
    if REDUCTIONS.get(after) == reduction:
        posterior(model, structure, SEQUENCES, feature_reduction=reduction)(SEQUENCES)
    else:
        with pytest.raises(ValueError, match="feature_reduction"):
            posterior(model, structure, SEQUENCES, feature_reduction=reduction)


def test_a_backends_fit_is_refused_too():
    with pytest.raises(ValueError, match="not those of its last layer"):
        posterior(Network("a temperature"), "kron", backend=CurvlinopsGGN, magnitudes="kfac")


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("backprop", [False, True])
def test_predictions_check_every_batch(structure, backprop):
    """What comes after the layer may depend on the input."""

    class Gated(Network):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * torch.where(x[:, :1] > 10, 2.0, 1.0)

    la = posterior(Gated(), structure, enable_backprop=backprop)
    la(X)
    for call in (la, lambda x: la(x, pred_type="nn"), la.functional_samples):
        with pytest.raises(ValueError, match="not those of its last layer"):
            call(X + 20)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_the_advised_ways_give_the_true_variance(structure):
    """Frozen body under "all", and the scale folded into the layer, agree; float64."""
    scaled = Network("a temperature").double()
    folded = Network().double()
    folded.load_state_dict(scaled.state_dict())
    with torch.no_grad():
        folded.head.weight /= 0.25
        folded.head.bias /= 0.25
    x = X.double()
    la = posterior(folded, structure, prior_precision=1e-3 / 16, scheme="single")
    scaled.body.requires_grad_(False)
    general = DebiasedLaplace(
        scaled, "classification", "all", structure, prior_precision=1e-3, scheme="single"
    )
    general.fit(loader(X, torch.float64), n_samples=None)
    # The prior on W/0.25 is 16 times as wide, so 1/16 of the precision is the same prior.
    variances = [p._glm_predictive_distribution(x)[1] for p in (la, general)]
    torch.testing.assert_close(*variances, rtol=1e-6, atol=0)


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize(
    ("dtype", "after"),
    [
        (torch.float32, "nothing"),
        (torch.bfloat16, "nothing"),
        (torch.float16, "nothing"),
        (torch.float32, "a cast"),
    ],
)
def test_rounding_is_no_alarm(structure, dtype, after):
    """A wide layer with outputs of all sizes, one sample at a time, in every dtype."""
    model = Network(after)
    model.body, model.head = nn.Linear(4, 512), nn.Linear(512, 3, bias=False)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
        model.head.weight *= torch.tensor([1.0, 1e-3, 1e-3]).unsqueeze(1)
    model = model.to(dtype)
    la = posterior(copy.deepcopy(model), structure)
    for sample in X.to(dtype):
        la(sample.unsqueeze(0))


@pytest.mark.parametrize("structure", STRUCTURES)
def test_gradients_with_respect_to_inputs_pass_through(structure):
    la = posterior(Network().double(), structure, enable_backprop=True)
    x = X[:2].double().requires_grad_()
    assert torch.autograd.gradcheck(lambda z: la._glm_predictive_distribution(z)[1], (x,))
