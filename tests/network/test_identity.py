"""What a fingerprint sees of a model, and what a watch costs."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from laplace_debiased.errors import ModelChangedError
from laplace_debiased.network.identity import ModelFingerprint, fingerprint
from laplace_debiased.network.watch import ModelWatch
from tests.posterior.cases import network
from tests.untouched import untouched


def replace_layer(model: nn.Module) -> None:
    model[3] = nn.Linear(5, 3).double()


def test_check_reads_no_weights_and_touches_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = network()
    watch = ModelWatch(fingerprint(model))
    with untouched(model):
        watch.check(model)
    calls = []
    monkeypatch.setattr(
        "laplace_debiased.network.watch.fingerprint",
        lambda m: calls.append(m) or fingerprint(m),
    )
    for _ in range(3):
        watch.check(model)
    assert calls == []
    model.load_state_dict(model.state_dict())
    watch.check(model)
    watch.check(model)
    assert calls == [model]


def test_fingerprint_depends_on_names_shapes_dtypes_and_values_alone() -> None:
    model = network()
    print_ = fingerprint(model)
    twin = copy.deepcopy(model).train().requires_grad_(False)
    assert fingerprint(twin).digest == print_.digest
    for change in (lambda m: m.half(), lambda m: m[3].bias.data.add_(1), replace_layer):
        other = copy.deepcopy(model)
        change(other)
        assert fingerprint(other).digest != print_.digest
    assert ModelFingerprint.from_state(print_.entries) == print_
    with pytest.raises(ValueError, match="damaged"):
        ModelFingerprint.from_state({"a": 1})


def test_fingerprint_ignores_layout_and_what_a_state_dict_leaves_out() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(2, 3, 2)
            self.again = self.conv
            self.register_buffer("cache", torch.rand(3), persistent=False)
            self.register_buffer("flag", torch.tensor([True, False]))
            self.register_buffer("empty", torch.zeros(0))
            self.register_buffer("phase", torch.ones(2, dtype=torch.complex64))
            self.narrow = nn.Parameter(torch.ones(4, dtype=torch.bfloat16))

    model = Odd()
    watch = ModelWatch(fingerprint(model))
    watch.check(model)
    assert sorted(watch.reference.entries) == [
        "conv.bias", "conv.weight", "empty", "flag", "narrow", "phase",
    ]  # fmt: skip
    model.cache = torch.rand(7)
    model.to(memory_format=torch.channels_last)
    watch.check(model)
    watch.check(model)
    model.conv.weight.data[0, 0, 0, 0] = model.conv.weight.data.abs().max() * 2
    model.flag.data.zero_()
    with pytest.raises(ModelChangedError, match=r"conv\.weight has other values, flag has other"):
        watch.check(model)
    with pytest.raises(ValueError, match="meta"):
        fingerprint(nn.Linear(2, 2, device="meta"))


def test_large_models_hash_as_small_ones_do(monkeypatch: pytest.MonkeyPatch) -> None:
    model = network()
    expected = fingerprint(model)
    monkeypatch.setattr("laplace_debiased.network.identity._PARALLEL_BYTES", 0)
    assert fingerprint(model) == expected
