"""Rules of torch's own layers, registered on import."""

from torch import nn

from laplace_debiased.curvature.layers import LinearMapRule, register_layer_rule
from laplace_debiased.curvature.rules.attention import AttentionRule
from laplace_debiased.curvature.rules.convolution import ConvRule, ConvTransposeRule
from laplace_debiased.curvature.rules.embedding import EmbeddingRule
from laplace_debiased.curvature.rules.norms import ChannelNormRule, ShapeNormRule


class TransposedLinearRule(LinearMapRule):
    """Hugging Face's ``Conv1D``: a linear layer whose weight is stored as [D_in, D_out]."""

    transposed = True


def _register() -> None:
    register_layer_rule(nn.Linear, LinearMapRule())
    register_layer_rule("transformers.pytorch_utils.Conv1D", TransposedLinearRule())
    for convolution in (nn.Conv1d, nn.Conv2d, nn.Conv3d):
        register_layer_rule(convolution, ConvRule())
    for transposed in (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d):
        register_layer_rule(transposed, ConvTransposeRule())
    register_layer_rule(nn.Embedding, EmbeddingRule())
    register_layer_rule(nn.MultiheadAttention, AttentionRule())
    for shaped in (nn.LayerNorm, nn.RMSNorm, "timm.layers.norm.LayerNorm"):
        register_layer_rule(shaped, ShapeNormRule())
    batch_norms = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
    instance_norms = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
    for channels in (*batch_norms, nn.GroupNorm, *instance_norms):
        register_layer_rule(channels, ChannelNormRule())


_register()

__all__ = [
    "AttentionRule",
    "ChannelNormRule",
    "ConvRule",
    "ConvTransposeRule",
    "EmbeddingRule",
    "ShapeNormRule",
    "TransposedLinearRule",
]
