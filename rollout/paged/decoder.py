"""The DeepSeek-V3 forward pass over a paged cache of MLA latents: prefill of packed prompts, absorbed decode.

A token's cache entry is [normalised latent, rotated rope key], r + d_r numbers in each layer, whatever the number of
heads. Decode never expands it: kv_b_proj is absorbed into the query and the output (DeepSeek-V2 report, section
2.1; facts: it is multi-query attention over the latents). T: prompt tokens, B: sequences, S: longest context.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from model import DeepseekV3ForCausalLM, SequenceLayout
from model.fp8.modules import input_cast
from model.moe import Routing
from rollout.paged.weights import LayerWeights, fast_norm


class PagedDecoder:
    """Runs a model over cache slots; slot = page * page_size + offset. Holds the cache, not who owns which page.

    exact: what decode computes for a sequence is the same to the last bit whatever else is in the batch (on the CPU).
    Every row is a matrix product of its own, and elementwise functions are those that treat the elements at the end
    of a tensor, which fill no whole vector register, like the others.
    """

    def __init__(self, model: DeepseekV3ForCausalLM, page_size: int, exact: bool = False) -> None:
        self.model = model
        self.page_size = page_size
        self.exact = exact
        config = model.config
        self.rank, self.rope_dim, self.heads = config.kv_lora_rank, config.qk_rope_head_dim, config.num_attention_heads
        self.width, self.scale = self.rank + self.rope_dim, config.softmax_scale
        # in FP8, what layers do to their inputs; kv_b_proj's are the latents, so the cache holds what they become
        self.cast = input_cast(model)
        # up to this many sequences, all experts on all of them cost less than sorting them by expert
        small = config.n_routed_experts * config.moe_intermediate_size <= 1024 and model.device.type == "cpu"
        small = small and self.cast is None
        self.every_expert_up_to = 24 if small and not exact else 0
        self.cache = torch.empty(0)
        self.gathered = torch.empty(0, page_size * self.width, dtype=model.dtype, device=model.device)
        self.layers: list[LayerWeights] = []
        self.refresh()

    def refresh(self) -> None:
        """Takes over the model's current weights: derived matrices are computed anew."""
        config, every = self.model.config, self.every_expert_up_to > 0
        self.layers = [LayerWeights.of(layer, config, self.exact, every) for layer in self.model.model.layers]
        self.final_norm = fast_norm(self.model.model.norm, self.exact)

    def reserve(self, num_pages: int) -> None:
        """Makes the cache hold at least num_pages pages; what was in it is lost when it grows."""
        num_slots = num_pages * self.page_size
        if self.cache.numel() == 0 or self.cache.shape[1] < num_slots:
            shape = (len(self.layers), num_slots, self.width)
            self.cache = torch.zeros(shape, dtype=self.model.dtype, device=self.model.device)

    @torch.inference_mode()
    def prefill(self, input_ids: Tensor, layout: SequenceLayout, slots: Tensor) -> tuple[Tensor, Tensor]:
        """Packed prompts [T] into the cache slots [T] -> (hidden [T, d] after the final norm, experts [T, L_moe, K])"""
        cos, sin = self.model.model.rotary(layout.position_ids)
        x = self.model.model.embed_tokens(input_ids)  # [T, d]
        chosen = []
        for index, weights in enumerate(self.layers):
            layer, attn = weights.layer, weights.layer.self_attn
            q_nope, q_rope, latent = attn.project(layer.input_layernorm(x), cos, sin)
            if self.cast is not None:
                kept = torch.cat((self.cast(latent[:, : self.rank]), latent[:, self.rank :]), dim=-1)
            else:
                kept = latent
            self.cache[index].index_copy_(0, slots, kept)
            x, routing = layer.feed_forward(x + attn.attend(q_nope, q_rope, latent, layout))
            if routing is not None:
                chosen.append(routing.experts)
        return self.model.model.norm(x), self._stack(chosen, x)

    @torch.inference_mode()
    def decode(self, input_ids: Tensor, positions: Tensor, pages: Tensor) -> tuple[Tensor, Tensor]:
        """One token for each of B sequences -> (hidden [B, d] after the final norm, experts [B, L_moe, K]).

        input_ids, positions: [B] int64, the newest token and its position. pages: [B, P] int64, the cache page of
        each run of page_size positions; entries beyond a sequence's position are any valid page.
        """
        model, size = self.model.model, self.page_size
        turns = torch.complex(*model.rotary(positions))[:, None]  # [B, 1, d_r / 2]
        x = model.embed_tokens(input_ids)  # [B, d]
        batch, length = len(pages), pages.shape[1] * size
        slots = pages.gather(1, (positions // size)[:, None])[:, 0] * size + positions % size
        hidden_from = torch.arange(length, device=x.device)[None] > positions[:, None]  # [B, S]
        mask = torch.zeros(batch, 1, 1, length, dtype=x.dtype, device=x.device)
        mask.masked_fill_(hidden_from[:, None, None], float("-inf"))
        flat = pages.flatten()
        if len(flat) > len(self.gathered):  # kept: memory new at every step costs page faults, a third of the time
            self.gathered = self.gathered.new_empty(2 * len(flat), size * self.width)
        gathered = self.gathered[: len(flat)]
        seen = gathered.view(batch, 1, length, self.width)
        chosen: list[Tensor] = []
        for cache, weights in zip(self.cache, self.layers):
            query, latent = self._project(weights, weights.input_norm(x), turns)
            cache.index_copy_(0, slots, latent)
            # whole pages at a time: a copy of a few large pieces
            torch.index_select(cache.view(-1, size * self.width), 0, flat, out=gathered)
            out = F.scaled_dot_product_attention(query, seen, seen, attn_mask=mask, scale=self.scale)
            out = out[:, 0, :, : self.rank]  # [B, n_h, r]
            value = out if weights.up_value is None else self._absorb(out, weights.up_value)
            x = x + self._layer(value.flatten(1), weights.output)
            x = x + self._feed_forward(weights, weights.mlp_norm(x), chosen)
        return self.final_norm(x), self._stack(chosen, x)

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [B, d] -> [B, V]."""
        with torch.inference_mode():
            return self._linear(hidden, self.model.lm_head.weight)

    def _stack(self, chosen: list[Tensor], x: Tensor) -> Tensor:
        if chosen:
            return torch.stack(chosen, 1)
        return torch.zeros(len(x), 0, self.model.config.num_experts_per_tok, dtype=torch.int64, device=x.device)

    def _linear(self, x: Tensor, weight: Tensor) -> Tensor:
        """x [B, in] @ weight [out, in]^T."""
        return _each_row(x, weight.t().expand(len(x), -1, -1)) if self.exact else F.linear(x, weight)

    def _layer(self, x: Tensor, weight: Tensor) -> Tensor:
        """The same of a layer that may be in FP8."""
        return self._linear(x if self.cast is None else self.cast(x), weight)

    def _absorb(self, x: Tensor, weight: Tensor) -> Tensor:
        """x [B, n_h, a] times weight [n_h, a, b] -> [B, n_h, b]."""
        if self.exact:
            return _each_row(x.flatten(0, 1), weight.repeat(len(x), 1, 1)).unflatten(0, x.shape[:2])
        return torch.bmm(x.transpose(0, 1), weight).transpose(0, 1)

    def _project(self, weights: LayerWeights, h: Tensor, turns: Tensor) -> tuple[Tensor, Tensor]:
        """h [B, d] -> the query over latents [B, 1, n_h, w] and the cache entry [B, w], both rotated."""
        down = self._layer(h, weights.down)
        q, compressed = down[:, : -self.width], down[:, -self.width :]
        if weights.query_up is not None and weights.query_norm is not None:
            q = self._layer(weights.query_norm(q), weights.query_up)
        q = q.unflatten(-1, (self.heads, -1))  # [B, n_h, d_n + d_r], or [B, n_h, w] folded
        q_nope, q_rope = q[..., : -self.rope_dim], q[..., -self.rope_dim :]
        if weights.up_key is not None:
            q_nope = self._absorb(q_nope, weights.up_key)  # [B, n_h, r]
        # the rope key rides along as one more head, so both are rotated at once: pairs are complex numbers
        pairs = torch.cat((q_rope, compressed[:, None, self.rank :]), dim=1).float().unflatten(-1, (-1, 2))
        turned = torch.view_as_real(torch.view_as_complex(pairs) * turns).flatten(-2).to(h.dtype)  # [B, n_h + 1, d_r]
        normed = weights.latent_norm(compressed[:, : self.rank])
        latent = torch.cat((normed if self.cast is None else self.cast(normed), turned[:, -1]), dim=-1)
        return torch.cat((q_nope, turned[:, :-1]), dim=-1)[:, None], latent

    def _feed_forward(self, weights: LayerWeights, h: Tensor, chosen: list[Tensor]) -> Tensor:
        """The layer's MLP or mixture on h [B, d]; appends the experts it chose [B, K]."""
        mlp = weights.layer.mlp
        if not weights.layer.is_moe:
            return self._mlp(weights, h)
        scores = self._sigmoid(self._linear(h.float(), mlp.gate.weight.float()))  # [B, E]
        experts = mlp.gate.select(scores)  # [B, K]
        share = scores.gather(1, experts)
        if mlp.gate.norm_topk_prob:
            share = share / (share.sum(-1, keepdim=True) + 1e-20)
        share = share * mlp.gate.scaling
        chosen.append(experts)
        if weights.every is not None and len(h) <= self.every_expert_up_to:
            return weights.every(h, experts, share)
        if self.exact:
            out = self._own_experts(weights, h, experts, share)
        else:
            counts = torch.zeros(scores.shape[1], dtype=torch.int64, device=h.device)
            counts.scatter_add_(0, experts.flatten(), torch.ones_like(experts.flatten()))
            out = mlp.experts(h, Routing(experts, share, scores, counts))
        return out if weights.gate_up is None else out + self._mlp(weights, h)

    def _mlp(self, weights: LayerWeights, h: Tensor) -> Tensor:
        assert weights.gate_up is not None and weights.mlp_down is not None
        gate, up = self._layer(h, weights.gate_up).chunk(2, dim=-1)
        return self._layer(self._silu(gate) * up, weights.mlp_down)

    def _sigmoid(self, x: Tensor) -> Tensor:
        # torch's sigmoid (and silu) has another exponential for the last elements of a tensor; exp has not
        return 1 / (1 + (-x).exp()) if self.exact else x.sigmoid()

    def _silu(self, x: Tensor) -> Tensor:
        return x * self._sigmoid(x.float()).to(x.dtype) if self.exact else F.silu(x)

    def _own_experts(self, weights: LayerWeights, h: Tensor, chosen: Tensor, share: Tensor) -> Tensor:
        """Each token's K experts, gathered and multiplied for that token alone."""
        assert weights.experts is not None
        (gate_up, down), picked = weights.experts, chosen.flatten()  # [B K]
        share = share[..., None].to(h.dtype)  # [B, K, 1]
        h = h if self.cast is None else self.cast(h)
        gate, up = _each_row(h.repeat_interleave(chosen.shape[1], 0), gate_up[picked].transpose(1, 2)).chunk(2, dim=-1)
        act = self._silu(gate) * up
        if self.cast is not None:  # as Fp8Experts, which weighs before the cast
            act, share = self.cast(act * share.flatten(0, 1)), torch.ones_like(share)
        out = _each_row(act, down[picked].transpose(1, 2))  # [B K, d]
        return (out.unflatten(0, chosen.shape) * share).sum(1)


def _each_row(rows: Tensor, matrices: Tensor) -> Tensor:
    """Row i of rows [N, a] times matrices[i], matrices [N, a, b] -> [N, b]; a row's result knows nothing of the others.

    In FP32: the CPU's products of BF16 matrices are slow one row at a time.
    """
    if len(rows) == 1:  # one product takes another kernel than many
        return _each_row(rows.expand(2, -1), matrices.expand(2, -1, -1))[:1]
    return torch.bmm(rows.float()[:, None], matrices.float())[:, 0].to(rows.dtype)
