"""Options, errors, state, the last layer, and the user's world."""

from __future__ import annotations

import io

import pytest
import torch
from laplace import Laplace
from laplace.baselaplace import LowRankLaplace, ParametricLaplace
from laplace.lllaplace import LLLaplace
from torch.utils.data import DataLoader, TensorDataset

from laplace_debiased.errors import CoverageError, NotFittedError, NumericalError
from laplace_debiased.factory import DebiasedLaplace
from laplace_debiased.posterior import DebiasedLowRankLaplace, DebiasedLowRankLLLaplace
from tests.lowrank.problems import ARCHITECTURES, Case, Tokens, case, double_by_default
from tests.tolerances import relative_error
from tests.untouched import untouched


def low_rank(c: Case, subset: str = "all", **options):
    return DebiasedLaplace(c.model, c.likelihood, subset, "lowrank", **options)


def test_the_factories_find_the_classes():
    c = case()
    assert type(low_rank(c)) is DebiasedLowRankLaplace
    assert isinstance(low_rank(c), LowRankLaplace)
    last = low_rank(c, "last_layer")
    assert type(last) is DebiasedLowRankLLLaplace
    assert isinstance(last, LowRankLaplace)
    assert isinstance(last, LLLaplace)
    assert type(Laplace(c.model, "classification", "all", "debiased_lowrank")) is type(low_rank(c))
    found = Laplace(c.model, "classification", "last_layer", "debiased_lowrank")
    assert type(found) is DebiasedLowRankLLLaplace


def test_laplace_torchs_own_keys_are_not_taken():
    def subclasses(kind):
        return {kind}.union(*(subclasses(child) for child in kind.__subclasses__()))

    keys = [kind._key for kind in subclasses(ParametricLaplace) if hasattr(kind, "_key")]
    for subset in ("all", "last_layer"):
        assert keys.count((subset, "debiased_lowrank")) == 1
    assert keys.count(("all", "lowrank")) == 1


@pytest.mark.parametrize("likelihood", ["classification", "regression"])
@pytest.mark.parametrize("scheme", ["single", "two_batch", "cross_fit"])
def test_the_last_layer_is_laplace_torchs_under_single(scheme, likelihood):
    c = case("mlp", likelihood)
    la = low_rank(c, "last_layer", scheme=scheme)
    with untouched(c.model):
        la.fit(c.loader(), n_samples=None if scheme == "single" else 6)
        prediction = la(c.x, link_approx="probit")
    assert la.coverage.covered == ("2.weight", "2.bias")
    assert la(c.x, pred_type="nn", n_samples=3) is not None
    if scheme == "single":
        with double_by_default():
            full = Laplace(c.model, likelihood, "last_layer", "full")
            full.fit(c.loader())
        assert relative_error(la.precision_operator.to_matrix(), full.posterior_precision) < 1e-8
        expected = full(c.x, link_approx="probit")
        if likelihood == "regression":
            prediction, expected = prediction[1], expected[1]
        assert relative_error(prediction, expected) < 1e-8


def test_last_layer_rows_are_those_of_the_general_way():
    c = case("cnn with BatchNorm")
    last = low_rank(c, "last_layer", scheme="two_batch", rank=3)
    for name, parameter in c.model.named_parameters():
        parameter.requires_grad_(name.startswith("4."))
    general = low_rank(c, scheme="two_batch", rank=3)
    for la in (last, general):
        la.fit(c.loader(), n_samples=6)
        la.prior_precision = torch.tensor([0.5, 2.0])
    assert last.coverage.covered == general.coverage.covered
    assert (
        relative_error(last.precision_operator.to_matrix(), general.precision_operator.to_matrix())
        < 1e-9
    )
    assert relative_error(last(c.x), general(c.x)) < 1e-9
    without_rows = low_rank(c, "last_layer", scheme="two_batch", rank=3, byte_budget=100)
    without_rows.fit(c.loader(), n_samples=6)
    without_rows.prior_precision = torch.tensor([0.5, 2.0])
    assert relative_error(without_rows(c.x), general(c.x)) < 1e-7


@pytest.mark.parametrize("subset", ["all", "last_layer"])
def test_state_survives_a_safe_load(subset):
    c = case("cnn with BatchNorm")
    la = low_rank(c, subset, sampling="uniform")
    la.fit(c.loader(), n_samples=6)
    la.optimize_prior_precision(val_loader=c.loader(), grid_size=5)
    buffer = io.BytesIO()
    torch.save(la.state_dict(), buffer)
    buffer.seek(0)
    loaded = low_rank(c, subset, sampling="uniform")
    loaded.load_state_dict(torch.load(buffer, weights_only=True))
    assert torch.equal(loaded(c.x), la(c.x))
    assert str(loaded.bias_report()) == str(la.bias_report())
    assert torch.equal(loaded.log_marginal_likelihood(), la.log_marginal_likelihood())
    loaded.fit(c.loader(), n_samples=2, override=False)  # what was drawn is known
    assert loaded.fitted.drawn == frozenset(range(8))
    state = la.state_dict() | {"H[0]": torch.zeros(2, 1), "H[1]": torch.zeros(1)}
    with pytest.raises(ValueError, match="basis"):
        low_rank(c, subset).load_state_dict(state)


