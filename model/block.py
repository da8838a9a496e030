"""One decoder layer: attention and feed-forward, each behind an RMSNorm and added to the residual stream."""

from torch import Tensor, nn

from model.attention import MultiheadLatentAttention
from model.config import DeepseekV3Config
from model.layers import MLP, RMSNorm
from model.layout import SequenceLayout
from model.moe import DeepseekMoE, Routing


class DeepseekV3DecoderLayer(nn.Module):
    """x += attention(norm(x)); x += mlp(norm(x)). The mlp is dense in the first `first_k_dense_replace` layers."""

    def __init__(self, config: DeepseekV3Config, layer_idx: int) -> None:
        super().__init__()
        self.is_moe = layer_idx >= config.first_k_dense_replace
        self.self_attn = MultiheadLatentAttention(config)
        self.mlp = DeepseekMoE(config) if self.is_moe else MLP(config.hidden_size, config.intermediate_size)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, layout: SequenceLayout, routed_experts: Tensor | None = None
    ) -> tuple[Tensor, Routing | None]:
        """x # [T, d], cos and sin # [T, d_r / 2], routed_experts # [T, K] to replay -> (x # [T, d], Routing or None)."""
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, layout)
        return self.feed_forward(x, routed_experts)

    def feed_forward(self, x: Tensor, routed_experts: Tensor | None = None) -> tuple[Tensor, Routing | None]:
        """The second half of the layer, for engines with their own attention: x # [T, d] -> (x # [T, d], Routing)."""
        normed = self.post_attention_layernorm(x)
        if not self.is_moe:
            return x + self.mlp(normed), None
        out, routing = self.mlp(normed, routed_experts)
        return x + out, routing
