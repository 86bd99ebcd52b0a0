"""Networks that people have, with random weights and inputs of a few samples."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

CLASSES, VOCABULARY, LENGTH = 10, 1_000, 16


@dataclass(frozen=True)
class Case:
    """A network and what goes into it.

    Attributes:
        build: makes the network.
        size: side of its images; None for token ids.
        positions: whether it has outputs at every position.
        mask: whether token ids come with an attention mask.
    """

    build: Callable[[], nn.Module]
    size: int | None = 64
    positions: bool = False
    mask: bool = True

    def network(self) -> nn.Module:
        """The network in evaluation mode, the same at every call."""
        torch.manual_seed(0)
        return self.build().eval()

    def data(self, n: int) -> tuple[Any, Tensor]:
        """Inputs and targets of n samples."""
        generator = torch.Generator().manual_seed(0)
        if self.size is not None:
            inputs: Any = torch.randn(n, 3, self.size, self.size, generator=generator)
            return inputs, torch.randint(CLASSES, (n,), generator=generator)
        ids = torch.randint(5, VOCABULARY, (n, LENGTH), generator=generator)
        inputs = {"input_ids": ids}
        if self.mask:
            inputs["attention_mask"] = torch.ones_like(ids)
        if self.positions:
            return inputs, torch.randint(VOCABULARY, (n, LENGTH), generator=generator)
        return inputs, torch.randint(CLASSES, (n,), generator=generator)


def _torchvision(name: str, size: int = 64, **options: Any) -> Case:
    def build() -> nn.Module:
        from torchvision import models

        return getattr(models, name)(num_classes=CLASSES, **options)

    return Case(build, size)


def _timm(name: str, size: int = 64, **options: Any) -> Case:
    def build() -> nn.Module:
        import timm

        return timm.create_model(name, num_classes=CLASSES, **options)

    return Case(build, size)


def _transformers(
    model: str, config: str, *, positions: bool = False, mask: bool = True, **options: Any
) -> Case:
    def build() -> nn.Module:
        import transformers

        if not positions:
            options["num_labels"] = CLASSES
        return getattr(transformers, model)(getattr(transformers, config)(**options))

    return Case(build, None, positions, mask)


class _Encoder(nn.Module):
    """T5's encoder with a linear head on the mean of its positions."""

    def __init__(self) -> None:
        super().__init__()
        from transformers import T5Config, T5EncoderModel

        config = T5Config(
            vocab_size=VOCABULARY, d_model=256, d_kv=32, d_ff=512, num_layers=4, num_heads=8
        )
        self.encoder, self.head = T5EncoderModel(config), nn.Linear(256, CLASSES)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        found = self.encoder(input_ids=input_ids, attention_mask=attention_mask)
        return self.head(found.last_hidden_state.mean(1))


def _lora() -> nn.Module:
    from peft import LoraConfig, TaskType, get_peft_model

    base = CASES["bert"].build()
    config = LoraConfig(task_type=TaskType.SEQ_CLS, r=8, target_modules=["query", "value"])
    return get_peft_model(base, config)


def _lite0() -> nn.Module:
    from efficientnet_lite_pytorch import EfficientNet

    return EfficientNet.from_name("efficientnet-lite0", num_classes=CLASSES)


class _Recurrent(nn.Module):
    """What stays out: a fused recurrent layer."""

    def __init__(self) -> None:
        super().__init__()
        self.cells = nn.LSTM(3 * 64, 128, batch_first=True)
        self.head = nn.Linear(128, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.cells(x.transpose(1, 2).flatten(2))[0][:, -1])


_BERT = {
    "vocab_size": VOCABULARY, "hidden_size": 256, "num_hidden_layers": 4,
    "num_attention_heads": 8, "intermediate_size": 1024,
}  # fmt: skip
_GPT2 = {"vocab_size": VOCABULARY, "n_embd": 256, "n_layer": 4, "n_head": 8, "pad_token_id": 0}
_LLAMA = {**_BERT, "num_key_value_heads": 4, "pad_token_id": 0}
_DEBERTA = {
    **_BERT, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 8,
    "share_att_key": True, "norm_rel_ebd": "layer_norm",
}  # fmt: skip

CASES: dict[str, Case] = {
    "efficientnet-lite0 (registry)": Case(_lite0),
    "tf_efficientnet_lite0": _timm("tf_efficientnet_lite0"),
    "resnet18": _torchvision("resnet18"),
    "resnet50": _torchvision("resnet50"),
    "resnetv2_50": _timm("resnetv2_50"),
    "resnext50_32x4d": _timm("resnext50_32x4d"),
    "wide_resnet50_2": _torchvision("wide_resnet50_2"),
    "densenet121": _torchvision("densenet121"),
    "regnety_002": _timm("regnety_002"),
    "mobilenetv3_small_100": _timm("mobilenetv3_small_100"),
    "shufflenet_v2_x0_5": _torchvision("shufflenet_v2_x0_5"),
    "squeezenet1_1": _torchvision("squeezenet1_1"),
    "convnextv2_atto": _timm("convnextv2_atto"),
    "convnext_tiny": _torchvision("convnext_tiny"),
    "vit_tiny (class token)": _timm("vit_tiny_patch16_224", img_size=64),
    "dinov2 small (registers)": _timm("vit_small_patch14_reg4_dinov2", 56, img_size=56),
    "deit3_small": _timm("deit3_small_patch16_224", img_size=64),
    "beit": _timm("beit_base_patch16_224", img_size=64, depth=3),
    "eva02_tiny": _timm("eva02_tiny_patch14_224", 56, img_size=56),
    "swin_tiny": _timm("swin_tiny_patch4_window7_224", 56, img_size=56),
    "swin_v2_t": _torchvision("swin_v2_t"),
    "swinv2_tiny (timm)": _timm("swinv2_tiny_window8_256", img_size=64),
    "mixer_s16": _timm("mixer_s16_224", img_size=64),
    "maxvit_rmlp_pico": _timm("maxvit_rmlp_pico_rw_256", img_size=64),
    "cait_xxs24": _timm("cait_xxs24_224", img_size=64),
    "poolformer_s12": _timm("poolformer_s12"),
    "bert": _transformers("BertForSequenceClassification", "BertConfig", **_BERT),
    "distilbert": _transformers(
        "DistilBertForSequenceClassification", "DistilBertConfig",
        vocab_size=VOCABULARY, dim=256, n_layers=4, n_heads=8, hidden_dim=1024,
    ),
    "deberta-v2": _transformers(
        "DebertaV2ForSequenceClassification", "DebertaV2Config", **_DEBERTA
    ),
    "albert": _transformers(
        "AlbertForSequenceClassification", "AlbertConfig", embedding_size=64, **_BERT
    ),
    "gpt2 (classification)": _transformers("GPT2ForSequenceClassification", "GPT2Config", **_GPT2),
    "gpt2 (tied head)": _transformers("GPT2LMHeadModel", "GPT2Config", positions=True, **_GPT2),
    "llama": _transformers("LlamaForSequenceClassification", "LlamaConfig", **_LLAMA),
    "t5 encoder": Case(_Encoder, None),
    "bert with LoRA (peft)": Case(_lora, None),
    "lstm": Case(_Recurrent),
}  # fmt: skip
