"""Hugging Face models as they come: in PEFT's wrapper, compiled, in ``DataParallel``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from laplace_debiased import DebiasedLaplace, evaluate

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")


def tiny_bert() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=50,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
        num_labels=3,
        max_position_embeddings=16,
    )
    return transformers.BertForSequenceClassification(config).eval()


def adapted(model: nn.Module, **task: Any) -> nn.Module:
    return peft.get_peft_model(
        model, peft.LoraConfig(target_modules=["query", "value"], r=2, **task)
    )


def batches() -> DataLoader:
    g = torch.Generator().manual_seed(1)
    samples = [
        {
            "input_ids": torch.randint(0, 50, (6,), generator=g),
            "attention_mask": torch.ones(6, dtype=torch.long),
            "labels": torch.tensor(i % 3),
        }
        for i in range(12)
    ]
    return DataLoader(samples, batch_size=4)  # type: ignore[arg-type]


WRAPPERS: dict[str, Callable[[nn.Module], Any]] = {
    "LoRA": adapted,
    "LoRA with its task": lambda model: adapted(model, task_type="SEQ_CLS"),
    "DataParallel(LoRA)": lambda model: nn.DataParallel(adapted(model)),
    "compile(LoRA)": lambda model: torch.compile(adapted(model), backend="eager"),
    "compile": lambda model: torch.compile(model, backend="eager"),
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_wrapped_model_is_given_its_inputs_by_name(wrapper: str, tmp_path: Path) -> None:
    loader, model = batches(), WRAPPERS[wrapper](tiny_bert())
    batch = next(iter(loader))
    la = DebiasedLaplace(model, strict=True)
    la.fit(loader)
    la.prior_precision = 1e10
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    with torch.no_grad():
        expected = model.eval()(**inputs).logits.softmax(-1)
    torch.testing.assert_close(la(batch), expected, rtol=1e-4, atol=1e-5)
    assert evaluate(la, loader).nll > 0
    la.save(tmp_path / "la")
    assert torch.equal(DebiasedLaplace.load(tmp_path / "la", model)(batch), la(batch))
