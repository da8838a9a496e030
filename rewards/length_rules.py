"""Rewards by how long a completion is, in tokens, some of them by whether it is right too.

Without completion_ids they do not apply.
"""

from __future__ import annotations

import importlib
import inspect
import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace

from rewards.records import RewardInput, Score, Status
from rewards.rule import Rule, each, failure
from rewards.worker import WorkerPool

_CHECKERS = {  # what says whether a completion is right, with default options
    "exact_match": "rewards.text_rules",
    "gsm8k_answer": "rewards.gsm8k_answer",
    "math_answer": "rewards.math_answer",
    "multiple_choice": "rewards.multiple_choice",
}


def _positive(name: str, value: int, at_least: int = 1) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < at_least:
        raise ValueError(f"rewards.{name} is {value!r}; give a number of tokens, {at_least} or more")


def length(*, max: int | None = None, target: int | None = None) -> Rule:
    """A penalty from -1 to 0, linear in the number of completion tokens n.

    `max`: -min(1, n / max), shorter is better. `target`: -min(1, |n - target| / target), nearer is better. Combine
    with `gated_by` a correctness reward, or the empty completion wins. ValueError: not exactly one of the two, or not
    positive.
    """
    if (max is None) == (target is None):
        raise ValueError("rewards.length needs exactly one of max and target (tokens)")
    _positive("length.max" if target is None else "length.target", max if target is None else target)  # type: ignore[arg-type]

    def score(sample: RewardInput) -> float | None:
        if sample.completion_ids is None:
            return None
        tokens = len(sample.completion_ids)
        ratio = abs(tokens - target) / target if target is not None else tokens / max  # type: ignore[operator]
        return -min(1.0, ratio)

    return Rule(each(score), bounds=(-1.0, 0.0))


def soft_overlong(*, max_completion_length: int, cache: int) -> Rule:
    """The soft overlong punishment of DAPO (arXiv 2503.14476, eq. 13), from -1 to 0, for n completion tokens.

    0 up to max_completion_length - cache, then linear down to -1 at max_completion_length, -1 beyond. ValueError:
    cache not in [1, max_completion_length].
    """
    _positive("soft_overlong.max_completion_length", max_completion_length)
    _positive("soft_overlong.cache", cache)
    if cache > max_completion_length:
        raise ValueError(
            f"rewards.soft_overlong.cache is {cache}, more than max_completion_length {max_completion_length}; lower it"
        )

    def score(sample: RewardInput) -> float | None:
        if sample.completion_ids is None:
            return None
        over = len(sample.completion_ids) - (max_completion_length - cache)
        return -min(1.0, over / cache) if over > 0 else 0.0

    return Rule(each(score), bounds=(-1.0, 0.0))


def cosine_length(
    *,
    pool: WorkerPool,
    max_len: int,
    correct: str = "math_answer",
    min_value_wrong: float = -1.0,
    max_value_wrong: float = -0.5,
    min_value_correct: float = 0.5,
    max_value_correct: float = 1.0,
) -> Rule:
    """The cosine reward of Demystifying Long Chain-of-Thought Reasoning (arXiv 2502.03373), with open-r1's names.

    With w = (1 + cos(pi * min(n, max_len) / max_len)) / 2, which falls from 1 to 0 with the n completion tokens: a
    right completion gets min_value_correct + w * (max_value_correct - min_value_correct), shorter is better; a wrong
    one max_value_wrong + w * (min_value_wrong - max_value_wrong), longer is better. `correct` names the reward that
    says which is right; it runs with its default options, and where it has no verdict this one has none. It holds
    correctness itself, so it is used instead of that reward, not beside it. ValueError: a bad length, value or name.
    """
    _positive("cosine_length.max_len", max_len)
    wrong, right = (min_value_wrong, max_value_wrong), (min_value_correct, max_value_correct)
    for kind, (low, high) in (("wrong", wrong), ("correct", right)):
        if not all(isinstance(bound, int | float) and math.isfinite(bound) for bound in (low, high)):
            raise ValueError(f"rewards.cosine_length has {low!r} and {high!r} for {kind} answers; give finite numbers")
        if low > high:
            raise ValueError(
                f"rewards.cosine_length.min_value_{kind} is {low!r}, above max_value_{kind} {high!r}; swap them"
            )

    def value(tokens: int, is_right: bool) -> float:
        share = (1 + math.cos(math.pi * min(tokens, max_len) / max_len)) / 2
        if is_right:
            return min_value_correct + share * (max_value_correct - min_value_correct)
        return max_value_wrong + share * (min_value_wrong - max_value_wrong)

    checker = _checker("cosine_length", correct, pool)
    bounds = (float(min(*wrong, *right)), float(max(*wrong, *right)))

    def score(inputs: Sequence[RewardInput]) -> list[Score]:
        return _with_correctness(checker, inputs, lambda sample, is_right: value(_tokens(sample), is_right))

    return Rule(score, checker.needs, bounds, runs=checker.runs)


def group_length(*, pool: WorkerPool, correct: str = "math_answer") -> Rule:
    """The length reward of Kimi k1.5 (arXiv 2501.12599, section 2.3.3), from -0.5 to 0.5, within a group.

    With l = 0.5 - (n - min n) / (max n - min n) over the completions of one prompt: l where the completion is right,
    min(0, l) where it is wrong, 0 for all where all are equally long. `correct` names the reward that says which is
    right; it runs with its default options, and where it has no verdict this one has none. ValueError: another name.
    """
    checker = _checker("group_length", correct, pool)

    def score(inputs: Sequence[RewardInput]) -> list[Score]:
        lengths = defaultdict[str, list[int]](list)
        for sample in inputs:
            if sample.completion_ids is not None:
                lengths[_group(sample)].append(_tokens(sample))

        def value(sample: RewardInput, is_right: bool) -> float:
            shortest, longest = min(lengths[_group(sample)]), max(lengths[_group(sample)])
            if shortest == longest:
                return 0.0
            rank = 0.5 - (_tokens(sample) - shortest) / (longest - shortest)
            return rank if is_right else min(0.0, rank)

        return _with_correctness(checker, inputs, value)

    return Rule(score, checker.needs, (-0.5, 0.5), runs=checker.runs, grouped=True)


def _checker(name: str, correct: str, pool: WorkerPool) -> Rule:
    if correct not in _CHECKERS:
        raise ValueError(f"rewards.{name}.correct is {correct!r}; give one of {', '.join(_CHECKERS)}")
    builder = getattr(importlib.import_module(_CHECKERS[correct]), correct)
    return builder(pool=pool) if "pool" in inspect.signature(builder).parameters else builder()


def _with_correctness(
    checker: Rule, inputs: Sequence[RewardInput], value: Callable[[RewardInput, bool], float]
) -> list[Score]:
    """A Score per input from the checker's: its failures stay what they are."""
    scores = []
    for sample, verdict in zip(inputs, checker.score(inputs), strict=True):
        if sample.completion_ids is None:
            scores.append(failure(Status.NOT_APPLICABLE, "there are no completion_ids"))
        elif verdict.value is None:
            scores.append(verdict)
        else:
            scores.append(replace(verdict, value=value(sample, verdict.value == 1.0)))
    return scores


def _tokens(sample: RewardInput) -> int:
    assert sample.completion_ids is not None
    return len(sample.completion_ids)


def _group(sample: RewardInput) -> str:
    return sample.group or repr(sample.prompt)