@pytest.mark.parametrize("method", ["gridsearch", "marglik"])
def test_tuning(method):
    c = case()
    la = low_rank(c)
    la.fit(c.loader(), n_samples=6)
    structures = ["scalar"] if method == "gridsearch" else ["scalar", "layerwise", "diag"]
    for structure in structures:
        loader = c.loader() if method == "gridsearch" else None
        la.optimize_prior_precision(
            method=method, val_loader=loader, prior_structure=structure, n_steps=3, grid_size=5
        )
        assert bool((la.prior_precision > 0).all())
        assert bool(torch.isfinite(la(c.x)).all())
    sizes = {"gridsearch": 1, "marglik": la.n_params}
    assert len(la.prior_precision) == sizes[method]


def test_mapping_batches():
    torch.manual_seed(0)
    ids, labels = torch.randint(7, (8, 5)), torch.randint(3, (8,))
    batches = [{"input_ids": a, "labels": b} for a, b in zip(ids, labels, strict=True)]
    for subset in ("all", "last_layer"):
        model = Tokens()
        la = DebiasedLaplace(model, "classification", subset, "lowrank")
        la.fit(DataLoader(batches, batch_size=3), n_samples=6)
        assert la({"input_ids": ids}).shape == (8, 3)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_the_users_world_stays_as_it_was(kind, training):
    c = case(kind)
    c.model.train(training)
    loader = DataLoader(TensorDataset(c.x, c.y), batch_size=3, shuffle=True)
    la = low_rank(c, rank=3, byte_budget=2**29 if training else 3_000)
    with untouched(c.model, loader):
        la.fit(loader, n_samples=6)
        la(c.x, link_approx="mc", generator=torch.Generator().manual_seed(0))
        la.optimize_prior_precision(val_loader=c.loader(), grid_size=3)


@pytest.mark.parametrize("subset", ["all", "last_layer"])
def test_a_look_at_the_loader_leaves_its_generator_where_it_was(subset):
    c = case()
    generator = torch.Generator().manual_seed(1)
    loader = DataLoader(TensorDataset(c.x, c.y), batch_size=3, shuffle=True, generator=generator)
    la = low_rank(c, subset)
    with untouched(c.model, loader):
        la.fit(loader)


class Failing:
    """A loader that raises on its second batch."""

    def __init__(self, c: Case) -> None:
        self.dataset = c.loader().dataset
        self.inner = c.loader(batch_size=2)

    def __iter__(self):
        for number, batch in enumerate(self.inner):
            if number == 1:
                raise OSError("the disk is gone")
            yield batch


def test_a_failing_refit_leaves_everything_as_it_was():
    c = case()
    la = low_rank(c)
    la.fit(c.loader(), n_samples=6)
    before = la(c.x), la.state_dict()["H[0]"]
    with untouched(c.model), pytest.raises(OSError, match="disk"):
        la.fit(Failing(c), n_samples=None)
    bad = Case(c.model, c.x * torch.nan, c.y, "classification")
    with untouched(c.model), pytest.raises(NumericalError):
        la.fit(bad.loader(), n_samples=6)
    assert torch.equal(la(c.x), before[0])
    assert torch.equal(la.state_dict()["H[0]"], before[1])


def test_an_automatic_budget_takes_what_fits():
    c = case("mlp", n=40)
    la = low_rank(c)
    la.fit(c.loader())
    assert la.fitted.n_samples == 40
    n_params, n_columns = 43, 2
    small = low_rank(c, byte_budget=20 * n_columns * n_params * 8 // 4)
    small.fit(c.loader())
    assert small.fitted.n_samples == 20
    assert small.n_data == 40
    with pytest.raises(ValueError, match="n_samples \\(at most 20"):
        small.fit(c.loader(), n_samples=None)
    with pytest.raises(ValueError, match="do not fit"):
        low_rank(c, byte_budget=100).fit(c.loader())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank"),
        ({"rank": True}, "rank"),
        ({"rank": 2.0}, "rank"),
        ({"magnitudes": "kfac"}, "kron"),
        ({"backend": object}, "backend=None"),
        ({"prior_precision": torch.ones(7)}, "prior_precision"),
        ({"prior_precision": -1.0}, "prior_precision"),
        ({"sigma_noise": 2.0}, "sigma_noise"),
        ({"temperature": 0.0}, "temperature"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        low_rank(case(), **options)


def test_bad_calls_are_named():
    c = case()
    la = low_rank(c)
    for call in (lambda: la(c.x), la.state_dict, la.bias_report, lambda: la.precision_operator):
        with pytest.raises(NotFittedError):
            call()
    with pytest.raises(ValueError, match="auto"):
        la.fit(c.loader(), n_samples="all")
    with pytest.raises(ValueError, match="empty"):
        la.fit([])
    for parameter in c.model.parameters():
        parameter.requires_grad_(False)
    with pytest.raises(CoverageError, match="frozen"):
        low_rank(c)


def test_saturated_predictions_are_an_error_and_no_posterior():
    c = case(dtype=torch.float32)
    with torch.no_grad():
        c.model[2].bias += torch.tensor([1e4, 0.0, 0.0])
    with pytest.raises(NumericalError, match="vanishes"):
        low_rank(c).fit(c.loader(), n_samples=6)


def test_a_prior_that_no_longer_fits_is_refused():
    c = case()
    la = low_rank(c, prior_precision=torch.ones(4))
    c.model[0].weight.requires_grad_(False)
    with pytest.raises(ValueError, match="prior_precision"):
        la.fit(c.loader(), n_samples=6)


def test_reports_how_many_samples_carry_the_curvature():
    c = case("mlp", "regression")
    la = low_rank(c)
    la.fit(c.loader(), n_samples=6)
    assert la.effective_sample_size == pytest.approx(6.0)
