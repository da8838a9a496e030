"""Evaluation of a policy on held-out prompts: greedy accuracy in the loop; pass@1, pass@k and maj@k for `grpo eval`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from math import comb
from typing import Any

import numpy as np

from grpo.cluster import Cluster
from grpo.config import Config
from grpo.records import Prompt
from grpo.steps import reward_inputs
from rewards import Score
from rollout import SamplingParams
from rollout.draws import seed_of


def accuracy(config: Config, cluster: Cluster, prompts: Sequence[Prompt], tokenizer: Any) -> float:
    """Share of prompts whose greedy answer is right."""
    params = SamplingParams(temperature=0.0, max_tokens=config.rollout.max_completion_length)
    completions = cluster.sample([p.token_ids for p in prompts], [params] * len(prompts))
    scores = cluster.score(reward_inputs(prompts, completions, tokenizer))
    return float(np.mean([is_right(config, score) for score in scores]))


def is_right(config: Config, score: Score) -> bool:
    """Whether run.eval_reward (or the first reward) gave the full 1. An answer without a score is not right."""
    value = score.parts.get(config.run.eval_reward or next(iter(config.rewards)))
    return value is not None and value >= 1.0


def pass_at_k(
    config: Config, cluster: Cluster, prompts: Sequence[Prompt], tokenizer: Any, n: int, ks: Sequence[int]
) -> dict[str, float]:
    """pass@1, pass@k (unbiased, arXiv 2107.03374 eq. 1), maj@n from n samples a prompt, with their statistics.

    maj@n: the most frequent completion text (first drawn on a tie) is right.
    """
    params = [
        SamplingParams(
            n=n,
            temperature=config.rollout.temperature,
            top_p=config.rollout.top_p,
            top_k=config.rollout.top_k,
            min_p=config.rollout.min_p,
            max_tokens=config.rollout.max_completion_length,
            seed=seed_of(config.run.seed, "eval", prompt.id),
        )
        for prompt in prompts
    ]
    completions = cluster.sample([p.token_ids for p in prompts], params)
    inputs = reward_inputs(prompts, completions, tokenizer)
    scores = cluster.score(inputs)
    right = np.array([is_right(config, s) for s in scores]).reshape(len(prompts), n)
    texts = np.array([i.completion for i in inputs], dtype=object).reshape(len(prompts), n)
    result = {f"pass@{k}": float(np.mean([unbiased_pass(n, int(c), k) for c in right.sum(1)])) for k in ks}
    votes = [list(row).index(Counter(row).most_common(1)[0][0]) for row in texts]
    result[f"maj@{n}"] = float(np.mean([row[vote] for row, vote in zip(right, votes)]))
    result["mean_length"] = float(np.mean([len(c.token_ids) for group in completions for c in group]))
    result["unscored_share"] = float(np.mean([s.value is None for s in scores]))
    return result


def unbiased_pass(n: int, correct: int, k: int) -> float:
    """1 - C(n - c, k) / C(n, k): the chance that k of n samples, c of them right, hold a right one."""
    return 1.0 - comb(n - correct, k) / comb(n, k)
