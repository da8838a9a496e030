"""Advantages: each sample's reward against the other samples of its group, no critic (DeepSeekMath eq. 4.1.2).

Pure numpy. Rewards come as [P, G] (prompts x samples); NaN marks a sample that has no score. It gets the advantage
NaN and leaves the group's mean and deviation too. Deviations are unbiased (n - 1), as in TRL.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

EPSILON = 1e-4  # added to deviations, TRL's value


def group_advantages(
    rewards: np.ndarray,  # [P, G]
    estimator: Literal["grpo", "rloo"] = "grpo",
    scale: Literal["group", "batch", "none"] = "group",
) -> np.ndarray:
    """Advantages [P, G] in float64.

    grpo: r - mean(group). rloo: r - mean(the others of the group). `scale` divides by the deviation of the group, of
    all rewards of the batch, or not at all (Dr. GRPO). Where a group's rewards are all equal its advantages are 0.
    """
    rewards = np.asarray(rewards, dtype=np.float64)
    scored = ~np.isnan(rewards)
    count = scored.sum(axis=1, keepdims=True)  # [P, 1]
    values = np.where(scored, rewards, 0.0)
    centred = np.where(scored, values - values.sum(axis=1, keepdims=True) / np.maximum(count, 1), 0.0)
    # subtracting a mean leaves rounding noise of about 1e-17, which a tiny deviation would blow up
    centred[zero_variance(rewards)] = 0.0
    group_std = _std(centred, count)
    if estimator == "rloo":  # r - (sum - r) / (n - 1) = (r - mean) n / (n - 1)
        centred = centred * count / np.maximum(count - 1, 1)
    if scale == "group":
        centred = centred / (group_std + EPSILON)
    elif scale == "batch":
        everything = values[scored]
        centred = centred / ((everything.std(ddof=1) if everything.size > 1 else 0.0) + EPSILON)
    return np.where(scored, centred, np.nan)


def normalized_then_summed(
    terms: Sequence[np.ndarray],  # each [P, G]: what one reward counted with; NaN where it does not apply
    weights: Sequence[float],
    estimator: Literal["grpo", "rloo"] = "grpo",
) -> np.ndarray:
    """Advantages [P, G] where every reward is normalised within its group before the weighted sum (GDPO, arXiv
    2601.05242), then divided by the deviation of the batch. A reward whose scale or spread is small keeps its say.

    A reward that does not apply to a sample adds 0 to it; where none applies the advantage is NaN.
    """
    scored = ~np.all([np.isnan(term) for term in terms], axis=0)
    total = np.zeros_like(np.asarray(terms[0], dtype=np.float64))
    for term, weight in zip(terms, weights, strict=True):
        total += weight * np.nan_to_num(group_advantages(term, estimator, "group"))
    spread = total[scored].std(ddof=1) if scored.sum() > 1 else 0.0
    return np.where(scored, total / (spread + EPSILON), np.nan)  # each reward's mean is 0 already


def zero_variance(rewards: np.ndarray) -> np.ndarray:
    """[P] bool: all scored rewards of the group are equal, or fewer than two are scored: nothing to learn from."""
    rewards = np.asarray(rewards, dtype=np.float64)
    low = np.where(np.isnan(rewards), np.inf, rewards).min(axis=1)
    high = np.where(np.isnan(rewards), -np.inf, rewards).max(axis=1)
    return high <= low


def group_std(rewards: np.ndarray) -> np.ndarray:
    """[P] unbiased deviation of each group's scored rewards."""
    rewards = np.asarray(rewards, dtype=np.float64)
    scored = ~np.isnan(rewards)
    count = scored.sum(axis=1, keepdims=True)
    values = np.where(scored, rewards, 0.0)
    centred = np.where(scored, values - values.sum(axis=1, keepdims=True) / np.maximum(count, 1), 0.0)
    return _std(centred, count)[:, 0]


def _std(centred: np.ndarray, count: np.ndarray) -> np.ndarray:
    return np.sqrt((centred**2).sum(axis=1, keepdims=True) / np.maximum(count - 1, 1))
