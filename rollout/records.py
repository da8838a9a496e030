"""Records of the rollout package: what goes into an engine and what comes out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np


class WeightFault(RuntimeError):
    """An engine does not compute with the weights that it was given; the message names the first wrong tensor."""


@dataclass(frozen=True, slots=True)
class Rerouted:
    """An engine's canary prompts where its routers chose other experts than the learner's, as near ties do in low
    precision: to be judged by the learner with these routes."""

    logprobs: tuple[tuple[float, ...], ...]  # of each prompt's tokens but the first, at temperature 1
    routed_experts: tuple[np.ndarray, ...]  # [tokens, MoE layers, K] of each prompt
    cap: float  # mean difference that its precision allows


def check_base(held: int, version: int, base: int | None) -> None:
    """ValueError where the changes from version `base` to `version` do not fit an engine that holds version `held`."""
    if base is not None and held not in (base, version):  # changes hold the new values: applied twice, they stay true
        raise ValueError(
            f"weights of version {version} came as the changes since {base}, but the engine holds {held}; "
            "send it every tensor"
        )


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to sample one prompt. Field names and meanings are vLLM's.

    A draw is a function of (seed, sample index, position) alone, never of engine state or of what else is in the
    batch. `seed=None` takes fresh entropy from the operating system.
    """

    n: int = 1  # samples for the prompt
    temperature: float = 1.0  # 0: greedy
    top_p: float = 1.0  # 1: off
    top_k: int = 0  # 0 or -1: off
    min_p: float = 0.0  # 0: off
    max_tokens: int = 16
    seed: int | None = None
    stop_token_ids: tuple[int, ...] = ()  # in addition to the engine's end-of-sequence tokens
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        checks = [
            ("n", self.n >= 1, "at least 1"),
            ("temperature", self.temperature >= 0, "0 (greedy) or more"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("top_k", self.top_k >= -1, "-1 or 0 (off) or more"),
            ("min_p", 0 <= self.min_p <= 1, "between 0 and 1"),
            ("max_tokens", self.max_tokens >= 1, "at least 1"),
        ]
        for name, ok, want in checks:
            if not ok:
                raise ValueError(f"SamplingParams.{name} is {getattr(self, name)}; it must be {want}")


def check_prompt(name: str, prompt: Sequence[int], params: SamplingParams, vocab_size: int, max_model_len: int) -> None:
    """ValueError, which calls the prompt `name`, unless an engine of these sizes can sample it."""
    if not len(prompt):
        raise ValueError(f"{name} is empty; give at least one token")
    if min(prompt) < 0 or max(prompt) >= vocab_size:
        raise ValueError(f"{name} has a token id outside 0 .. {vocab_size - 1}")
    if len(prompt) + params.max_tokens > max_model_len:
        raise ValueError(
            f"{name} has {len(prompt)} tokens, and with max_tokens {params.max_tokens} that is more than "
            f"the context of {max_model_len}; shorten it or lower max_tokens"
        )


@dataclass(frozen=True, slots=True)
class Completion:
    """One sampled completion. T = len(token_ids); the stop token, where one was drawn, is the last token.

    logprobs     log-softmax(logits / temperature) of each sampled token, untruncated (temperature 0: of the raw logits)
    log_support  log of the mass that top-p, top-k and min-p kept; a token was drawn with probability
                 exp(logprobs - log_support). 0 without truncation.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]  # [T]
    log_support: tuple[float, ...]  # [T]
    finish_reason: Literal["stop", "length", "abort"]  # abort: stopped on the way, to go on later; T may then be 0
    policy_version: int  # the newest that sampled some of it
    # [len(prompt) + T - 1, MoE layers, K] expert indices of each token that went through the model; None unless asked.
    # Of a sample that went on under newer weights: theirs, as they computed its beginning again
    routed_experts: np.ndarray | None = field(default=None, compare=False)
    older: tuple[tuple[int, int], ...] = ()  # (version, tokens) of each stretch at the start that older weights sampled

    @property
    def policy_versions(self) -> tuple[tuple[int, int], ...]:
        """(version, tokens) of each stretch in order; they add up to T."""
        rest = len(self.token_ids) - sum(count for _, count in self.older)
        return (*self.older, (self.policy_version, rest)) if rest else self.older

    def older_than(self, version: int) -> int:
        """How many tokens weights before `version` sampled; they come first."""
        return sum(count for sampler, count in self.policy_versions if sampler < version)

    def extended(
        self,
        token_ids: tuple[int, ...],
        logprobs: tuple[float, ...],
        log_support: tuple[float, ...],
        finish_reason: Literal["stop", "length", "abort"],
        policy_version: int,
        routed_experts: np.ndarray | None = None,
    ) -> Completion:
        """This unfinished one with what weights of `policy_version` sampled after it. The routes are of the whole."""
        if not token_ids:
            return self
        return Completion(
            self.token_ids + token_ids,
            self.logprobs + logprobs,
            self.log_support + log_support,
            finish_reason,
            policy_version,
            routed_experts,
            tuple(run for run in self.policy_versions if run[0] != policy_version),
        )


NOTHING = Completion((), (), (), "abort", 0)


def complete(group: Sequence[Completion]) -> bool:
    """Whether no sample of a group was stopped on the way."""
    return all(completion.finish_reason != "abort" for completion in group)


def begun_samples(begun: Sequence[Completion], params: SamplingParams) -> list[Completion]:
    """The `n` samples that a request starts from, NOTHING each unless it was begun. ValueError for others than its."""
    if not begun:
        return [NOTHING] * params.n
    if len(begun) != params.n or complete(begun):
        finished = sum(sample.finish_reason != "abort" for sample in begun)
        raise ValueError(
            f"a request with n={params.n} cannot go on from {len(begun)} samples, {finished} of them finished; "
            "give every sample as abort returned it"
        )
    return list(begun)
