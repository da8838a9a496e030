"""Policy losses of GRPO and its relatives, on the log-probabilities of completion tokens.

`policy_loss` is pure: log-probabilities and a PackedBatch in, a loss and statistics out. The normaliser of a loss
type lies in the batch's `weights` (`token_weights`), computed over the whole update before it is cut into
micro-batches, so sums over micro-batches give the same gradient however the cut falls. R: completion tokens.

Papers: GRPO DeepSeekMath 2402.03300, Dr. GRPO 2503.20783, DAPO 2503.14476, GSPO 2507.18071, CISPO 2506.13585,
dual clip 1912.09729; KL estimators: Schulman, "Approximating KL divergence".
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from grpo.records import PackedBatch


@dataclass(frozen=True, slots=True)
class LossOptions:
    """The part of the configuration that losses read; see GRPOConfig for each field."""

    loss_type: Literal["grpo", "dr_grpo", "bnpo", "dapo", "cispo"] = "dapo"
    epsilon: float = 0.2
    epsilon_high: float = 0.2
    delta: float | None = None
    beta: float = 0.0
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    importance_sampling_level: Literal["token", "sequence"] = "token"
    importance_sampling_correction: str = "none"
    importance_sampling_cap: float = 3.0
    correct_truncation: bool = False


def token_weights(lengths: np.ndarray, loss_type: str, max_completion_length: int, active: np.ndarray) -> np.ndarray:
    """[N] weight of each token of a sample, for N samples of an update with completion `lengths` [N].

    `active` [N] bool: samples that take part (scored, not masked for truncation). Inactive ones weigh 0 and are not
    counted in the normalisers of token means; sample means divide by all samples, as TRL does.
    """
    if loss_type == "grpo":
        weight = 1.0 / (np.maximum(lengths, 1) * max(len(lengths), 1))
    elif loss_type == "dr_grpo":
        weight = np.full(len(lengths), 1.0 / (max(len(lengths), 1) * max_completion_length))
    else:  # bnpo, dapo, cispo
        weight = np.full(len(lengths), 1.0 / max(lengths[active].sum(), 1))
    return np.where(active, weight, 0.0)


def kl_divergence(logprobs: torch.Tensor, ref_logprobs: torch.Tensor, estimator: str) -> torch.Tensor:
    """Per-token estimate [R] of KL(policy || reference) from samples of the policy."""
    log_ratio = ref_logprobs - logprobs
    if estimator == "k1":
        return -log_ratio
    if estimator == "k2":
        return 0.5 * log_ratio.square()
    assert estimator == "k3", f"{estimator=}"
    return log_ratio.exp() - log_ratio - 1


def policy_loss(
    logprobs: torch.Tensor, batch: PackedBatch, options: LossOptions
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss (a weighted sum over tokens) and statistics of a micro-batch.

    logprobs: [R] float32, of the current policy, with gradient. Statistics are sums or maxima over the tokens that
    take part, to be combined over micro-batches: `sum/...` add up, `max/...` take the maximum.
    """
    active = batch.weights > 0  # [R]
    old = logprobs.detach() if batch.old_logprobs is None else batch.old_logprobs
    mismatch = (old - batch.rollout_logprobs).abs()
    current = len(mismatch)
    if batch.stale is not None:
        # between policies of different versions the difference is no fault of the machinery
        mismatch, current = torch.where(batch.stale, 0.0, mismatch), int((~batch.stale).sum())
        if options.importance_sampling_correction == "none":
            # the ratio starts from the policy that sampled; a correction leads from there to `old`, and does without
            old = torch.where(batch.stale, batch.rollout_logprobs, old)

    def of_active(values: torch.Tensor) -> torch.Tensor:
        # a token with weight 0 (masked, unscored) must not matter, even where its numbers are not finite; masked here,
        # as a mask on the loss alone would leave 0 * inf in the backward pass
        return torch.where(active, values, 0.0)

    difference = of_active(old - _rollout_logprobs(batch, options))
    logprobs, old, advantages = of_active(logprobs), of_active(old), of_active(batch.advantages)
    log_ratio = logprobs - old
    if options.importance_sampling_level == "sequence":
        mean = _sample_mean(log_ratio, batch)
        # GSPO's sequence ratio; the gradient of every token flows through the mean
        log_ratio = mean[batch.sample]
    ratio = log_ratio.exp()
    low, high = 1 - options.epsilon, 1 + options.epsilon_high
    if options.loss_type == "cispo":
        capped = ratio.detach().clamp(max=options.epsilon_high)
        per_token = -capped * advantages * logprobs
        clipped_low = torch.zeros_like(active)
        clipped_high = (ratio > options.epsilon_high) & (advantages > 0)
    else:
        bounded = ratio if options.delta is None else ratio.clamp(max=options.delta)
        per_token = -torch.minimum(bounded * advantages, ratio.clamp(low, high) * advantages)
        clipped_low = (ratio < low) & (advantages < 0)
        clipped_high = (ratio > high) & (advantages > 0)

    correction = _correction(difference, batch, options)
    if correction is not None:
        per_token = per_token * correction
    stats = {
        "sum/tokens": active.sum(),
        "sum/clip_low": (clipped_low & active).sum(),
        "sum/clip_high": (clipped_high & active).sum(),
        # over all current tokens: the difference is a property of the machinery, not of the samples that count
        "sum/logp_difference": mismatch.sum(),
        "max/logp_difference": mismatch.max() if len(old) else old.new_zeros(()),
        "sum/current": torch.tensor(current),
        "sum/rows": torch.tensor(len(logprobs)),
    }
    if correction is not None:
        stats["sum/is_ratio"] = (correction * active).sum()
    if options.beta > 0:
        assert batch.ref_logprobs is not None, f"{options.beta=} without reference log-probabilities"
        kl = kl_divergence(logprobs, of_active(batch.ref_logprobs), options.kl_estimator)
        per_token = per_token + options.beta * kl
        stats["sum/kl"] = (kl.detach() * active).sum()
    return (per_token * batch.weights).sum(), stats


def _sample_mean(values: torch.Tensor, batch: PackedBatch) -> torch.Tensor:
    """[R] -> [num_samples], mean over each sample's tokens."""
    total = values.new_zeros(batch.num_samples).index_add(0, batch.sample, values)
    count = values.new_zeros(batch.num_samples).index_add(0, batch.sample, torch.ones_like(values))
    return total / count.clamp(min=1)


def _rollout_logprobs(batch: PackedBatch, options: LossOptions) -> torch.Tensor:
    if options.correct_truncation:
        return batch.rollout_logprobs - batch.log_support
    return batch.rollout_logprobs


def _correction(difference: torch.Tensor, batch: PackedBatch, options: LossOptions) -> torch.Tensor | None:
    """Importance weight [R] of learner over rollout, from log-differences [R]; a constant for the gradient."""
    if options.importance_sampling_correction == "none":
        return None
    level, mode = options.importance_sampling_correction.split("_")
    difference = difference.detach()
    if level == "sequence":  # probability of the whole sequence: the sum of its log-differences
        total = difference.new_zeros(batch.num_samples).index_add(0, batch.sample, difference)
        difference = total[batch.sample]
    weight = difference.exp()
    if mode == "truncate":
        return weight.clamp(max=options.importance_sampling_cap)
    return torch.where(weight > options.importance_sampling_cap, 0.0, weight)
