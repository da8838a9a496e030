"""DeepSeekMoE (arXiv 2412.19437, section 2.1.2): router, routed experts, shared experts, and balancing."""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.config import DeepseekV3Config
from model.kernels import usable
from model.layers import MLP


class Routing(NamedTuple):
    """What a router decided for T tokens."""

    experts: Tensor  # [T, K] int64
    weights: Tensor  # [T, K] float32, carries gradient to the router
    scores: Tensor  # [T, E] float32 sigmoid scores, without bias
    counts: Tensor  # [E] int64, tokens per expert
    differs: Tensor | None = None  # [T] bool, in a replay: the router itself would have chosen other experts
    by_expert: "ByExpert | None" = None  # where the router's kernel has sorted the choices as well


class ByExpert(NamedTuple):
    """The T K choices sorted by expert, tokens in order within one."""

    token: Tensor  # [T K] int64, of each row
    places: Tensor  # [T, K] int64, the row of each choice
    ends: Tensor  # [E] int32: rows ends[e-1]:ends[e] are those of expert e
    weights: Tensor  # [T K] float32, of each row, with gradient


class TopkRouter(nn.Module):
    """Chooses K of E experts per token: sigmoid scores, group-limited, balanced by a bias that only selects."""

    def __init__(self, config: DeepseekV3Config) -> None:
        super().__init__()
        self.top_k, self.num_experts = config.num_experts_per_tok, config.n_routed_experts
        self.n_group, self.topk_group = config.n_group, config.topk_group
        self.norm_topk_prob, self.scaling = config.norm_topk_prob, config.routed_scaling_factor
        self.weight = nn.Parameter(torch.empty(self.num_experts, config.hidden_size))
        self.e_score_correction_bias: Tensor
        self.register_buffer("e_score_correction_bias", torch.zeros(self.num_experts, dtype=torch.float32))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        # `.to(bfloat16)` must not touch the bias: near 0.25 BF16 steps are 0.002, larger than a balancing update.
        before = self.e_score_correction_bias
        super()._apply(fn, recurse)
        after = self.e_score_correction_bias
        if after.dtype != torch.float32:
            moved = torch.empty_like(after, dtype=torch.float32) if before.is_meta else before.to(after.device)
            self.e_score_correction_bias = moved
        return self

    def select(self, scores: Tensor) -> Tensor:
        """scores # [T, E] -> expert indices # [T, K]: best K by score + bias within the best groups."""
        choice = scores + self.e_score_correction_bias  # [T, E]
        if self.n_group > 1:
            grouped = choice.unflatten(-1, (self.n_group, -1))  # [T, G, E / G]
            group_score = grouped.topk(2, dim=-1).values.sum(-1)  # [T, G]
            kept = group_score.topk(self.topk_group, dim=-1, sorted=False).indices  # [T, topk_group]
            dropped = torch.ones_like(group_score, dtype=torch.bool).scatter_(1, kept, False)
            # -inf, not 0: with negative biases a masked 0 would beat real experts.
            choice = grouped.masked_fill(dropped[..., None], float("-inf")).flatten(1)
        return choice.topk(self.top_k, dim=-1, sorted=False).indices

    def forward(self, x: Tensor, routed_experts: Tensor | None = None) -> Routing:
        """x # [T, d], routed_experts # [T, K] or None -> Routing.

        routed_experts replays a recorded choice: indices are taken from it, weights are recomputed with gradient.
        A token whose row holds -1 was not recorded and is routed normally.
        """
        if usable(x):
            return self._choose(x, routed_experts)
        logits = F.linear(x.float(), self.weight.float())  # [T, E], FP32: near-ties must not flip
        scores = logits.sigmoid()
        with torch.no_grad():
            experts, differs = self.select(scores), None  # [T, K]
            if routed_experts is not None:
                replay = routed_experts.to(experts)
                replay = torch.where((replay < 0).any(-1, keepdim=True), experts, replay)
                differs = (replay.sort(-1).values != experts.sort(-1).values).any(-1)
                experts = replay
            counts = expert_counts(experts[:, None], self.num_experts)[0]
        weights = scores.gather(1, experts)  # [T, K], unbiased scores
        if self.norm_topk_prob:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return Routing(experts, weights * self.scaling, scores, counts, differs)

    def _choose(self, x: Tensor, routed_experts: Tensor | None) -> Routing:
        """The same in few kernels, and the choices sorted by expert."""
        from model.kernels.router import Choice, choose

        choice = Choice(self.top_k, self.n_group, self.topk_group, self.norm_topk_prob, self.scaling)
        chosen = choose(x, self.weight, self.e_score_correction_bias, routed_experts, choice)
        rows = ByExpert(chosen.token, chosen.places, chosen.ends, chosen.row_weights)
        differs = None if routed_experts is None else chosen.differs
        return Routing(chosen.experts, chosen.weights, chosen.scores, chosen.counts, differs, rows)


