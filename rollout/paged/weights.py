"""A layer's weights in the shapes that decode multiplies by, derived from the model's once for each version of them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from model.config import DeepseekV3Config
from model.fp8.modules import computed_gated_weights, computed_weight, input_cast
from model.layers import RMSNorm


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """d: hidden size, r: latent rank, r_q: query rank, n_h: heads, w = r + d_r: width of a cache entry."""

    layer: Any  # the model's DeepseekV3DecoderLayer: router, experts
    input_norm: Callable[[Tensor], Tensor]
    query_norm: Callable[[Tensor], Tensor] | None
    latent_norm: Callable[[Tensor], Tensor]
    mlp_norm: Callable[[Tensor], Tensor]
    down: Tensor  # [r_q + w, d]: low-rank query and latent in one product; the whole query where there is no r_q
    query_up: Tensor | None  # [n_h (d_n + d_r), r_q], or [n_h w, r_q] folded; None: no low-rank query
    up_key: Tensor | None  # [n_h, d_n, r]: turns a query to the latents; None: folded into the query's matrix
    up_value: Tensor | None  # [n_h, r, d_v]; None: folded into `output`
    output: Tensor  # [d, n_h d_v], or [d, n_h r] folded
    experts: tuple[Tensor, Tensor] | None  # gate_up [E, 2 I, d] and down [E, d, I], for exact; None: not used
    gate_up: Tensor | None  # [2 I, d] of the dense MLP or the shared experts; None: a mixture without shared ones
    mlp_down: Tensor | None  # [d, I]
    every: EveryExpert | None

    @classmethod
    @torch.no_grad()
    def of(cls, layer: Any, config: DeepseekV3Config, exact: bool, every: bool) -> LayerWeights:
        """`every`: make EveryExpert, for where it is cheaper than sorting tokens by expert."""
        attn = layer.self_attn
        heads, nope, rank = config.num_attention_heads, config.qk_nope_head_dim, config.kv_lora_rank
        up = computed_weight(attn.kv_b_proj).unflatten(0, (heads, -1))
        up_key, up_value = up.split((nope, config.v_head_dim), dim=1)
        query_up = computed_weight(attn.q_proj if config.q_lora_rank is None else attn.q_b_proj)
        output = computed_weight(attn.o_proj)
        # Products of matrices save two products a token where heads are wide against the latent (not in V3: 128, 512).
        # In FP8 what comes between the two is cast.
        narrow = rank <= 2 * min(nope, config.v_head_dim)
        fold = narrow and query_up.dtype == torch.float32 and input_cast(layer) is None
        if fold:
            q_nope, q_rope = query_up.unflatten(0, (heads, -1)).split((nope, config.qk_rope_head_dim), dim=1)
            query_up = torch.cat((up_key.transpose(1, 2) @ q_nope, q_rope), dim=1).flatten(0, 1)
            by_head = output.unflatten(1, (heads, -1)).transpose(0, 1)  # [n_h, d, d_v]
            output = (by_head @ up_value).transpose(0, 1).flatten(1)
        first = query_up if config.q_lora_rank is None else computed_weight(attn.q_a_proj)
        mlp = layer.mlp.shared_experts if layer.is_moe else layer.mlp
        gate_up, mlp_down = (None, None) if mlp is None else computed_gated_weights(mlp)
        return cls(
            layer=layer,
            input_norm=fast_norm(layer.input_layernorm, exact),
            query_norm=None if config.q_lora_rank is None else fast_norm(attn.q_a_layernorm, exact),
            latent_norm=fast_norm(attn.kv_a_layernorm, exact),
            mlp_norm=fast_norm(layer.post_attention_layernorm, exact),
            down=torch.cat((first, computed_weight(attn.kv_a_proj_with_mqa))),
            query_up=None if config.q_lora_rank is None else query_up,
            up_key=None if fold else up_key.contiguous(),
            up_value=None if fold else up_value.transpose(1, 2).contiguous(),
            output=output,
            experts=computed_gated_weights(layer.mlp.experts) if layer.is_moe and exact else None,
            gate_up=gate_up,
            mlp_down=mlp_down,
            every=EveryExpert.of(layer.mlp) if layer.is_moe and every else None,
        )


@dataclass(frozen=True, slots=True)
class EveryExpert:
    """All E routed and S shared experts as one wide MLP: for few small experts cheaper than sorting tokens."""

    gate: Tensor  # [(E + S) I, d]
    up: Tensor  # [(E + S) I, d]
    down: Tensor  # [(E + S) I, d]
    unrouted: Tensor  # [1, E + S]: 0 for routed experts, 1 for shared ones

    @classmethod
    def of(cls, moe: Any) -> EveryExpert:
        gate, up = moe.experts.gate_up_proj.chunk(2, dim=1)  # [E, I, d] each
        parts = [[w.flatten(0, 1)] for w in (gate, up, moe.experts.down_proj.transpose(1, 2))]
        if (shared := moe.shared_experts) is not None:
            weights = shared.gate_proj.weight, shared.up_proj.weight, shared.down_proj.weight.t()
            parts = [[*part, weight] for part, weight in zip(parts, weights)]
        gates, ups, downs = (torch.cat(part).contiguous() for part in parts)
        unrouted = (torch.arange(len(gates) // gate.shape[1], device=gates.device) >= len(gate)).float()[None]
        return cls(gates, ups, downs, unrouted)

    def __call__(self, h: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
        """h [B, d], experts and weights [B, K] -> [B, d]; experts that were not chosen count 0."""
        share = self.unrouted.expand(len(h), -1).scatter(1, experts, weights).to(h.dtype)  # [B, E + S]
        inner = F.silu(F.linear(h, self.gate)) * F.linear(h, self.up)  # [B, (E + S) I]
        return (inner.unflatten(1, (share.shape[1], -1)) * share[..., None]).flatten(1) @ self.down


class FastNorm:
    """RMSNorm in FP32 with half the operations: x / hypot(|x|, sqrt(n eps)) * (sqrt(n) weight)."""

    def __init__(self, norm: RMSNorm) -> None:
        n = norm.weight.shape[0]
        self.weight = norm.weight.detach() * math.sqrt(n)
        self.floor = self.weight.new_tensor(math.sqrt(n * norm.eps))

    def __call__(self, x: Tensor) -> Tensor:
        return x / torch.linalg.vector_norm(x, dim=-1, keepdim=True).hypot_(self.floor) * self.weight


def fast_norm(norm: RMSNorm, exact: bool) -> Callable[[Tensor], Tensor]:
    """FastNorm where it is faster, on the CPU; not for exact, as hypot treats the last elements differently."""
    fast = norm.weight.device.type == "cpu" and norm.weight.dtype == torch.float32 and not exact
    return FastNorm(norm) if fast else norm
