"""The GRPO loop, the table of contents of the project.

    cursor --prompts--> rollout --completions--> rewards --scores--> advantages --> packing --batches--> learner
                           ^                                                                               |
                           +----------------------------- weights, a whole version ------------------------+

Synchronous: rollout waits for the weights of the step before, rewards for all completions of a step, the learner for
all scores (grpo/partial.py: what a step need not wait for). The roles (learner, rollout, rewards) are reached through
grpo.cluster, in this process or as Ray actors; the loop cannot tell which.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from grpo.alarms import Alarms
from grpo.cluster import Cluster
from grpo.config import Config
from grpo.evaluate import accuracy
from grpo.log import RunLog
from grpo.partial import Rollouts
from grpo.progress import Progress
from grpo.records import Group, Prompt
from grpo.router import rollout_counts
from grpo.steps import (
    informative,
    make_groups,
    pack_step,
    reward_inputs,
    sample_rows,
    step_metrics,
    with_advantages,
)
from rewards import raise_if_failing


@dataclass(frozen=True)
class Run:
    """What the loop works with."""

    config: Config
    cluster: Cluster
    rollouts: Rollouts
    held_out: Sequence[Prompt]
    tokenizer: Any
    log: RunLog
    progress: Progress
    alarms: Alarms
    save: Callable[[int], None]  # writes the checkpoint of a step


def run_loop(run: Run, first_step: int) -> None:
    """Steps first_step .. max_steps; step 0 is the evaluation before training."""
    config, cluster = run.config, run.cluster
    if first_step == 0:
        log_step(run, 0, {"policy_version": 0} | evaluate(run, 0), [])
        first_step = 1
    for step in range(first_step, config.grpo.max_steps + 1):
        clock, groups, sampled = Clock(), [], []
        for _ in range(1 + (config.grpo.max_refills if config.grpo.dynamic_sampling else 0)):
            with clock("rollout"):
                prompts, completions = run.rollouts.sample(config.grpo.prompts_per_step - len(groups))
            with clock("rewards"):
                inputs = reward_inputs(prompts, completions, run.tokenizer)
                scores = cluster.score(inputs)
            raise_if_failing(scores, config.grpo.max_error_share)
            sampled += make_groups(prompts, completions, inputs, scores)
            groups = informative(sampled, config) if config.grpo.dynamic_sampling else sampled
            if len(groups) == config.grpo.prompts_per_step:
                break
        groups = with_advantages(groups or sampled, config)
        minibatches = pack_step(groups, config, cluster.version)
        staleness = run.rollouts.metrics(groups)
        counts = rollout_counts(sampled) if config.grpo.router_policy == "rollout" else None
        with clock("learner"):
            stats = cluster.learn(minibatches, counts)
        with clock("sync"):
            synced = cluster.sync_weights(stats.policy_version)
        metrics = {"policy_version": stats.policy_version, **step_metrics(groups, sampled), **stats.metrics, **synced}
        metrics |= staleness
        metrics |= clock.metrics() | evaluate(run, step)
        log_step(run, step, metrics, groups)
        if step == config.grpo.max_steps or (config.run.save_steps and step % config.run.save_steps == 0):
            run.save(step)


def evaluate(run: Run, step: int) -> dict[str, float]:
    """{"eval/accuracy": greedy held-out accuracy} at step 0, every eval_steps and at the end; else nothing."""
    every = run.config.run.eval_steps
    due = step in (0, run.config.grpo.max_steps) or (every > 0 and step % every == 0)
    if not due or not run.held_out:
        return {}
    return {"eval/accuracy": accuracy(run.config, run.cluster, run.held_out, run.tokenizer)}


def log_step(run: Run, step: int, metrics: dict[str, float], groups: Sequence[Group]) -> None:
    run.log.samples(sample_rows(step, groups, run.config.run.log_samples))
    run.log.metrics({"step": step, **metrics})
    run.progress.step({"step": step, **metrics})
    for line in run.alarms.check({"step": step, **metrics}):
        run.progress.warn(line)


class Clock:
    """Seconds of each stage of a step."""

    def __init__(self) -> None:
        self.start = time.perf_counter()
        self.seconds: dict[str, float] = dict.fromkeys(("rollout", "rewards", "learner", "sync"), 0.0)

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[stage] += time.perf_counter() - start

    def metrics(self) -> dict[str, float]:
        step_time = time.perf_counter() - self.start
        return {f"time/{stage}": seconds for stage, seconds in self.seconds.items()} | {"step_time": step_time}
