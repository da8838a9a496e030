"""Decoder layers: the plain one, and the multi-token prediction one that wraps it."""

import torch
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
        """x # [T, d], cos and sin # [T, d_r / 2], routed_experts # [T, K] to replay -> (x # [T, d], Routing)."""
        x, normed = self.input_layernorm.added(x, None, readers=2)
        return self.feed_forward(x, routed_experts, self.self_attn(normed, cos, sin, layout))

    def feed_forward(
        self, x: Tensor, routed_experts: Tensor | None = None, delta: Tensor | None = None
    ) -> tuple[Tensor, Routing | None]:
        """The second half of the layer, of x + delta # [T, d] -> (x # [T, d], Routing); engines have their own
        attention before it, and no delta.
        """
        x, normed = self.post_attention_layernorm.added(x, delta, readers=3 if self.is_moe else 1)
        if not self.is_moe:
            return x + self.mlp(*normed), None
        out, routing = self.mlp(normed, routed_experts)
        return x + out, routing


class SharedHead(nn.Module):
    """The norm before the output head; the head itself is the main model's."""

    def __init__(self, config: DeepseekV3Config) -> None:
        super().__init__()
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class MTPLayer(DeepseekV3DecoderLayer):
    """A decoder layer fed with [enorm(next token's embedding) ; hnorm(hidden)] through eh_proj (equation 21).

    The paper writes the two halves in the other order; released weights (and vLLM) have the embedding first.
    """

    def __init__(self, config: DeepseekV3Config, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.enorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.hnorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.eh_proj = nn.Linear(2 * config.hidden_size, config.hidden_size, bias=False)
        self.shared_head = SharedHead(config)

    def combine(self, hidden: Tensor, embedding: Tensor) -> Tensor:
        """hidden # [T, d] after a final norm, embedding # [T, d] of the token k ahead -> block input # [T, d]."""
        return self.eh_proj(torch.cat((self.enorm(embedding), self.hnorm(hidden)), dim=-1))

    def predict(
        self, hidden: Tensor, embedding: Tensor, cos: Tensor, sin: Tensor, layout: SequenceLayout
    ) -> tuple[Tensor, Routing | None]:
        """hidden, embedding # [T, d] -> (what the head reads, the next depth's `hidden` # [T, d]; Routing)."""
        x, routing = DeepseekV3DecoderLayer.forward(self, self.combine(hidden, embedding), cos, sin, layout)
        return self.shared_head.norm(x), routing
