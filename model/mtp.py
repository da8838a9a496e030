"""The multi-token prediction loss (arXiv 2412.19437, section 2.2) over packed sequences."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from model.block import MTPLayer
from model.layout import SequenceLayout
from model.modeling import DeepseekV3PreTrainedModel
from model.moe import expert_counts

CHUNK_LOGITS = 1 << 22  # logits held at a time where there are more; they are computed again in the backward pass


class MTPLoss(NamedTuple):
    """Of D depths over the N targets of each; sums and counts # [D] allow a global normaliser."""

    loss: Tensor  # mean over depths of the mean cross-entropy, with gradient
    loss_sum: Tensor  # [D] float32, with gradient
    count: Tensor  # [D] int64, N
    correct: Tensor  # [D] int64, targets that are the likeliest token
    agree: Tensor  # [D] int64, targets for which the main head has the same likeliest token
    expert_counts: Tensor  # [layers with experts, E] int64


def mtp_loss(
    model: DeepseekV3PreTrainedModel,
    hidden: Tensor,
    input_ids: Tensor,
    layout: SequenceLayout,
    source: Tensor,
    target: Tensor,
    detach: bool,
) -> MTPLoss:
    """Cross-entropy of the MTP layers (equations 22-25, without the factor lambda) on the main model's own targets.

    hidden # [T, d] of the main model after its final norm, input_ids # [T]. source, target # [R]: the main model
    predicts target[r] at source[r]; depth k predicts it k tokens earlier in the same sequence, where there is such a
    token, and reads the token at source[r]. Sources are not in a prompt that several samples share, and all samples of
    a prompt begin with the same token (grpo.packing: the prompt's last), so that depth 1 needs nothing written twice.
    detach=True (reinforcement learning): only MTP parameters get a gradient, not hidden, embedding or head.
    Raises ValueError when the model has no MTP layers.
    """
    depth = len(model.mtp_layers)
    if depth == 0:
        raise ValueError("num_nextn_predict_layers is 0: this model has no MTP layers to train")
    assert _same_start(input_ids, layout), "samples of one prompt begin with different tokens"
    main, head = hidden.detach()[source], model.head.weight  # [R, d]
    # Depth k reads k tokens ahead: all but the first of them may differ between the samples of a prompt.
    token_index, layout = layout.repeat_parents(depth - 1)
    hidden, ids = hidden.index_select(0, token_index), input_ids.index_select(0, token_index)  # [T', d], [T']
    source = torch.empty_like(input_ids).index_copy_(0, token_index, torch.arange(len(ids), device=ids.device))[source]
    if detach:
        hidden, head = hidden.detach(), head.detach()
    cos, sin = model.model.rotary(layout.position_ids)  # anchored at the position of hidden, as vLLM does

    follow = _next_token(layout)  # [T']
    ahead = torch.arange(len(ids), device=ids.device)  # [T'], the token k ahead of each
    exists = torch.ones_like(ahead, dtype=torch.bool)  # [T'], whether there is one
    depths, experts = [], [ids.new_zeros(0, model.config.n_routed_experts)]
    for k, layer in enumerate(model.mtp_layers, start=1):
        assert isinstance(layer, MTPLayer)
        exists, ahead = exists & (follow[ahead] != ahead), follow[ahead]
        # The last k tokens of a sequence read its last one instead of a token beyond it. No position that has a target
        # can see them: attention is causal and they come last.
        embedding = model.model.embed_tokens(ids[ahead])  # [T', d]
        hidden, routing = layer.predict(hidden, embedding.detach() if detach else embedding, cos, sin, layout)
        at, has = _earlier(layout, source, k)  # [R]
        rows = has.nonzero().flatten()  # [N]
        loss, correct, agree = _head_loss(hidden[at[rows]], main[rows], head, target[rows])
        depths.append((loss, has.sum(), correct, agree))
        if routing is not None:
            experts.append(expert_counts(routing.experts[:, None], model.config.n_routed_experts, exists))
    loss_sum, count, correct, agree = map(torch.stack, zip(*depths))
    return MTPLoss((loss_sum / count.clamp(min=1)).mean(), loss_sum, count, correct, agree, torch.cat(experts))


def _same_start(ids: Tensor, layout: SequenceLayout) -> bool:
    """Whether all samples of a prompt begin with the token that follows it in `_next_token`."""
    starts, ends = layout.cu_seqlens[:-1], layout.cu_seqlens[1:] - 1
    child = layout.parent >= 0
    return torch.equal(ids[starts[child]], ids[_next_token(layout)[ends[layout.parent[child]]]])


def _next_token(layout: SequenceLayout) -> Tensor:
    """[T]: the token after each one, from a shared prompt into one of its samples; a sample's last has itself."""
    starts, ends = layout.cu_seqlens[:-1], layout.cu_seqlens[1:] - 1  # [S], of first and last tokens
    follow = torch.arange(1, len(layout) + 1, device=starts.device)
    follow[ends] = ends
    child = layout.parent >= 0
    follow[ends[layout.parent[child]]] = starts[child]
    return follow


def _earlier(layout: SequenceLayout, index: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """(place # [R] of the token k before each of index # [R], in its segment or the parent's; whether there is one)."""
    segment = layout.segment_ids[index]
    start, parent = layout.cu_seqlens[segment], layout.parent[segment]
    beyond = start - (index - k)  # above 0: so many tokens before the segment
    in_parent = layout.cu_seqlens[parent + 1] - beyond
    inside = beyond <= 0
    has = inside | ((parent >= 0) & (in_parent >= layout.cu_seqlens[parent]))
    return torch.where(inside, index - k, in_parent), has


def _head_loss(hidden: Tensor, main: Tensor, head: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """hidden, main # [N, d] of the MTP layer and of the main model, which predict the same targets # [N].

    -> summed cross-entropy of the first; how often its likeliest token is the target; and is that of the second.
    """

    def chunk(hidden: Tensor, main: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = F.linear(hidden, head).float()  # [n, V]
        likeliest = logits.detach().argmax(-1)
        agree = (likeliest == F.linear(main, head.detach()).argmax(-1)).sum()
        return F.cross_entropy(logits, targets, reduction="sum"), (likeliest == targets).sum(), agree

    size = max(1, CHUNK_LOGITS // head.shape[0])
    parts = list(zip(hidden.split(size), main.split(size), targets.split(size)))
    if len(parts) == 1:
        return chunk(*parts[0])
    sums = [checkpoint(chunk, *part, use_reentrant=False) for part in parts]
    loss, correct, agree = (torch.stack(values).sum(0) for values in zip(*sums))
    return loss, correct, agree
