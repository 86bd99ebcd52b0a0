"""The demo: its data, what stands in for laplace-torch's calls, and a quick run end to end."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch.nn import functional

from laplace_debiased.demo import DemoOptions, measure, run_demo
from laplace_debiased.demo.data import (
    HELD_OUT_DIGITS,
    DigitSplits,
    Split,
    drawn_indices,
    load_splits,
    rotate,
)
from laplace_debiased.demo.network import build_network, train_network
from laplace_debiased.demo.posteriors import HostPosterior, Jacobians, OurPosterior, prior_grid
from laplace_debiased.demo.results import Comparison, Reference, Row
from laplace_debiased.demo.spectra import measure_spectrum

ROWS = {
    "map",
    "temperature",
    "laplace_all",
    "laplace",
    "laplace_rescaled",
    "ours_single",
    "ours_paper",
    "ours",
    "ours_uniform",
    "reference",
    "reference_dense",
}
POSTERIORS = ROWS - {"map", "temperature"}
OPTIONS = {"n_samples": 16, "seed": 3, "quick": True, "progress_bar": False}


@dataclass(frozen=True)
class QuickRun:
    output: Path
    comparison: Comparison
    texts: list[str]


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> QuickRun:
    output, texts = tmp_path_factory.mktemp("demo") / "new" / "folder", []
    comparison = run_demo(DemoOptions(output=output, **OPTIONS), echo=texts.append)
    return QuickRun(output, comparison, texts)


@pytest.fixture(scope="module")
def splits() -> DigitSplits:
    return load_splits(1).truncated(96, 24)


@pytest.fixture(scope="module")
def model(splits: DigitSplits) -> torch.nn.Module:
    return train_network(splits.train, epochs=10, seed=1, progress_bar=False)


def _numbers(output: Path) -> dict[str, dict[str, dict[str, float]]]:
    results = json.loads((output / "results.json").read_text())
    return {row["key"]: row["metrics"] for row in results["rows"] + results["references"]}


# -- a quick run ---------------------------------------------------------------------------


def test_a_run_writes_tables_numbers_and_figures_and_names_the_folder(quick: QuickRun) -> None:
    for name in ("reliability.png", "eigenvalues.png"):
        assert (quick.output / name).read_bytes().startswith(b"\x89PNG")
    markdown = (quick.output / "results.md").read_text()
    for row in (*quick.comparison.rows, *quick.comparison.references):
        assert markdown.count(f"| {row.name} |") == 3
    assert str(quick.output) in quick.texts[-1]


def test_every_row_has_every_metric_and_all_are_finite(quick: QuickRun) -> None:
    numbers = _numbers(quick.output)
    assert set(numbers) == ROWS
    expected = {f"clean/{m}" for m in ("nll", "ece", "brier", "accuracy", "auroc")}
    for shift in ("noisy", "rotated"):
        expected |= {f"{shift}/{m}" for m in ("nll", "ece", "brier", "accuracy")}
    expected |= {f"kl/{r}@{p}" for r in ("kron", "dense") for p in ("1", "tuned")} | {"seconds"}
    for key, metrics in numbers.items():
        tuned = {"log10_prior_precision"} if key in POSTERIORS else set()
        assert set(metrics) == expected | tuned
        assert all(math.isfinite(m["mean"]) for m in metrics.values())


def test_full_data_posteriors_are_at_distance_zero_from_themselves_alone(quick: QuickRun) -> None:
    numbers = _numbers(quick.output)
    for prior in ("1", "tuned"):
        for reference, itself in (("kron", "reference"), ("dense", "reference_dense")):
            distances = {k: v[f"kl/{reference}@{prior}"]["mean"] for k, v in numbers.items()}
            assert abs(distances.pop(itself)) < 1e-12
            assert min(distances.values()) > 1e-12


def test_terminal_tables_are_aligned(quick: QuickRun) -> None:
    tables = quick.texts[:3]
    for table in tables:
        widths = {len(line) for line in table.strip("\n").splitlines()[1:]}
        assert len(widths) == 1


def test_the_same_seed_gives_the_same_numbers_and_moves_no_global_generator(
    quick: QuickRun,
) -> None:
    torch.manual_seed(99)  # whatever the user's generator holds must not matter
    before, threads = torch.get_rng_state(), torch.get_num_threads()
    again = measure(DemoOptions(**OPTIONS)).comparison
    assert torch.equal(before, torch.get_rng_state())
    assert torch.get_num_threads() == threads

    def without_time(comparison: Comparison) -> dict[str, dict[str, float]]:
        rows = (*comparison.rows, *comparison.references)
        return {row.key: {**row.draws[0].metrics(), "seconds": 0.0} for row in rows}

    assert without_time(again) == without_time(quick.comparison)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_samples": 1}, "samples"),
        ({"n_samples": 301}, "samples"),
        ({"n_samples": 81, "quick": True}, "samples"),
        ({"n_draws": 0}, "draws"),
        ({"seed": -1}, "seed"),
    ],
)
def test_options_out_of_range_are_refused(change: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DemoOptions(**change)


# -- data ----------------------------------------------------------------------------------


def test_splits_are_disjoint_and_hold_two_digits_out() -> None:
    splits = load_splits(0)
    for part in (splits.train, splits.validation, splits.test, splits.noisy, splits.rotated):
        assert set(part.labels.tolist()) == set(range(8))
    assert set(splits.ood.labels.tolist()) == set(HELD_OUT_DIGITS)
    # The noise of every image is its own, so equal images would mean one sample in two splits.
    parts = (splits.train, splits.validation, splits.test, splits.ood)
    images = torch.cat([part.inputs.flatten(1) for part in parts])
    assert len(torch.unique(images, dim=0)) == len(images) == 1797


def test_splits_follow_their_seed() -> None:
    first, again, other = load_splits(0), load_splits(0), load_splits(1)
    assert torch.equal(first.rotated.inputs, again.rotated.inputs)
    assert not torch.equal(first.train.labels, other.train.labels)


def test_rotation_by_a_right_angle_is_exact() -> None:
    images = torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    rotated = rotate(images, torch.tensor([0.0, 90.0, -90.0]))
    torch.testing.assert_close(rotated[0], images[0])
    torch.testing.assert_close(rotated[1], torch.rot90(images[1], 1, (-2, -1)))
    torch.testing.assert_close(rotated[2], torch.rot90(images[2], -1, (-2, -1)))


# -- what is compared ----------------------------------------------------------------------


def test_laplace_torch_gets_the_samples_that_ours_draws(
    model: torch.nn.Module, splits: DigitSplits
) -> None:
    chosen = drawn_indices(splits.train, 16, 5)
    for options in (
        {"scheme": "single"},
        {"scheme": "two_batch", "magnitudes": "kfac"},
        {"sampling": "uniform"},
    ):
        posterior = OurPosterior.fit(model, splits.train, 16, 5, **options)
        assert posterior.la.fitted.drawn == set(chosen.tolist())


def test_rescaling_equals_a_fit_on_repeated_data(
    model: torch.nn.Module, splits: DigitSplits
) -> None:
    batch = splits.train.subset(torch.arange(16))
    repeated = Split(batch.inputs.repeat(3, 1, 1, 1), batch.labels.repeat(3))
    jacobians = Jacobians.of(model)
    rescaled = HostPosterior.fit_kron(model, batch, jacobians).rescaled(48)
    oracle = HostPosterior.fit_kron(model, repeated, jacobians)
    torch.testing.assert_close(
        rescaled.predict(splits.test, 2.0), oracle.predict(splits.test, 2.0), rtol=1e-4, atol=1e-6
    )


def test_shared_jacobians_give_what_calling_laplace_torch_gives(
    model: torch.nn.Module, splits: DigitSplits
) -> None:
    posterior = HostPosterior.fit_kron(model, splits.train, Jacobians.of(model))
    torch.testing.assert_close(
        posterior.repredict(splits.test, 2.0),
        posterior.predict(splits.test, 2.0),
        rtol=1e-4,
        atol=1e-6,
    )


def test_both_libraries_choose_the_grid_point_that_trying_all_of_them_finds(
    model: torch.nn.Module, splits: DigitSplits
) -> None:
    posteriors = (
        OurPosterior.fit(model, splits.train, 16, 0),
        HostPosterior.fit_kron(model, splits.train, Jacobians.of(model)),
    )
    for posterior in posteriors:
        losses = [
            functional.nll_loss(
                posterior.predict(splits.validation, float(prior)).log(), splits.validation.labels
            )
            for prior in prior_grid()
        ]
        best = float(prior_grid()[int(torch.stack(losses).argmin())])
        assert posterior.tuned_prior(splits.validation) == pytest.approx(best, rel=1e-5)


def test_divergence_is_the_mean_kullback_leibler_divergence_from_the_reference() -> None:
    reference = torch.tensor([[0.5, 0.5], [1.0, 0.0]])
    other = torch.tensor([[0.25, 0.75], [0.5, 0.5]])
    by_hand = (0.5 * math.log(2.0) + 0.5 * math.log(2.0 / 3.0) + math.log(2.0)) / 2
    assert Reference("any", 1.0, reference).divergence(other) == pytest.approx(by_hand)


def test_a_rows_summary_is_mean_and_standard_error(quick: QuickRun) -> None:
    scores = quick.comparison.row("ours").draws[0]
    draws = tuple(
        type(scores)(scores.evaluations, scores.distances, 10.0**k, scores.seconds) for k in (1, 3)
    )
    mean, error = Row("any", "any", draws).summary("log10_prior_precision")
    assert (mean, error) == (pytest.approx(2.0), pytest.approx(1.0))
    assert Row("any", "any", draws[:1]).summary("log10_prior_precision") == (1.0, None)


def test_own_batch_curvature_is_too_small_along_its_low_directions(
    model: torch.nn.Module, splits: DigitSplits
) -> None:
    # Not a statistical claim: seeds are fixed, and the ratios are far apart.
    spectrum = measure_spectrum(model, splits, n_samples=16, n_batches=3, seed=0)
    low = spectrum.ranks() >= spectrum.ranks().shape[1] // 2

    def ratio(estimate: torch.Tensor) -> float:
        return float(estimate[low].sum() / spectrum.full_data[low].sum())

    assert ratio(spectrum.own_batch) < 0.5 * ratio(spectrum.other_batch)
    assert ratio(spectrum.own_batch) < 0.5 * ratio(spectrum.cross_fitted)


def test_two_batches_must_fit_into_the_training_split(
    model: torch.nn.Module, splits: DigitSplits
) -> None:
    with pytest.raises(ValueError, match="n_samples=49"):
        measure_spectrum(model, splits, n_samples=49, n_batches=1, seed=0)


def test_training_follows_its_seed_alone(splits: DigitSplits) -> None:
    def weights() -> torch.Tensor:
        model = train_network(splits.train, epochs=1, seed=4, progress_bar=False)
        return torch.nn.utils.parameters_to_vector(model.parameters())

    torch.manual_seed(1)
    first, before = weights(), torch.get_rng_state()
    assert torch.equal(before, torch.manual_seed(1).get_state())
    torch.manual_seed(2)
    assert torch.equal(weights(), first)


def test_the_network_is_as_small_as_its_docstring_says() -> None:
    assert sum(parameter.numel() for parameter in build_network().parameters()) == 600
