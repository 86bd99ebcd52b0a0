"""ResNet-18, ViT-tiny, BERT and GPT-2 without downloads; skipped where a package is missing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

N, CLASSES, VOCABULARY, LENGTH = 48, 4, 1000, 7


class Samples(Dataset):
    """Images with classes, or token sequences as mappings with a mask and labels."""

    def __init__(self, shape: tuple[int, ...] | None) -> None:
        generator = torch.Generator().manual_seed(0)
        self.labels = torch.randint(CLASSES, (N,), generator=generator)
        self.shape = shape
        if shape is not None:
            self.images = torch.randn(N, *shape, generator=generator)
            return
        self.tokens = torch.randint(1, VOCABULARY, (N, LENGTH), generator=generator)
        lengths = torch.randint(3, LENGTH + 1, (N,), generator=generator)
        self.mask = (torch.arange(LENGTH) < lengths[:, None]).long()
        self.tokens = self.tokens * self.mask

    def __len__(self) -> int:
        return N

    def __getitem__(self, index: int) -> Any:
        if self.shape is not None:
            return self.images[index], self.labels[index]
        return {
            "input_ids": self.tokens[index],
            "attention_mask": self.mask[index],
            "labels": self.labels[index],
        }


class Logits(nn.Module):
    """A sequence classifier of transformers that returns its logits alone."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.inner(input_ids=input_ids, attention_mask=attention_mask).logits


def resnet18() -> nn.Module:
    torchvision = pytest.importorskip("torchvision")
    model = torchvision.models.resnet18(num_classes=CLASSES)
    model.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    model.maxpool = nn.Identity()
    return model


def narrow_resnet18() -> nn.Module:
    timm = pytest.importorskip("timm")
    return timm.create_model(
        "resnet18", pretrained=False, num_classes=CLASSES, channels=(8, 16, 24, 32), stem_width=8,
    )  # fmt: skip


def vit_tiny() -> nn.Module:
    timm = pytest.importorskip("timm")
    return timm.create_model(
        "vit_tiny_patch16_224", pretrained=False, num_classes=CLASSES, img_size=16, patch_size=8,
        depth=2,
    )  # fmt: skip


def torchvision_vit() -> nn.Module:
    torchvision = pytest.importorskip("torchvision")
    return torchvision.models.VisionTransformer(16, 8, 2, 4, 32, 64, num_classes=CLASSES)


def bert() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=VOCABULARY, hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=128, max_position_embeddings=16, num_labels=CLASSES,
    )  # fmt: skip
    return Logits(transformers.BertForSequenceClassification(config))


def gpt2() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY, n_positions=16, n_embd=64, n_layer=2, n_head=4,
        num_labels=CLASSES, pad_token_id=0,
    )  # fmt: skip
    return Logits(transformers.GPT2ForSequenceClassification(config))


def made(build: Callable[[], nn.Module]) -> nn.Module:
    """The network with weights that depend on nothing else."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build().eval()


def loader(shape: tuple[int, ...] | None) -> DataLoader:
    return DataLoader(Samples(shape), batch_size=8)
