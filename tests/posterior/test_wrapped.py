"""A posterior belongs to the network, whatever a training loop has wrapped it in."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from laplace_debiased import DebiasedLaplace
from laplace_debiased.files import nested
from tests.posterior.cases import INPUTS, STRUCTURES, fitted, network


@pytest.fixture(autouse=True)
def _nothing_compiled_before() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def compiled(model: nn.Module) -> Any:
    return torch.compile(model, backend="eager")


WRAPPERS = {
    "compile": compiled,
    "DataParallel": nn.DataParallel,
    "both": lambda model: nn.DataParallel(compiled(model)),
}
AS_IT_IS = {"as it is": lambda model: model}
Wrap = Callable[[nn.Module], nn.Module]


def of_wrapped(state: dict[str, Any], inside: str) -> dict[str, Any]:
    """A state as versions up to 5 wrote it of a wrapped model."""

    def name(own: str) -> str:
        return f"{inside}.{own}" if own else inside

    of_modules = [
        f"{name('')}{line}" if line.startswith("\t") else name(line) for line in state["modules"]
    ]
    return {
        **state,
        "version": 5,
        **{key: [name(own) for own in state[key]] for key in ("covered", "general")},
        **{key: {name(own): v for own, v in state[key].items()} for key in ("excluded", "model")},
        "modules": ["\tOptimizedModule", *of_modules],
        **(
            {"last_layer_name": name(state["last_layer_name"])}
            if "last_layer_name" in state
            else {}
        ),
    }


def wrapped_fit(wrap: Wrap, structure: str) -> tuple[nn.Module, Any]:
    model = network()
    la = fitted(structure, wrap(model))
    return model, la


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("saved", WRAPPERS)
@pytest.mark.parametrize("loaded", {**WRAPPERS, **AS_IT_IS})
def test_a_file_of_a_wrapped_model_is_one_of_the_model(
    saved: str, loaded: str, structure: str, tmp_path: Path
) -> None:
    model, la = wrapped_fit(WRAPPERS[saved], structure)
    assert la.model is model or structure.endswith("last_layer")
    la.save(tmp_path / "la")
    wrap: Wrap = (WRAPPERS | AS_IT_IS)[loaded]
    frozen = copy.deepcopy(model).requires_grad_(False)
    again = DebiasedLaplace.load(tmp_path / "la", wrap(frozen))
    assert torch.equal(again(INPUTS), la(INPUTS))
    with pytest.raises(ValueError, match="other weights"):
        DebiasedLaplace.load(tmp_path / "la", wrap(network(2.0)))


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("wrap", WRAPPERS.values())
@pytest.mark.parametrize("inside", ["_orig_mod", "module", "module._orig_mod"])
def test_a_state_with_a_wrappers_names_loads(inside: str, wrap: Wrap, structure: str) -> None:
    model, la = wrapped_fit(wrap, structure)
    old = nested(la.state_dict())
    for part in reversed(inside.split(".")):
        old = of_wrapped(old, part)
    kind = type(la)
    again = kind(wrap(copy.deepcopy(model)))
    again.load_state_dict(old)
    assert torch.equal(again(INPUTS), la(INPUTS))


@pytest.mark.parametrize("wrap", WRAPPERS.values())
def test_a_hook_on_the_wrapper_is_part_of_the_function(wrap: Wrap) -> None:
    model = wrap(network())
    model.register_forward_hook(lambda module, inputs, outputs: 2 * outputs)
    la = fitted(model=model)
    assert la.model is model
    with torch.no_grad():
        expected = model.eval()(INPUTS).softmax(-1)
    la.prior_precision = 1e12
    torch.testing.assert_close(la(INPUTS), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["3", "_orig_mod.3"])
def test_a_last_layer_is_known_by_both_of_its_names(name: str) -> None:
    la = DebiasedLaplace(compiled(network()), subset_of_weights="last_layer", last_layer_name=name)
    assert la.coverage.covered == ("3.weight", "3.bias")
    with pytest.raises(ValueError, match="'2' is no linear layer"):
        DebiasedLaplace(
            compiled(network()), subset_of_weights="last_layer", last_layer_name="_orig_mod.2"
        )
