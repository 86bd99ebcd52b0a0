"""Labels that Hugging Face's causal language models shift in their own loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, default_collate

from laplace_debiased import DebiasedLaplace, NextTokenLabels, compare, evaluate, fit_temperature
from laplace_debiased.errors import MissingKeyError

transformers = pytest.importorskip("transformers")
IGNORED = -100


def samples() -> list[dict[str, Tensor]]:
    """Texts of up to six tokens, padded on the right, as for ``Trainer``."""
    generator = torch.Generator().manual_seed(1)
    rows = []
    for length in (6, 4, 6, 5, 3, 6, 6, 4):
        tokens = torch.randint(11, (6,), generator=generator)
        there = torch.arange(6) < length
        labels = tokens.masked_fill(~there, IGNORED)
        rows.append({"input_ids": tokens, "attention_mask": there.long(), "labels": labels})
    return rows


def gpt2() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = transformers.GPT2Config(
            vocab_size=11, n_positions=6, n_embd=4, n_layer=1, n_head=1, initializer_range=0.5
        )
        return transformers.GPT2LMHeadModel(config).double().eval()


def shifted_by_hand(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    batch = default_collate(rows)
    labels = torch.full_like(batch["labels"], IGNORED)
    for position in range(labels.shape[1] - 1):
        labels[:, position] = batch["labels"][:, position + 1]
    return batch | {"labels": labels}


def outcome(collate_fn: Callable[[list[Any]], Any]) -> dict[str, Any]:
    """What a fit, a tuning, an evaluation and temperature scaling come to."""
    model, loader = gpt2(), DataLoader(samples(), batch_size=3, collate_fn=collate_fn)
    la = DebiasedLaplace(model, ignore_index=IGNORED)
    la.fit(loader)
    la.optimize_prior_precision(val_loader=loader, grid_size=3)
    return {
        "tables": [block.eigenvalues for block in la.H.blocks],
        "prior": la.prior_precision,
        "map": la.tuning_result.map_loss,
        "nll": evaluate(la, loader).nll,
        "temperature": fit_temperature(model, loader, ignore_index=IGNORED),
    }


def test_every_call_sees_the_next_tokens() -> None:
    """Against labels shifted one by one, and against the model's own loss."""
    found, expected = outcome(NextTokenLabels()), outcome(shifted_by_hand)
    for name in ("tables", "prior", "map", "nll"):
        torch.testing.assert_close(found[name], expected[name], rtol=1e-10, atol=1e-12)
    assert found["temperature"] == expected["temperature"]
    batch = default_collate(samples())
    with torch.no_grad():
        own = float(gpt2()(**batch).loss)
    # The model's loss is in float32.
    assert found["map"] == pytest.approx(own, rel=1e-6)
    assert found["temperature"].nll_before == pytest.approx(own, rel=1e-6)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_comparison_scores_the_next_tokens() -> None:
    """The row of the model alone is the model's own loss."""
    model, batch = gpt2(), default_collate(samples())
    loader = DataLoader(samples(), batch_size=len(samples()), collate_fn=NextTokenLabels())
    la = DebiasedLaplace(model, ignore_index=IGNORED)
    la.fit(loader, n_samples=4)
    rows = {row.key: row.evaluation for row in compare(la, loader, loader).rows}
    with torch.no_grad():
        own = float(model(**batch).loss)
    assert rows["map"].nll == pytest.approx(own, rel=1e-6)
    assert rows["temperature"].nll <= own
    assert rows["posterior"].n_samples == int((batch["labels"][:, 1:] != IGNORED).sum())


def test_the_error_for_unshifted_labels_names_it() -> None:
    loader = DataLoader(samples(), batch_size=3)
    with pytest.raises(
        ValueError, match=r"collate_fn=NextTokenLabels\(\.\.\.\).*ignore_index=-100"
    ):
        DebiasedLaplace(gpt2(), ignore_index=IGNORED).fit(loader)


def test_what_has_no_labels_of_positions_is_refused() -> None:
    one = {"input_ids": torch.arange(3), "labels": torch.tensor(1)}
    with pytest.raises(ValueError, match=r"\(batch, positions\).*\(1,\)"):
        NextTokenLabels()([one])
    with pytest.raises(MissingKeyError, match="dict_key_y='label'"):
        NextTokenLabels(dict_key_y="label")([one])
    with pytest.raises(TypeError, match="mapping; got Tensor"):
        NextTokenLabels()([torch.arange(3)])
