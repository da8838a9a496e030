"""The DeepSeek-V3 forward pass over a paged cache of MLA latents: prefill of packed prompts, absorbed decode.

A token's cache entry is [normalised latent, rotated rope key], r + d_r numbers in each layer, whatever the number of
heads. Decode never expands it: kv_b_proj is absorbed into the query and the output (DeepSeek-V2 report, section
2.1; facts: it is multi-query attention over the latents). T: prompt tokens, B: sequences, S: longest context.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from model import DeepseekV3ForCausalLM, SequenceLayout
from model.rope import apply_rope


class PagedDecoder:
    """Runs a model over cache slots; slot = page * page_size + offset. Holds the cache, not who owns which page."""

    def __init__(self, model: DeepseekV3ForCausalLM, page_size: int, exact: bool = False) -> None:
        self.model = model
        self.page_size = page_size
        self.exact = exact
        config = model.config
        self.rank, self.heads, self.nope_dim = config.kv_lora_rank, config.num_attention_heads, config.qk_nope_head_dim
        self.width = config.kv_lora_rank + config.qk_rope_head_dim
        self.cache = torch.empty(0)
        self.layers: list[dict[str, Any]] = []
        self.refresh()

    def refresh(self) -> None:
        """Takes over the model's current weights: derived matrices are computed anew."""
        self.layers = [self._derive(layer) for layer in self.model.model.layers]

    def reserve(self, num_pages: int) -> None:
        """Makes the cache hold at least num_pages pages; what was in it is lost when it grows."""
        num_slots = num_pages * self.page_size
        if self.cache.numel() == 0 or self.cache.shape[1] < num_slots:
            shape = (len(self.layers), num_slots, self.width)
            self.cache = torch.zeros(shape, dtype=self.model.dtype, device=self.model.device)

    def _derive(self, layer: Any) -> dict[str, Any]:
        attn = layer.self_attn
        up = attn.kv_b_proj.weight.detach().unflatten(0, (self.heads, -1))  # [n_h, d_n + d_v, r]
        moe = layer.is_moe
        mlp = layer.mlp.shared_experts if moe else layer.mlp
        derived: dict[str, Any] = {
            "layer": layer,
            "up_key": up[:, : self.nope_dim].contiguous(),  # [n_h, d_n, r]
            "up_value": up[:, self.nope_dim :].transpose(1, 2).contiguous(),  # [n_h, r, d_v]
            "gate_up": torch.cat((mlp.gate_proj.weight, mlp.up_proj.weight)).detach() if mlp is not None else None,
            "down": mlp.down_proj.weight.detach() if mlp is not None else None,
        }
        if attn_has_query_lora(attn):
            derived["qkv_a"] = torch.cat((attn.q_a_proj.weight, attn.kv_a_proj_with_mqa.weight)).detach()
        if moe and not self.exact and few_experts(self.model):
            experts = layer.mlp.experts
            # every expert on every token in two matrix products: for a few small experts cheaper than sorting tokens
            derived["all_gate"], derived["all_up"] = (
                w.detach().flatten(0, 1).contiguous() for w in experts.gate_up_proj.chunk(2, dim=1)
            )  # [E I, d] each
            derived["all_down"] = experts.down_proj.detach().permute(0, 2, 1).flatten(0, 1).contiguous()  # [E I, d]
        return derived

    @torch.inference_mode()
    def prefill(self, input_ids: Tensor, layout: SequenceLayout, slots: Tensor) -> tuple[Tensor, Tensor]:
        """Packed prompts [T] into the cache slots [T] -> (hidden [T, d] after the final norm, experts [T, L_moe, K])."""
        cos, sin = self.model.model.rotary(layout.position_ids)
        x = self.model.model.embed_tokens(input_ids)  # [T, d]
        chosen = []
        for index, layer in enumerate(self.model.model.layers):
            attn = layer.self_attn
            q_nope, q_rope, latent = attn.project(layer.input_layernorm(x), cos, sin)
            self.cache[index].index_copy_(0, slots, latent)
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
        if self.exact and len(input_ids) == 1:  # a batch of one takes other matrix kernels than a batch of many
            twice = (x.repeat_interleave(2, 0) for x in (input_ids, positions, pages))
            hidden, experts = self.decode(*twice)
            return hidden[:1], experts[:1]
        model, size = self.model.model, self.page_size
        cos, sin = model.rotary(positions)
        x = model.embed_tokens(input_ids)  # [B, d]
        batch, length = len(pages), pages.shape[1] * size
        slots = pages.gather(1, (positions // size)[:, None])[:, 0] * size + positions % size
        hidden_from = torch.arange(length, device=x.device)[None] > positions[:, None]  # [B, S]
        mask = torch.zeros(batch, 1, 1, length, dtype=x.dtype, device=x.device)
        mask.masked_fill_(hidden_from[:, None, None], float("-inf"))
        flat = pages.flatten()
        chosen: list[Tensor] = []
        for index, part in enumerate(self.layers):
            layer = part["layer"]
            q_nope, q_rope, latent = self._project(part, layer.input_layernorm(x), cos, sin)
            cache = self.cache[index]
            cache.index_copy_(0, slots, latent)
            # whole pages at a time: a copy of a few large pieces
            seen = cache.view(-1, size * self.width).index_select(0, flat).view(batch, 1, length, self.width)
            query = torch.cat((self._absorb(q_nope, part["up_key"]), q_rope), dim=-1)  # [B, n_h, r + d_r]
            out = F.scaled_dot_product_attention(
                query[:, None], seen, seen, attn_mask=mask, scale=layer.self_attn.scale
            )[:, 0, :, : self.rank]  # [B, n_h, r]
            value = self._absorb(out, part["up_value"])  # [B, n_h, d_v]
            x = x + self._linear(value.flatten(1), layer.self_attn.o_proj.weight)
            x = x + self._feed_forward(part, layer.post_attention_layernorm(x), chosen)
        return model.norm(x), self._stack(chosen, x)

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [B, d] -> [B, V]."""
        with torch.inference_mode():
            return self._linear(hidden, self.model.lm_head.weight)

    def _stack(self, chosen: list[Tensor], x: Tensor) -> Tensor:
        if chosen:
            return torch.stack(chosen, 1)
        return torch.zeros(len(x), 0, self.model.config.num_experts_per_tok, dtype=torch.int64)

    def _linear(self, x: Tensor, weight: Tensor) -> Tensor:
        """x [B, in] @ weight [out, in]^T; in exact mode each row is a product of its own, blind to its neighbours."""
        if self.exact:
            return torch.bmm(x[:, None], weight.t().expand(len(x), -1, -1))[:, 0]
        return F.linear(x, weight)

    def _absorb(self, x: Tensor, weight: Tensor) -> Tensor:
        """x [B, n_h, a] times weight [n_h, a, b] -> [B, n_h, b]."""
        if self.exact:
            rows = x.flatten(0, 1)[:, None]  # [B n_h, 1, a]
            return torch.bmm(rows, weight.repeat(len(x), 1, 1)).view(len(x), weight.shape[0], -1)
        return torch.bmm(x.transpose(0, 1), weight).transpose(0, 1)

    def _project(self, part: dict[str, Any], h: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """MultiheadLatentAttention.project with the two down-projections in one product."""
        attn = part["layer"].self_attn
        if "qkv_a" in part:
            query_rank = attn.q_a_proj.weight.shape[0]
            down = self._linear(h, part["qkv_a"])  # [B, r_q + r + d_r]
            q = self._linear(attn.q_a_layernorm(down[:, :query_rank]), attn.q_b_proj.weight)
            compressed = down[:, query_rank:]
        else:
            q = self._linear(h, attn.q_proj.weight)
            compressed = self._linear(h, attn.kv_a_proj_with_mqa.weight)
        q = q.unflatten(-1, (self.heads, -1))  # [B, n_h, d_n + d_r]
        # the rope key rides along as one more head, so both are rotated at once
        key = compressed[:, None, self.rank :]  # [B, 1, d_r]
        turned = apply_rope(torch.cat((q[..., self.nope_dim :], key), dim=1), cos, sin)  # [B, n_h + 1, d_r]
        latent = torch.cat((attn.kv_a_layernorm(compressed[:, : self.rank]), turned[:, -1]), dim=-1)
        return q[..., : self.nope_dim], turned[:, :-1], latent

    def _feed_forward(self, part: dict[str, Any], h: Tensor, chosen: list[Tensor]) -> Tensor:
        """The layer's MLP or mixture on h [B, d]; appends the experts it chose [B, K]."""
        layer = part["layer"]
        if not layer.is_moe:
            return self._mlp(part, h)
        gate = layer.mlp.gate
        scores = self._linear(h.float(), gate.weight.float()).sigmoid()  # [B, E]
        experts = gate.select(scores)  # [B, K]
        weights = scores.gather(1, experts)
        if gate.norm_topk_prob:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        weights = weights * gate.scaling
        chosen.append(experts)
        if self.exact:
            out = self._own_experts(layer.mlp.experts, h, experts, weights)
        elif "all_gate" in part:
            share = torch.zeros_like(scores).scatter_(1, experts, weights).to(h.dtype)  # [B, E]
            inner = F.silu(F.linear(h, part["all_gate"])) * F.linear(h, part["all_up"])  # [B, E I]
            out = (inner.unflatten(1, (scores.shape[1], -1)) * share[..., None]).flatten(1) @ part["all_down"]
        else:
            counts = torch.zeros(scores.shape[1], dtype=torch.int64, device=h.device)
            counts.scatter_add_(0, experts.flatten(), torch.ones_like(experts.flatten()))
            out = layer.mlp.experts(h, _Routing(experts, weights, counts))
        return out if part["down"] is None else out + self._mlp(part, h)

    def _mlp(self, part: dict[str, Any], h: Tensor) -> Tensor:
        gate, up = self._linear(h, part["gate_up"]).chunk(2, dim=-1)
        return self._linear(F.silu(gate) * up, part["down"])

    def _own_experts(self, experts: Any, h: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """Each token's K experts, gathered and multiplied for that token alone."""
        batch, top_k = chosen.shape
        rows = h.repeat_interleave(top_k, 0)[:, None]  # [B K, 1, d]
        picked = chosen.flatten()
        gate, up = torch.bmm(rows, experts.gate_up_proj[picked].transpose(1, 2)).chunk(2, dim=-1)
        out = torch.bmm(F.silu(gate) * up, experts.down_proj[picked].transpose(1, 2))  # [B K, 1, d]
        return (out.view(batch, top_k, -1) * weights[..., None].to(h.dtype)).sum(1)


class _Routing:
    """What model.moe.Experts reads of a routing."""

    def __init__(self, experts: Tensor, weights: Tensor, counts: Tensor) -> None:
        self.experts, self.weights, self.counts = experts, weights, counts


def attn_has_query_lora(attn: Any) -> bool:
    return hasattr(attn, "q_a_proj")


def few_experts(model: DeepseekV3ForCausalLM) -> bool:
    """Whether all experts together are so small that computing every one costs less than sorting tokens by expert."""
    config = model.config
    return config.n_routed_experts * config.moe_intermediate_size <= 1024 and model.device.type == "cpu"
