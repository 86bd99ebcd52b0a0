"""The demo: its data, its network, and a quick run end to end."""

from __future__ import annotations

import io
import json
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch.utils.data import TensorDataset

from laplace_debiased.calibration import Comparison
from laplace_debiased.demo import run_demo
from laplace_debiased.demo.digits import (
    HELD_OUT_DIGITS,
    build_network,
    load_splits,
    rotate,
    train_network,
)

ROWS = ["map", "temperature", "prior_only", "last_layer", "posterior"]
SPLITS = ["clean", "noisy", "rotated"]
OPTIONS = {"n_samples": 16, "seed": 3, "quick": True, "progress_bar": False}


@dataclass(frozen=True)
class QuickRun:
    output: Path
    comparisons: dict[str, Comparison]
    printed: str


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> QuickRun:
    output, printed = tmp_path_factory.mktemp("demo") / "new" / "folder", io.StringIO()
    with redirect_stdout(printed):
        comparisons = run_demo(output, **OPTIONS)
    return QuickRun(output, comparisons, printed.getvalue())


def test_a_run_prints_and_writes_the_tables_of_compare(quick: QuickRun) -> None:
    printed, written = quick.printed, (quick.output / "results.md").read_text()
    numbers = json.loads((quick.output / "results.json").read_text())
    assert list(quick.comparisons) == SPLITS
    for name, comparison in quick.comparisons.items():
        assert comparison.table in printed
        assert comparison.table in written
        assert (quick.output / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert list(numbers[name]) == ROWS
        outside = numbers[name]["posterior"]["n_ood_samples"]
        assert (outside is not None) == (name == "clean")
    for text in (printed, written):
        assert "Curvature on the directions' own batch over curvature on other data" in text
    assert str(quick.output) in printed.splitlines()[-1]


def test_the_same_seed_gives_the_same_numbers_and_moves_no_global_generator(
    quick: QuickRun, tmp_path: Path
) -> None:
    torch.manual_seed(99)  # whatever the user's generator holds must not matter
    before, threads = torch.get_rng_state(), torch.get_num_threads()
    again = run_demo(tmp_path, **OPTIONS)
    assert torch.equal(before, torch.get_rng_state())
    assert torch.get_num_threads() == threads
    assert {k: v.to_dict() for k, v in again.items()} == {
        k: v.to_dict() for k, v in quick.comparisons.items()
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_samples": 1}, "samples"),
        ({"n_samples": 601}, "samples"),
        ({"n_samples": 161, "quick": True}, "samples"),
        ({"seed": -1}, "seed"),
    ],
)
def test_options_out_of_range_are_refused(
    change: dict[str, int], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        run_demo(tmp_path, **OPTIONS | {"quick": False} | change)


# -- data ----------------------------------------------------------------------------------


def test_splits_are_disjoint_and_hold_two_digits_out() -> None:
    splits = load_splits(0)
    for name in ("train", "validation", "clean", "noisy", "rotated"):
        assert set(splits[name].tensors[1].tolist()) == set(range(8))
    assert set(splits["ood"].tensors[1].tolist()) == set(HELD_OUT_DIGITS)
    # The noise of every image is its own, so equal images would mean one sample in two splits.
    parts = (splits[name] for name in ("train", "validation", "clean", "ood"))
    images = torch.cat([part.tensors[0].flatten(1) for part in parts])
    assert len(torch.unique(images, dim=0)) == len(images) == 1797


def test_splits_follow_their_seed() -> None:
    first, again, other = load_splits(0), load_splits(0), load_splits(1)
    assert torch.equal(first["rotated"].tensors[0], again["rotated"].tensors[0])
    assert not torch.equal(first["train"].tensors[1], other["train"].tensors[1])


def test_rotation_by_a_right_angle_is_exact() -> None:
    images = torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    rotated = rotate(images, torch.tensor([0.0, 90.0, -90.0]))
    torch.testing.assert_close(rotated[0], images[0])
    torch.testing.assert_close(rotated[1], torch.rot90(images[1], 1, (-2, -1)))
    torch.testing.assert_close(rotated[2], torch.rot90(images[2], -1, (-2, -1)))


# -- the network -------------------------------------------------------------------------


def test_training_follows_its_seed_alone() -> None:
    train = TensorDataset(*load_splits(1)["train"][:96])

    def weights() -> torch.Tensor:
        model = train_network(train, epochs=1, seed=4, progress_bar=False)
        return torch.nn.utils.parameters_to_vector(model.parameters())

    torch.manual_seed(1)
    first, before = weights(), torch.get_rng_state()
    assert torch.equal(before, torch.manual_seed(1).get_state())
    torch.manual_seed(2)
    assert torch.equal(weights(), first)


def test_the_network_is_as_small_as_its_docstring_says() -> None:
    assert sum(parameter.numel() for parameter in build_network().parameters()) == 600