def expert_counts(experts: Tensor, num_experts: int, mask: Tensor | None = None) -> Tensor:
    """Tokens per layer and expert # [L, E] int64, from experts # [T, L, K] and mask # [T] bool (None: all count).

    Integers: exact, whatever the order, and without the host synchronisation of bincount.
    """
    layers = experts.shape[1]
    index = experts  # [T, L, K]
    if layers > 1:
        index = experts + num_experts * torch.arange(layers, device=experts.device)[:, None]
    if mask is None:
        counted = index.new_ones(()).expand(index.numel())
    else:
        counted = mask[:, None, None].to(index.dtype).expand_as(index).flatten()
    counts = index.new_zeros(layers * num_experts).scatter_add_(0, index.flatten(), counted)
    return counts.view(layers, num_experts)


class Experts(nn.Module):
    """E gated MLPs stacked in two parameters: gate_up_proj [E, 2I, d] (gate first), down_proj [E, d, I]."""

    def __init__(self, config: DeepseekV3Config) -> None:
        super().__init__()
        experts, inner, hidden = config.n_routed_experts, config.moe_intermediate_size, config.hidden_size
        self.gate_up_proj = nn.Parameter(torch.empty(experts, 2 * inner, hidden))
        self.down_proj = nn.Parameter(torch.empty(experts, hidden, inner))

    def forward(self, x: Tensor, routing: Routing) -> Tensor:
        """See gated_experts."""
        return gated_experts(x, routing, self.gate_up_proj, self.down_proj)


def gated_experts(x: Tensor, routing: Routing, gate_up: Tensor, down: Tensor) -> Tensor:
    """x # [T, d], gate_up # [E, 2I, d], down # [E, d, I] -> sum over the K chosen experts of weight * expert(x)
    # [T, d].

    Measured on the CPU (one thread, FP32, d 128, E 8, K 2, T 1500 / 4000), forward and backward of moving tokens to
    experts and back: index_select + index_add 0.46 / 2.5 ms; gather by inverse permutation and sum over K
    0.54 / 2.9 ms; the same with hand-written backwards 0.63 / 2.8 ms; with bmm over K 1.6 / 5.2 ms.
    Sorting takes 0.02 / 0.07 ms. On a GPU weights multiply activations and not outputs, the same up to rounding:
    outputs need not be kept, nor read again.
    """
    token, places, ends, weight = by_expert(routing)
    if usable(x):
        from model.kernels.experts import collect, gated_rows, spread

        gated = gated_rows(grouped_linear(spread(x, token, places), gate_up, ends), weight)
        return collect(grouped_linear(gated, down, ends), token, places)
    gate, up = grouped_linear(x.index_select(0, token), gate_up, ends).chunk(2, dim=-1)
    y = grouped_linear(F.silu(gate) * up, down, ends)  # [T K, d]
    return torch.zeros_like(x).index_add(0, token, y * weight.to(y.dtype)[:, None])


