"""Another function at equal weights is another model, as far as a glance can tell."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from laplace_debiased import DebiasedLaplace, ModelChangedError
from laplace_debiased.files import nested

X, Y = torch.randn(12, 4), torch.arange(12) % 3


class Counting(nn.Module):
    """Keeps what a forward pass leaves: a count and the latest features."""

    def __init__(self) -> None:
        super().__init__()
        self.calls, self.latest = 0, None
        self.scale, self.shifts, self.constant = 1.0, [0.0], torch.zeros(3)

    def forward(self, x: Tensor) -> Tensor:
        self.calls, self.latest = self.calls + 1, x
        return self.scale * x + self.shifts[0] + self.constant


def network() -> nn.Sequential:
    torch.manual_seed(0)
    layers = nn.Linear(4, 5), nn.BatchNorm1d(5), nn.LeakyReLU(), nn.Dropout(), nn.Linear(5, 3)
    return nn.Sequential(*layers, Counting()).eval()


def fitted(model: nn.Module, subset: str) -> Any:
    la = DebiasedLaplace(model, subset_of_weights=subset)
    la.fit(DataLoader(TensorDataset(X, Y), batch_size=6))
    return la


def other_activation(model: nn.Sequential) -> None:
    model[2] = nn.Tanh()


def other_slope(model: nn.Sequential) -> None:
    model[2].negative_slope = 0.5


def other_eps(model: nn.Sequential) -> None:
    model[1].eps = 0.1


def patched(model: nn.Sequential) -> None:
    model[2].forward = lambda x: 3 * x


def hooked(model: nn.Sequential) -> None:
    model[2].register_forward_hook(lambda module, inputs, output: 3 * output)


def hooked_before(model: nn.Sequential) -> None:
    model[2].register_forward_pre_hook(lambda module, inputs: (3 * inputs[0],))


def other_attribute(model: nn.Sequential) -> None:
    model[5].scale = 3.0  # type: ignore[assignment]


def other_entry(model: nn.Sequential) -> None:
    model[5].shifts[0] = 1.0  # type: ignore[index,operator]


def written_attribute(model: nn.Sequential) -> None:
    model[5].constant.add_(1.0)  # type: ignore[operator,union-attr]


OUTPUTS = "at equal weights its outputs for a sample of the fit differ"
CHANGES = {
    hooked: OUTPUTS,
    hooked_before: OUTPUTS,
    other_attribute: OUTPUTS,
    other_entry: OUTPUTS,
    written_attribute: OUTPUTS,
    other_activation: r"module '2' is Tanh \(\) and not LeakyReLU",
    other_slope: r"negative_slope=0.5",
    other_eps: r"eps=0.1",
    patched: r"'2' is LeakyReLU .* with a forward of its own",
}


@pytest.mark.parametrize("subset", ["all", "last_layer"])
@pytest.mark.parametrize(("change", "names"), CHANGES.items())
@pytest.mark.parametrize("used", [False, True])
def test_a_changed_function_is_named(
    change: Callable[[Any], None], names: str, subset: str, used: bool
) -> None:
    model = network()
    la = fitted(model, subset)
    if used:
        la(X)
    change(model)
    with pytest.raises(ModelChangedError, match=names):
        la(X)


def test_what_changes_no_output_is_no_change() -> None:
    model = network()
    la = fitted(model, "all")
    expected = la(X)
    model[3] = nn.Identity()
    model[5].name = "for the log"  # type: ignore[assignment]
    model.train().eval()
    handle = model[2].register_forward_hook(lambda *args: None)
    assert torch.equal(la(X), expected)
    handle.remove()
    assert torch.equal(la(X), expected)


def test_a_file_says_which_modules_it_was_made_with(tmp_path: Path) -> None:
    model = network()[:5]
    la = fitted(model, "all")
    la.save(tmp_path / "la")
    same, other = copy.deepcopy(model), copy.deepcopy(model)
    same[3] = nn.Identity()
    same[2].negative_slope = 0.01
    assert torch.equal(DebiasedLaplace.load(tmp_path / "la", same)(X), la(X))
    other_activation(other)
    with pytest.raises(ValueError, match="module '2' is Tanh and not LeakyReLU"):
        DebiasedLaplace.load(tmp_path / "la", other)


def test_a_state_of_before_does_not_say() -> None:
    model = network()
    state = nested(fitted(model, "all").state_dict())
    del state["modules"], state["probe"]
    other_activation(model)
    DebiasedLaplace(model).load_state_dict(state)


@pytest.mark.parametrize(
    "change", [hooked, hooked_before, other_attribute, other_slope, other_eps, patched]
)
@pytest.mark.parametrize("subset", ["all", "last_layer"])
def test_a_file_notices_another_function_of_equal_modules(
    change: Callable[[Any], None], subset: str, tmp_path: Path
) -> None:
    model = network()
    la = fitted(model, subset)
    la.save(tmp_path / "la")
    first = DebiasedLaplace.load(tmp_path / "la", model)
    first.save(tmp_path / "again")
    change(model)
    for path in (tmp_path / "la", tmp_path / "again"):
        with pytest.raises(ValueError, match="its outputs for a made-up sample differ"):
            DebiasedLaplace.load(path, model)
    with pytest.raises(ModelChangedError, match=r"made-up sample|module|forward of its own|eps"):
        first(X)
    DebiasedLaplace.load(tmp_path / "la", model, check_weights=False)


def test_a_file_notices_a_forward_that_fails(tmp_path: Path) -> None:
    model = network()
    la = fitted(model, "all")
    model[2].forward = lambda x, y: x + y
    with pytest.raises(ValueError, match="it fails on a made-up sample"):
        DebiasedLaplace(model).load_state_dict(la.state_dict())
