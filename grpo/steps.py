"""The arrows of the loop, each a function from records to records; no state, no Ray. grpo/loop.py strings them up."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from grpo.advantages import group_advantages, group_std, normalized_then_summed, zero_variance
from grpo.config import Config
from grpo.losses import token_weights
from grpo.packing import pack
from grpo.records import Group, PackedBatch, Prompt, Sample, TrainingSample
from rewards import RewardInput, Score
from rollout import Completion, SamplingParams
from rollout.draws import seed_of


def sampling_params(config: Config, prompt: Prompt) -> SamplingParams:
    """For training. The seed is a hash of (run.seed, prompt id, visit); each sample's is derived from it."""
    return rollout_params(config, config.grpo.num_generations, seed_of(config.run.seed, prompt.id, prompt.visit))


def rollout_params(config: Config, n: int, seed: int) -> SamplingParams:
    """`n` samples, drawn as the `rollout` section says."""
    rollout = config.rollout
    return SamplingParams(
        n=n,
        temperature=rollout.temperature,
        top_p=rollout.top_p,
        top_k=rollout.top_k,
        min_p=rollout.min_p,
        max_tokens=rollout.max_completion_length,
        seed=seed,
    )


def reward_inputs(
    prompts: Sequence[Prompt], completions: Sequence[Sequence[Completion]], tokenizer: Any
) -> list[RewardInput]:
    """One for each completion, prompt by prompt. Texts are decoded without padding and end tokens."""
    flat = [list(c.token_ids) for group in completions for c in group]
    texts = iter(tokenizer.batch_decode(flat, skip_special_tokens=True))
    return [
        RewardInput(
            prompt=prompt.text,
            completion=next(texts),
            fields=prompt.fields,
            completion_ids=completion.token_ids,
            truncated=completion.finish_reason == "length",
            group=prompt.id,
        )
        for prompt, group in zip(prompts, completions)
        for completion in group
    ]


def make_groups(
    prompts: Sequence[Prompt],
    completions: Sequence[Sequence[Completion]],
    inputs: Sequence[RewardInput],
    scores: Sequence[Score],
) -> list[Group]:
    flat = iter(zip(inputs, scores, strict=True))
    groups = []
    for prompt, group in zip(prompts, completions, strict=True):
        samples = []
        for index, completion in enumerate(group):
            given, score = next(flat)
            samples.append(Sample(prompt, index, completion, given.completion, score))
        groups.append(Group(prompt, tuple(samples)))
    return groups


def reward_matrix(groups: Sequence[Group]) -> np.ndarray:
    """[P, G] float64; NaN where no score applies."""
    rows = [[np.nan if s.score.value is None else s.score.value for s in group.samples] for group in groups]
    return np.array(rows, dtype=np.float64)


def term_matrices(groups: Sequence[Group]) -> dict[str, np.ndarray]:
    """Reward name -> [P, G] of what it counted with; NaN where it does not apply or the sample has no score."""
    names = dict.fromkeys(name for group in groups for s in group.samples for name in s.score.terms)
    scored = ~np.isnan(reward_matrix(groups))
    return {
        name: np.where(
            scored,
            np.array([[s.score.terms.get(name) for s in group.samples] for group in groups], dtype=np.float64),
            np.nan,
        )
        for name in names
    }


def informative(groups: Sequence[Group], config: Config) -> list[Group]:
    """Those whose rewards are not all equal (dynamic sampling, DAPO eq. 11)."""
    if not groups:
        return []
    flat = zero_variance(reward_matrix(groups))
    if config.grpo.multi_objective_aggregation == "normalize_then_sum":
        flat = np.all([zero_variance(terms) for terms in term_matrices(groups).values()] or [flat], axis=0)
    return [group for group, dull in zip(groups, flat) if not dull]


def with_advantages(groups: Sequence[Group], config: Config) -> list[Group]:
    """Fills in each sample's advantage; None where it has no score."""
    if config.grpo.multi_objective_aggregation == "normalize_then_sum":
        terms = {name: term for name, term in term_matrices(groups).items() if config.reward_weights()[name]}
        weights = [config.reward_weights()[name] for name in terms]
        table = normalized_then_summed(list(terms.values()), weights, config.grpo.advantage_estimator)
    else:
        table = group_advantages(reward_matrix(groups), config.grpo.advantage_estimator, config.grpo.scale_rewards)
    return [
        dataclasses.replace(
            group,
            samples=tuple(
                dataclasses.replace(sample, advantage=None if np.isnan(a) else float(a))
                for sample, a in zip(group.samples, row)
            ),
        )
        for group, row in zip(groups, table)
    ]