def by_expert(routing: Routing) -> ByExpert:
    """As the router's kernel sorted them, or sorted here."""
    if routing.by_expert is not None:
        return routing.by_expert
    # a sort by radix takes a pass for each byte of its keys
    keys = routing.experts.flatten().to(torch.uint8 if len(routing.counts) <= 256 else torch.int32)
    order = keys.argsort(stable=True)
    places = torch.empty_like(order).index_copy_(0, order, torch.arange(len(order), device=order.device))
    weights = routing.weights.flatten().index_select(0, order)
    ends = routing.counts.cumsum(0, dtype=torch.int32)
    return ByExpert(order // routing.experts.shape[1], places.view_as(routing.experts), ends, weights)


def grouped_linear(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """Rows ends[e-1]:ends[e] of x # [N, in] times weight[e]^T, weight # [E, out, in], ends # [E] int32 -> # [N, out].

    Experts may be empty. F.grouped_mm where it can run (rows a multiple of 16 bytes; BF16, FP16, and FP32 on the CPU),
    else one matmul per expert: the only loop over experts, and the only place that knows about it.
    """
    aligned = all(n * x.element_size() % 16 == 0 for n in weight.shape[1:])
    dtypes = (torch.bfloat16, torch.float16, torch.float32) if x.device.type == "cpu" else (torch.bfloat16,)
    if aligned and x.dtype in dtypes and len(x) > 0 and hasattr(F, "grouped_mm"):
        return F.grouped_mm(x, weight.transpose(-2, -1), offs=ends)
    sizes = ends.diff(prepend=ends.new_zeros(1)).tolist()
    return torch.cat([rows @ w.t() for rows, w in zip(x.split(sizes), weight)])


class DeepseekMoE(nn.Module):
    """Routed experts plus shared experts: one MLP of width S * I, always on, not scaled (equations 12-16)."""

    def __init__(self, config: DeepseekV3Config) -> None:
        super().__init__()
        self.gate = TopkRouter(config)
        self.experts = Experts(config)
        self.shared_experts = (
            MLP(config.hidden_size, config.moe_intermediate_size * config.n_shared_experts)
            if config.n_shared_experts
            else None
        )

    def forward(self, x: Tensor | tuple[Tensor, ...], routed_experts: Tensor | None = None) -> tuple[Tensor, Routing]:
        """x # [T, d], routed_experts # [T, K] to replay or None -> (output # [T, d], Routing).

        x may come once for each of its readers (see RMSNorm.added): router, routed experts, shared experts.
        """
        of_gate, of_experts, of_shared = x if isinstance(x, tuple) else (x, x, x)
        routing = self.gate(of_gate, routed_experts)
        out = self.experts(of_experts, routing)
        return (out if self.shared_experts is None else out + self.shared_experts(of_shared)), routing


def sequence_balance_loss(scores: Tensor, segment_ids: Tensor, num_segments: int, top_k: int) -> Tensor:
    """Sequence-wise balance loss of one layer without its factor alpha (arXiv 2412.19437, equations 17-20).

    scores # [T, E] (unbiased), segment_ids # [T] -> scalar: sum_e f_e P_e averaged over segments; 1 at perfect balance.
    The counted experts are the top K of the scores without bias and groups; the counts carry no gradient.
    """
    num_experts = scores.shape[1]
    share = scores / (scores.sum(-1, keepdim=True) + 1e-20)  # [T, E]
    chosen = torch.zeros_like(scores).scatter_(1, scores.detach().topk(top_k, dim=-1).indices, 1.0)  # [T, E]
    zeros = scores.new_zeros(num_segments, num_experts)
    ones = scores.new_ones(len(scores), 1)
    length = scores.new_zeros(num_segments, 1).index_add(0, segment_ids, ones).clamp(min=1)  # [S, 1]
    f = zeros.index_add(0, segment_ids, chosen) * (num_experts / top_k) / length  # [S, E]
    p = zeros.index_add(0, segment_ids, share) / length  # [S, E]
    return (f * p).sum(-1).mean()


def balanced_bias(bias: Tensor, counts: Tensor, rate: float) -> Tensor:
    """The auxiliary-loss-free update b + rate * sign(mean(c) - c) (arXiv 2408.15664); bias, counts # [E] -> # [E].

    counts must cover the whole global batch, without padding, and each token once.
    """
    counts = counts.float()
    return bias + rate * torch.sign(counts.mean() - counts)
