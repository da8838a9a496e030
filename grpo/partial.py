"""Partial rollouts: a step works on more prompts than it needs, and what it leaves unfinished goes first in the next.

    left over, then new prompts --> engines --> the first groups that are complete --> the step
        ^                              |
        +------- the others, as far as they got, until the engines have new weights

So the step waits for no long answer (Kimi k1.5, 2501.12599, section 2.6.2; APRIL, 2509.18521). Invariant: every prompt
that the cursor hands out comes back once, complete, whatever was stopped, saved and resumed in between. The tokens of a
sample are then of several versions of the weights; each keeps the log-probability of the one that sampled it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from grpo.cluster import Cluster
from grpo.config import Config
from grpo.data import PromptCursor
from grpo.records import Group, Prompt
from grpo.steps import sampling_params
from rollout import Completion
from rollout.records import complete

Begun = tuple[Prompt, Sequence[Completion]]  # a prompt and its samples as far as they got; none yet: ()


class Rollouts:
    """Prompts and completions for the steps of a run. Without rollout.over_sampling_batch_size nothing is left over."""

    def __init__(self, config: Config, cluster: Cluster, cursor: PromptCursor) -> None:
        self.config, self.cluster, self.cursor = config, cluster, cursor
        self.left: list[Begun] = []

    def sample(self, wanted: int) -> tuple[list[Prompt], list[list[Completion]]]:
        """`wanted` prompts and their completions."""
        under_way = max(self.config.rollout.over_sampling_batch_size, wanted)
        work = [*self.left, *((prompt, ()) for prompt in self.cursor.take(max(0, under_way - len(self.left))))]
        prompts = [prompt for prompt, _ in work]
        params = [sampling_params(self.config, prompt) for prompt in prompts]
        if len(work) == wanted and not self.left:
            return prompts, self.cluster.sample([p.token_ids for p in prompts], params)
        done = [at for at, (_, begun) in enumerate(work) if begun and complete(begun)]  # more than a step could take
        open_ = [at for at in range(len(work)) if at not in set(done)]
        answers = self.cluster.collect(
            [(prompts[at].token_ids, params[at]) for at in open_],
            [work[at][1] for at in open_],
            max(0, wanted - len(done)),
        )
        for at, answer in zip(open_, answers, strict=True):
            work[at] = prompts[at], answer
        taken = [at for at, (_, group) in enumerate(work) if group and complete(group)][:wanted]
        self.left = [pair for at, pair in enumerate(work) if at not in set(taken)]
        return [prompts[at] for at in taken], [list(work[at][1]) for at in taken]

    def metrics(self, groups: Sequence[Group]) -> dict[str, float]:
        """Of the samples of a step: how much of them older weights sampled. Nothing without partial rollouts."""
        if not self.config.rollout.over_sampling_batch_size:
            return {}
        version = self.cluster.version
        samples = [sample.completion for group in groups for sample in group.samples]
        tokens = sum(len(sample.token_ids) for sample in samples)
        return {
            "sampling/stale_tokens": sum(sample.older_than(version) for sample in samples) / max(tokens, 1),
            "sampling/max_staleness": float(max(version - sample.policy_versions[0][0] for sample in samples)),
            "rollout/unfinished_groups": float(len(self.left)),
        }

    def save(self, path: Path) -> None:
        """Writes what is left over, exactly."""
        samples = [sample for _, group in self.left for sample in group]
        table: dict[str, Any] = {
            "prompts": np.array([prompt.id for prompt, _ in self.left], dtype=np.str_),
            "visits": np.array([prompt.visit for prompt, _ in self.left], dtype=np.int64),
            "samples": np.array([len(group) for _, group in self.left], dtype=np.int64),
            "tokens": np.array([len(sample.token_ids) for sample in samples], dtype=np.int64),
            "reasons": np.array([sample.finish_reason for sample in samples], dtype=np.str_),
            "versions": np.array([sample.policy_version for sample in samples], dtype=np.int64),
            "older": np.array([len(sample.older) for sample in samples], dtype=np.int64),
            "runs": np.array([run for sample in samples for run in sample.older], dtype=np.int64).reshape(-1, 2),
        }
        for name, kind in _TOKENS.items():
            table[name] = np.array([value for sample in samples for value in getattr(sample, name)], dtype=kind)
        for number, sample in enumerate(samples):
            if sample.routed_experts is not None:
                table[f"routes_{number}"] = sample.routed_experts
        with path.open("wb") as file:
            np.savez(file, **table)

    def load(self, path: Path) -> None:
        """Goes on from what `save` wrote; a file that is not there leaves nothing over."""
        if not path.is_file():
            return
        with np.load(path, allow_pickle=False) as file:
            table = dict(file)
        columns = {name: _cut(table[name].tolist(), table["tokens"]) for name in _TOKENS}
        runs = _cut([(version, count) for version, count in table["runs"].tolist()], table["older"])
        samples = [
            Completion(
                finish_reason=str(table["reasons"][number]),  # type: ignore[arg-type]
                policy_version=int(table["versions"][number]),
                routed_experts=table.get(f"routes_{number}"),
                older=runs[number],
                **{name: columns[name][number] for name in _TOKENS},
            )
            for number in range(len(table["tokens"]))
        ]
        prompts = [self.cursor.prompt(str(i), int(v)) for i, v in zip(table["prompts"], table["visits"], strict=True)]
        self.left = list(zip(prompts, _cut(samples, table["samples"]), strict=True))


_TOKENS = {"token_ids": np.int64, "logprobs": np.float64, "log_support": np.float64}


def _cut(values: Sequence[Any], counts: np.ndarray) -> list[tuple[Any, ...]]:
    """Consecutive pieces of these lengths."""
    ends = np.cumsum(counts)
    return [tuple(values[end - count : end]) for end, count in zip(ends, counts)]