def pack_step(groups: Sequence[Group], config: Config, version: int = 0) -> list[list[PackedBatch]]:
    """Mini-batches (one optimiser update each, by prompts) of packed micro-batches, with the update's normalisers.

    version: of the current weights; tokens of older ones are marked.
    """
    count = min(config.grpo.minibatches_per_step, len(groups))
    shares = np.array_split(np.arange(len(groups)), count)
    return [_pack_update([groups[i] for i in share], config, version) for share in shares]


def _pack_update(groups: Sequence[Group], config: Config, version: int) -> list[PackedBatch]:
    samples = [sample for group in groups for sample in group.samples]
    masked = config.grpo.mask_truncated_completions
    active = np.array(
        [s.advantage is not None and not (masked and s.completion.finish_reason == "length") for s in samples]
    )
    lengths = np.array([len(s.completion.token_ids) for s in samples])
    weights = iter(token_weights(lengths, config.grpo.loss_type, config.rollout.max_completion_length, active))
    replay = config.rollout.replay_routing
    return pack(
        [
            [
                TrainingSample(
                    prompt_ids=group.prompt.token_ids,
                    completion_ids=sample.completion.token_ids,
                    weight=float(next(weights)),
                    advantage=sample.advantage or 0.0,
                    rollout_logprobs=sample.completion.logprobs,
                    log_support=sample.completion.log_support,
                    routed_experts=sample.completion.routed_experts if replay else None,
                    stale=sample.completion.older_than(version),
                )
                for sample in group.samples
            ]
            for group in groups
        ],
        config.grpo.max_tokens_per_microbatch,
    )


def step_metrics(groups: Sequence[Group], sampled: Sequence[Group]) -> dict[str, float]:
    """Rewards and lengths under TRL's names: over the samples trained on; frac_reward_zero_std over all `sampled`."""
    rewards = reward_matrix(groups)
    samples = [sample for group in groups for sample in group.samples]
    lengths = [len(s.completion.token_ids) for s in samples]
    metrics = {
        "reward": _mean(rewards[~np.isnan(rewards)]),
        "reward_std": _mean(group_std(rewards)),
        "frac_reward_zero_std": float(zero_variance(reward_matrix(sampled)).mean()),
        "completions/mean_length": _mean(lengths),
        "completions/min_length": float(min(lengths)),
        "completions/max_length": float(max(lengths)),
        "completions/clipped_ratio": _mean([s.completion.finish_reason == "length" for s in samples]),
        "rewards/unscored_share": _mean([s.score.value is None for s in samples]),
        "num_tokens": float(sum(lengths)),
    }
    for name in sorted({name for s in samples for name in s.score.parts}):
        parts = [s.score.parts.get(name) for s in samples]
        values = [p for p in parts if p is not None]
        metrics[f"rewards/{name}/mean"] = _mean(values)
        metrics[f"rewards/{name}/std"] = float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
    return metrics


def sample_rows(step: int, groups: Sequence[Group], limit: int) -> list[dict[str, Any]]:
    """Rows of samples.jsonl for at most `limit` samples, whole groups first."""
    samples = [sample for group in groups for sample in group.samples][:limit]
    return [
        {
            "step": step,
            "prompt_id": s.prompt.id,
            "prompt": s.prompt.text if isinstance(s.prompt.text, str) else list(s.prompt.text),
            "sample": s.index,
            "completion": s.text,
            "scores": dict(s.score.parts),
            "reward": s.score.value,
            "status": s.score.status.value,
            "advantage": s.advantage,
            "policy_version": s.policy_version,
            "policy_versions": [list(run) for run in s.completion.policy_versions],
            "finish_reason": s.completion.finish_reason,
            "length": len(s.completion.token_ids),
        }
        for s in samples
    ]


def _mean(values: Any) -> float:
    values = np.asarray(values, dtype=np.float64)
    return float(values.mean()) if values.size else float("nan")
