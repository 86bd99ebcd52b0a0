"""Causal language models: tuning and scores of the last position only."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from laplace_debiased import DebiasedLaplace, evaluate
from laplace_debiased.errors import NumericalError

LAST = torch.tensor([3, 1, 3, 0, 3, 2])
"""Where each sequence ends."""


class Language(nn.Module):
    """Positions are independent, so that padding changes nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(7, 6), nn.Linear(6, 5)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.head(torch.tanh(self.embed(input_ids)))


def posterior() -> tuple[DebiasedLaplace, dict[str, Tensor]]:
    """A posterior, and a padded batch with labels at every position that counts."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, ids = Language().double(), torch.randint(7, (6, 4))
        labels = torch.randint(5, (6, 4))
    mask = (torch.arange(4) <= LAST[:, None]).long()
    labels = labels.masked_fill(mask == 0, -100)
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    la = DebiasedLaplace(model, "classification", prior_precision=2.0, ignore_index=-100)
    la.fit([batch], n_samples=None, n_data=6)
    return la, batch


def inputs_of(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: batch[name] for name in ("input_ids", "attention_mask")}


def at_last(values: Tensor) -> Tensor:
    return values[torch.arange(len(values)), LAST]


@pytest.mark.parametrize("one_label", [False, True])
def test_evaluate_scores_the_last_position(one_label: bool) -> None:
    """Labels of all positions, or one for each sequence."""
    la, batch = posterior()
    labels = at_last(batch["labels"])
    expected = evaluate(at_last(la(inputs_of(batch))), labels)
    if one_label:
        batch = {**batch, "labels": labels}
    found = evaluate(la, [batch], positions="last")
    assert found.n_samples == 6
    assert found.nll == pytest.approx(expected.nll, rel=1e-10)
    assert found.accuracy == expected.accuracy
    everywhere = evaluate(la, [posterior()[1]])
    assert everywhere.n_samples == int(batch["attention_mask"].sum())
    assert everywhere.nll != pytest.approx(found.nll, rel=1e-3)


@pytest.mark.parametrize("link", ["probit", "mc"])
def test_tuning_scores_the_last_position(link: str) -> None:
    la, batch = posterior()
    grid: dict[str, Any] = {"log_prior_prec_min": 0, "log_prior_prec_max": 2, "link_approx": link}
    la.optimize_prior_precision(val_loader=[batch], positions="last", **grid)
    p = la(inputs_of(batch), link_approx=link, positions="last")
    nll = -p.gather(1, at_last(batch["labels"])[:, None]).log().mean()
    last = la.tuning_result
    assert last.loss == pytest.approx(float(nll), rel=1e-4)
    logits = la.model(**inputs_of(batch)).detach()
    map_nll = nn.functional.cross_entropy(at_last(logits), at_last(batch["labels"]))
    assert last.map_loss == pytest.approx(float(map_nll), rel=1e-6)
    la.optimize_prior_precision(val_loader=[batch], **grid)
    assert la.tuning_result.map_loss != pytest.approx(last.map_loss, rel=1e-3)


def test_what_has_no_last_position_says_so() -> None:
    la, batch = posterior()
    probs, labels = at_last(la(inputs_of(batch))), at_last(batch["labels"])
    with pytest.raises(ValueError, match="positions='last' needs a posterior"):
        evaluate(probs, labels, positions="last")
    with pytest.raises(ValueError, match="positions must be one of"):
        evaluate(la, [batch], positions="first")
    with pytest.raises(ValueError, match="positions='last' is for pred_type='glm'"):
        evaluate(la, [batch], positions="last", pred_type="nn")
    with pytest.raises(ValueError, match="positions='last' is for method='gridsearch'"):
        la.optimize_prior_precision(method="marglik", positions="last")
    with pytest.raises(ValueError, match="positions='last' is for pred_type='glm'"):
        la.optimize_prior_precision(val_loader=[batch], pred_type="nn", positions="last")


def test_labels_of_next_tokens_leave_the_last_one_without() -> None:
    """Nothing counts at the last position then: the message says what would."""
    la, batch = posterior()
    ends = torch.arange(4) == LAST[:, None]
    shifted = {**batch, "labels": batch["labels"].masked_fill(ends, -100)}
    with pytest.raises(ValueError, match=r"ignore_index=-100.*give inputs without it"):
        evaluate(la, [shifted], positions="last")
    with pytest.raises(NumericalError, match=r"finite validation loss.*give inputs without it"):
        la.optimize_prior_precision(val_loader=[shifted], positions="last")
    nothing = {**batch, "labels": torch.full_like(batch["labels"], -100)}
    with pytest.raises(NumericalError, match="whether any label counts") as raised:
        la.optimize_prior_precision(val_loader=[nothing])
    assert "give inputs without it" not in str(raised.value)
