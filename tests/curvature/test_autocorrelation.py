"""A convolution's input covariance without patches equals that of its patches."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from laplace_debiased.curvature.kernels import input_covariance
from laplace_debiased.curvature.operations.autocorrelation import applies_to, patch_covariance
from laplace_debiased.curvature.operations.convolution import ConvRule, patches
from laplace_debiased.curvature.recorder import record

SAME_3X3 = {"kernel_size": 3, "padding": 1}


def images(m: int, channels: int, height: int, width: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(m, channels, height, width, generator=generator, dtype=torch.float64)


def through_patches(
    x: torch.Tensor, kernel: tuple[int, int], weights: torch.Tensor | None = None
) -> torch.Tensor:
    pad = (kernel[0] // 2, kernel[1] // 2)
    return input_covariance(nn.functional.unfold(x, kernel, padding=pad).transpose(1, 2), weights)


def call_of(layer: nn.Module, x: torch.Tensor):
    """The layer's call, as a forward pass shows it."""
    (call,) = record(nn.Sequential(layer, nn.Flatten()), ["0.weight"], x).calls[:1]
    assert isinstance(call.rule, ConvRule)
    return call


@settings(max_examples=40, deadline=None)
@given(
    m=st.integers(1, 3),
    channels=st.integers(1, 4),
    height=st.integers(3, 9),
    width=st.integers(3, 9),
    kernel=st.sampled_from([(3, 3), (1, 3), (3, 1)]),
    weighted=st.booleans(),
)
def test_equals_the_patches_covariance(m, channels, height, width, kernel, weighted):
    x = images(m, channels, height, width)
    weights = torch.arange(m, dtype=torch.float64) if weighted else None
    expected = through_patches(x, kernel, weights)
    torch.testing.assert_close(
        patch_covariance(x, kernel, weights), expected, rtol=1e-12, atol=1e-12
    )


def test_single_precision_keeps_the_small_eigenvalues_sign():
    x = images(8, 4, 24, 24)
    exact = through_patches(x, (3, 3))
    found = patch_covariance(x.float(), (3, 3)).double()
    assert (found - exact).abs().max() <= 1e-5 * exact.abs().max()
    assert torch.equal(found, found.T)
    assert torch.linalg.eigvalsh(found)[0] > 0.5 * torch.linalg.eigvalsh(exact)[0]


@pytest.mark.parametrize(
    ("layer", "expected"),
    [
        (SAME_3X3, True),
        ({"kernel_size": (1, 3), "padding": (0, 1)}, True),
        ({"kernel_size": 3, "padding": "same"}, True),
        ({"kernel_size": 3, "padding": 0}, False),
        ({"kernel_size": 3, "padding": 1, "stride": 2}, False),
        ({"kernel_size": 3, "padding": 2, "dilation": 2}, False),
        ({"kernel_size": 3, "padding": 1, "groups": 2}, False),
        ({"kernel_size": 1}, False),
        ({"kernel_size": 5, "padding": 2}, False),
    ],
)
def test_says_to_which_layers_it_applies(layer, expected):
    x = images(1, 2, 16, 16)
    call = call_of(nn.Conv2d(2, 2, **layer).double(), x)
    assert applies_to(call.settings, x) is expected


def test_what_is_padded_before_is_read_without_padding():
    x = images(1, 2, 16, 16)
    call = call_of(nn.Conv2d(2, 2, 3, padding=1, padding_mode="circular").double(), x)
    assert call.inputs[0].shape == (1, 2, 18, 18)
    assert not applies_to(call.settings, call.inputs[0])


def test_small_images_go_through_their_patches():
    x = images(1, 2, 8, 8)
    assert not applies_to(call_of(nn.Conv2d(2, 2, **SAME_3X3).double(), x).settings, x)


def test_a_layer_uses_it_and_agrees_with_its_own_patches():
    layer = nn.Conv2d(2, 5, **SAME_3X3).double()
    x = images(3, 2, 12, 13)
    call = call_of(layer, x)
    assert applies_to(call.settings, x)
    expected = input_covariance(patches(x, call.settings))
    actual = call.input_factor("weight")
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
