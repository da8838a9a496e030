"""Multi-head latent attention (DeepSeek-V3 report, arXiv 2412.19437, equations 1-11) over packed tokens."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.config import DeepseekV3Config
from model.kernels import usable
from model.layers import RMSNorm
from model.layout import SequenceLayout
from model.rope import apply_rope


class MultiheadLatentAttention(nn.Module):
    """Attention whose keys and values are expanded from one small latent vector per token.

    The training form: keys and values are expanded per head (192/128 wide in V3). A decoder over a cache of latents
    can absorb kv_b_proj instead; both give the same numbers.
    """

    def __init__(self, config: DeepseekV3Config) -> None:
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.nope_dim, self.rope_dim, self.value_dim = (
            config.qk_nope_head_dim,
            config.qk_rope_head_dim,
            config.v_head_dim,
        )
        self.latent_rank = config.kv_lora_rank
        self.scale = config.softmax_scale
        hidden, query_width = config.hidden_size, self.num_heads * config.qk_head_dim
        # The inner norms use eps 1e-6 whatever rms_norm_eps says, as transformers does (Moonlight has 1e-5 outside).
        if config.q_lora_rank is None:
            self.q_proj = nn.Linear(hidden, query_width, bias=False)
        else:
            self.q_a_proj = nn.Linear(hidden, config.q_lora_rank, bias=False)
            self.q_a_layernorm = RMSNorm(config.q_lora_rank)
            self.q_b_proj = nn.Linear(config.q_lora_rank, query_width, bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(hidden, self.latent_rank + self.rope_dim, bias=False)
        self.kv_a_layernorm = RMSNorm(self.latent_rank)
        self.kv_b_proj = nn.Linear(self.latent_rank, self.num_heads * (self.nope_dim + self.value_dim), bias=False)
        self.o_proj = nn.Linear(self.num_heads * self.value_dim, hidden, bias=False)

    def queries(self, h: Tensor) -> Tensor:
        """h # [T, d] -> # [T, n_h (d_n + d_r)], not rotated."""
        if hasattr(self, "q_proj"):
            return self.q_proj(h)
        return self.q_b_proj(self.q_a_layernorm(self.q_a_proj(h)))

    def project(self, h: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """h # [T, d], cos and sin # [T, d_r / 2] -> (q_nope, q_rope, latent).

        q_nope # [T, n_h, d_n], q_rope # [T, n_h, d_r] rotated, latent # [T, r + d_r]:
        latent = [kv_a_layernorm(c), rotated k_r]: exactly what an MLA cache stores, in vLLM's order.
        """
        q = self.queries(h)
        q_nope, q_rope = q.unflatten(-1, (self.num_heads, -1)).split((self.nope_dim, self.rope_dim), dim=-1)
        c, k_rope = self.kv_a_proj_with_mqa(h).split((self.latent_rank, self.rope_dim), dim=-1)
        # k_r is not normalised; one rotary key serves all heads.
        latent = torch.cat((self.kv_a_layernorm(c), apply_rope(k_rope, cos, sin)), dim=-1)
        return q_nope, apply_rope(q_rope, cos, sin), latent

    def attend(self, q_nope: Tensor, q_rope: Tensor, latent: Tensor, layout: SequenceLayout) -> Tensor:
        """What `project` returned, for all T tokens of the layout -> attention output after o_proj # [T, d]."""
        c, k_rope = latent.split((self.latent_rank, self.rope_dim), dim=-1)
        kv = self.kv_b_proj(c).unflatten(-1, (self.num_heads, -1))  # [T, n_h, d_n + d_v]
        k_nope, v = kv.split((self.nope_dim, self.value_dim), dim=-1)
        q = torch.cat((q_nope, q_rope), dim=-1)  # [T, n_h, d_n + d_r]
        k = torch.cat((k_nope, k_rope[:, None].expand(-1, self.num_heads, -1)), dim=-1)  # [T, n_h, d_n + d_r]
        rows = []
        for q_b, k_b, v_b in zip(layout.gather(q), layout.gather(k), layout.gather(v)):  # [B, L, n_h, ...]
            rows.append(causal_attention(q_b, k_b, v_b, self.scale))
        return self.o_proj(layout.scatter(rows).flatten(1))

    def forward(self, h: Tensor | tuple[Tensor, ...], cos: Tensor, sin: Tensor, layout: SequenceLayout) -> Tensor:
        """h # [T, d] (normalised), cos and sin # [T, d_r / 2] -> # [T, d].

        h may come once for each of its readers (see RMSNorm.added): queries, and keys and values.
        """
        of_queries, of_latent = h if isinstance(h, tuple) else (h, h)
        if usable(of_queries) and not any(n & (n - 1) for n in (self.nope_dim, self.rope_dim, self.value_dim)):
            return self._attend_in_few_passes(of_queries, of_latent, cos, sin, layout)
        return self.attend(*self.project(of_queries, cos, sin), layout)

    def _attend_in_few_passes(
        self, of_queries: Tensor, of_latent: Tensor, cos: Tensor, sin: Tensor, layout: SequenceLayout
    ) -> Tensor:
        """The same, with rotation, concatenation and gathering in one kernel. Widths of a head are powers of two."""
        from model.kernels.attention import Widths, attention_rows, restored

        c, k_rope = self.kv_a_layernorm.front(self.kv_a_proj_with_mqa(of_latent))
        q, kv = self.queries(of_queries), self.kv_b_proj(c)
        widths = Widths(self.num_heads, self.nope_dim, self.rope_dim, self.value_dim)
        rows = [attention_core(*parts, self.scale) for parts in attention_rows(q, kv, k_rope, cos, sin, layout, widths)]
        return self.o_proj(restored(rows, layout))


def causal_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """softmax(scale q k^T + causal) v for each row and head.

    q, k # [B, L, n_h, d_qk], v # [B, L, n_h, d_v] -> # [B, L, n_h, d_v].
    """
    return attention_core(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), scale).transpose(1, 2)


def attention_core(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """The same with heads first: q, k # [B, n_h, L, d_qk], v # [B, n_h, L, d_v] -> # [B, n_h, L, d_v]."""
    width, extra = v.shape[-1], q.shape[-1] - v.shape[-1]
    if extra > 0 and not q.is_cuda:
        # The CPU's fused kernel wants equal head widths; zero columns in v only add zero columns to the result. On an
        # H200 they made attention a third slower.
        v = F.pad(v, (0, extra))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)[..., :width]
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
