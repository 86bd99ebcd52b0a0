"""What a pool is drawn in proportion to."""

import pytest
import torch
from torch import nn

from laplace_debiased.estimation.plan import Scorer
from laplace_debiased.likelihoods import loss_model
from laplace_debiased.options import Fisher
from tests.untouched import untouched

INPUTS = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)).double()
LABELS = torch.tensor([0, 2, 1, 1, 0, 2])


def scores(model, inputs=INPUTS, labels=LABELS, fisher=Fisher.TYPE2, **options):
    loss = loss_model("classification", **options)
    return Scorer(model, model, loss, fisher)(inputs, labels)


def body():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh()).double()


def test_score_is_the_trace_of_the_loss_hessian_times_the_norm_of_the_features():
    features, head = body(), nn.Linear(5, 3).double()
    model = nn.Sequential(features, head)
    p = model(INPUTS).softmax(-1)
    h = torch.stack([(torch.diag(row) - torch.outer(row, row)).trace() for row in p])
    with untouched(model):
        found, losses = scores(model)
    torch.testing.assert_close(
        found, (h * features(INPUTS).norm(dim=-1)).detach(), rtol=1e-12, atol=0
    )
    torch.testing.assert_close(losses, -p[range(6), LABELS].log().detach(), rtol=1e-12, atol=0)


def test_batches_do_not_change_a_score():
    model = nn.Sequential(body(), nn.Linear(5, 3).double())
    whole, _ = scores(model)
    scorer = Scorer(model, model, loss_model("classification"), Fisher.TYPE2)
    parts = [scorer(INPUTS[s], LABELS[s])[0] for s in (slice(0, 1), slice(1, 4), slice(4, 6))]
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-12, atol=0)


def test_the_empirical_fisher_is_scored_by_its_own_gradient():
    features, head = body(), nn.Linear(5, 3).double()
    model = nn.Sequential(features, head)
    gradient = model(INPUTS).softmax(-1) - nn.functional.one_hot(LABELS, 3)
    expected = gradient.square().sum(-1) * features(INPUTS).norm(dim=-1)
    found, _ = scores(model, fisher=Fisher.EMPIRICAL)
    torch.testing.assert_close(found, expected.detach(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("end", [nn.BatchNorm1d(3).double(), nn.LayerNorm(3).double()])
def test_without_a_linear_last_layer_the_trace_alone_counts(end):
    model = nn.Sequential(body(), nn.Linear(5, 3).double(), end).eval()
    p = model(INPUTS).softmax(-1)
    found, _ = scores(model)
    torch.testing.assert_close(found, (p * (1 - p)).sum(-1).detach(), rtol=1e-12, atol=0)


def test_features_of_sequences_count_on_average_over_positions():
    features, head = body(), nn.Linear(5, 3).double()
    inputs = torch.stack([INPUTS, 2 * INPUTS, -INPUTS], dim=1)
    labels = LABELS[:, None].expand(-1, 3)
    p = head(features(inputs)).softmax(-1)
    norms = features(inputs).square().sum(-1).mean(1).sqrt()
    found, _ = scores(nn.Sequential(features, head), inputs, labels, positions=True)
    torch.testing.assert_close(
        found, ((p * (1 - p)).sum((1, 2)) * norms).detach(), rtol=1e-12, atol=0
    )


def test_a_failing_pass_leaves_no_hook():
    class Fails(nn.Module):
        def __init__(self):
            super().__init__()
            self.head, self.calls = nn.Linear(4, 3).double(), 0

        def forward(self, x):
            self.calls += 1
            if self.calls > 1:
                raise RuntimeError("no")
            return self.head(x)

    model = Fails()
    with pytest.raises(RuntimeError, match="no"):
        scores(model)
    assert not model.head._forward_hooks
