"""Evaluation of a policy on held-out prompts: greedy accuracy in the loop; pass@1, pass@k and maj@k for `grpo eval`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from math import comb
from pathlib import Path
from typing import Any

import numpy as np

from grpo.checkpoint import last_checkpoint
from grpo.cluster import Cluster
from grpo.config import Config, ConfigError, load_config
from grpo.prepare import prepare
from grpo.records import Prompt
from grpo.steps import reward_inputs, rollout_params
from rewards import Score
from rollout import SamplingParams
from rollout.draws import seed_of

HERE = ("--run.cluster=inline", "--rollout.weight_transport=auto")  # whatever the run was trained with


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
    params = [rollout_params(config, n, seed_of(config.run.seed, "eval", prompt.id)) for prompt in prompts]
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


def evaluate_policy(source: str, overrides: Sequence[str], n: int, ks: Sequence[int]) -> dict[str, Any]:
    """What `grpo eval` prints. `source`: a YAML, or a run directory, whose last checkpoint is evaluated.

    Raises ValueError for bad input.
    """
    run_dir, model_dir = Path(source), None
    if run_dir.is_dir():
        if not (run_dir / "config.yaml").is_file():
            raise ConfigError(f"{source!r} is neither a YAML file nor a run directory (no config.yaml)")
        found = last_checkpoint(run_dir)
        if found is None:
            raise ConfigError(f"{source!r} has no whole checkpoint yet; give a configuration with model.path instead")
        model_dir = found[0]
        overrides = [*overrides, f"--run.output_dir={source}"]
        source = str(run_dir / "config.yaml")
    config = load_config(source, [*HERE, *overrides])
    prepared = prepare(config)
    if not prepared.held_out:
        raise ConfigError("there are no held-out prompts; set data.eval_path, or data.holdout above 0")
    model_dir = model_dir or prepared.model_dir
    with Cluster(config, model_dir, model_dir, learner=False) as cluster:
        greedy = accuracy(config, cluster, prepared.held_out, prepared.tokenizer)
        sampled = pass_at_k(config, cluster, prepared.held_out, prepared.tokenizer, n, ks)
    return {"model": str(model_dir), "prompts": len(prepared.held_out), "greedy_accuracy": greedy, **sampled}
