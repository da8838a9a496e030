"""The multi-token prediction loss (arXiv 2412.19437, section 2.2) over packed sequences."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from model.block import MTPLayer
from model.layout import SequenceLayout
from model.modeling import DeepseekV3ForCausalLM


class MTPLoss(NamedTuple):
    """loss: mean over depths of the mean cross-entropy; loss_sum, count, correct # [D] allow a global normaliser."""

    loss: Tensor
    loss_sum: Tensor
    count: Tensor
    correct: Tensor


def mtp_loss(
    model: DeepseekV3ForCausalLM,
    hidden: Tensor,
    input_ids: Tensor,
    layout: SequenceLayout,
    detach: bool,
    target_mask: Tensor | None = None,
) -> MTPLoss:
    """Cross-entropy of the MTP layers (equations 22-25, without the factor lambda).

    hidden # [T, d] of the main model after its final norm, input_ids # [T], target_mask # [T] bool: tokens that count
    as targets (default all). Depth k at position i reads token i + k and predicts token i + k + 1 of the same sequence.
    A prompt shared by several samples is written out once per sample: its last tokens look ahead into the sample.
    detach=True (reinforcement learning): only MTP parameters get a gradient, not hidden, embedding or head.
    Raises ValueError when the model has no MTP layers.
    """
    if len(model.mtp_layers) == 0:
        raise ValueError("num_nextn_predict_layers is 0: this model has no MTP layers to train")
    token_index, layout = layout.repeat_parents()
    hidden, ids = hidden.index_select(0, token_index), input_ids.index_select(0, token_index)  # [T', d], [T']
    counted = torch.ones_like(ids, dtype=torch.bool) if target_mask is None else target_mask[token_index].bool()
    embedding, head = model.model.embed_tokens(ids), model.lm_head.weight
    if detach:
        hidden, embedding, head = hidden.detach(), embedding.detach(), head.detach()
    cos, sin = model.model.rotary(layout.position_ids)  # anchored at the position of hidden, as vLLM does
    left = layout.cu_seqlens[layout.segment_ids + 1] - torch.arange(len(layout), device=ids.device)  # [T'], >= 1

    sums, counts, correct = [], [], []
    for k, layer in enumerate(model.mtp_layers, start=1):
        assert isinstance(layer, MTPLayer)
        # The last k tokens of a sequence have no token i + k: they get a wrapped-around embedding, which no position
        # that has a target can see, since attention is causal and they come last.
        hidden = layer.predict(hidden, embedding.roll(-k, 0), cos, sin, layout)  # [T', d]
        valid = (left > k + 1) & counted.roll(-k - 1)  # [T']
        rows = valid.nonzero().flatten()  # [N]
        targets = ids.roll(-k - 1)[rows]  # [N]
        logits = F.linear(hidden[rows], head).float()  # [N, V]
        sums.append(F.cross_entropy(logits, targets, reduction="sum"))
        counts.append(valid.sum())
        correct.append((logits.detach().argmax(-1) == targets).sum())
    loss_sum, count = torch.stack(sums), torch.stack(counts)  # [D]
    return MTPLoss((loss_sum / count.clamp(min=1)).mean(), loss_sum, count, torch.stack(correct))
