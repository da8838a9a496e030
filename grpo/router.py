"""What the routers did: tokens per expert of an update or a rollout, and the numbers that watch over them.

L: layers with experts, E: experts, K: experts of a token, T: packed tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from grpo.records import Group, PackedBatch


def trained_tokens(batch: PackedBatch) -> torch.Tensor:
    """[T] bool, on the host: the tokens that an update trains on. The batch is best on the host.

    Prompt (once, where it is shared) and completion of every sample that takes part, i.e. has a weight above 0; not a
    completion's last token, which is a target and no input.
    """
    lengths, parent = np.diff(batch.cu_seqlens.numpy()), batch.parent.numpy()  # [S]
    segment = np.repeat(np.arange(len(lengths)), lengths)  # [T]
    active = np.zeros(len(lengths), dtype=bool)
    active[segment[batch.source[batch.weights > 0].cpu().numpy()]] = True
    active[parent[active & (parent >= 0)]] = True
    return torch.from_numpy(active[segment])


def rollout_counts(groups: Sequence[Group]) -> torch.Tensor:
    """[L, E'] int64: tokens that the rollout workers sent to each expert; experts from E' on got none.

    Every token that went through an engine for these groups: a group's prompt once, and each completion but for its
    last token, which is drawn and never fed back. There is no padding. Needs completions with routed_experts.
    """
    rows = []
    for group in groups:
        prompt = len(group.prompt.token_ids)
        for sample in group.samples:
            experts = sample.completion.routed_experts
            assert experts is not None, f"prompt {group.prompt.id}: the engine did not record its experts"
            rows.append(experts[prompt if sample.index else 0 :])  # [tokens, L, K]
    layers = np.concatenate(rows).swapaxes(0, 1).reshape(rows[0].shape[1], -1)  # [L, tokens K]
    size = int(layers.max(initial=0)) + 1
    counts = [np.bincount(layer, minlength=size) for layer in layers]
    return torch.from_numpy(np.array(counts, dtype=np.int64).reshape(len(layers), size))


def router_metrics(counts: torch.Tensor, start: torch.Tensor) -> dict[str, float]:
    """From the tokens per expert of a step and of the run's first step, both [L, E]; {} where no token was counted.

    router/max_violation  (max - mean) / mean of the tokens per expert, in the worst layer (MaxVio, arXiv 2408.15664):
                          0 is perfect balance, E / K - 1 the worst there is
    router/dead_experts   share of the experts of all layers that got no token
    router/drift          share of the choices of experts that moved since the start, at least: the total variation
                          distance of the distribution over experts to that of the first step, mean over layers
    """
    load, first = counts.double(), start.double()
    if counts.numel() == 0 or not load.sum() or not first.sum():
        return {}
    violation = load.amax(1) / load.mean(1) - 1  # [L]
    shares = [x / x.sum(1, keepdim=True) for x in (load, first)]
    return {
        "router/max_violation": float(violation.max()),
        "router/dead_experts": float((counts == 0).double().mean()),
        "router/drift": float((shares[0] - shares[1]).abs().sum(1).mean() / 2),
    }
