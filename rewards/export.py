"""Our rewards in other trainers: a reward function for TRL, a compute_score function for verl.

Both build the rewards at once, so that a bad option is found where it is written, and again in each process that gets
a copy; worker processes start with the first batch.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rewards.build import build_rewards
from rewards.compose import Rewards, raise_if_failing
from rewards.records import RewardInput, Score, Status

log = logging.getLogger(__name__)

_NOT_FIELDS = ("trainer_state", "log_extra", "log_metric", "environments")  # of what TRL hands a reward function


def as_trl(
    rewards: Mapping[str, Any] | Rewards,
    *,
    name: str = "rewards",
    answer_column: str = "answer",
    max_error_share: float = 1.0,
    **options: Any,
) -> Callable[..., list[float | None]]:
    """A reward function for TRL's trainers: `reward_funcs=as_trl({"math_answer": 1.0, "format_tags": 0.1})`.

    Gives the weighted total of each completion, None where there is none (not applicable, or a failure, which is
    logged as a warning). `name`: TRL's name for it. `answer_column`: the data's column of the gold answer. The parts
    go to log_extra (one value per completion) and their means to log_metric, as `name/part`, with
    `name/error_share`. More errors than `max_error_share` of a batch raise RewardFailure. It can be pickled if
    `rewards` is a configuration section; `options` are those of build_rewards. ValueError as there, and in the first
    batch for a column that the data lack.
    """
    if isinstance(rewards, Rewards) and options:
        raise ValueError(f"as_trl: {sorted(options)} come too late for rewards that are built; give the mapping")
    return _TrlReward(_Source(rewards, options), name, answer_column, max_error_share)


def as_verl(
    rewards: Mapping[str, Any] | Rewards,
    *,
    failure_score: float = 0.0,
    asynchronous: bool = False,
    **options: Any,
) -> Callable[..., Any]:
    """A `compute_score` for verl (custom_reward_function.path names the file that holds it, .name the variable).

    The gold answer is verl's ground_truth; data_source, extra_info and what is in extra_info are further fields, and
    the prompt is extra_info["question"] where there is one. Gives {"score", "error", and each part's value}, the same
    keys for every sample. verl knows no missing score: where there is none, `score` is `failure_score` and `error`
    says why, else it is "". A missing part is NaN. `asynchronous`: a coroutine function. ValueError: as build_rewards,
    and for rewards that compare the samples of a group, which verl hands over one by one.
    """
    source = _Source(rewards, options)
    parts = source.get().parts
    for part in parts:
        if part in ("score", "error"):
            raise ValueError(f"as_verl: a reward named {part!r} would hide verl's own key; give it another name")
        if parts[part].rule.grouped:
            raise ValueError(f"as_verl: {part} compares the samples of a group, and verl hands them over one by one")

    def score(data_source: Any, solution_str: str, ground_truth: Any, extra_info: Any) -> dict[str, Any]:
        extra_info = dict(extra_info or {})
        fields = {**extra_info, "extra_info": extra_info, "data_source": data_source, "answer": ground_truth}
        [total] = source.get().score([RewardInput(extra_info.get("question", ""), solution_str, fields)])
        _warn("compute_score", [total])
        values = {part: float("nan") if value is None else value for part, value in total.parts.items()}
        value = failure_score if total.value is None else total.value
        return {"score": value, "error": "" if total.value is not None else _reason(total), **values}

    if asynchronous:

        async def compute_score_async(
            data_source: Any, solution_str: str, ground_truth: Any, extra_info: Any = None, **_: Any
        ) -> dict[str, Any]:
            return await asyncio.to_thread(score, data_source, solution_str, ground_truth, extra_info)

        return compute_score_async

    def compute_score(
        data_source: Any, solution_str: str, ground_truth: Any, extra_info: Any = None, **_: Any
    ) -> dict[str, Any]:
        return score(data_source, solution_str, ground_truth, extra_info)

    return compute_score


class _Source:
    """Where a process gets its rewards from: built once in each, and after a fork anew."""

    def __init__(self, rewards: Mapping[str, Any] | Rewards, options: Mapping[str, Any]) -> None:
        self._mapping = None if isinstance(rewards, Rewards) else rewards
        self._options = dict(options)
        self._lock, self._pid = threading.Lock(), os.getpid()
        self._built = rewards if isinstance(rewards, Rewards) else build_rewards(rewards, **options)

    def get(self) -> Rewards:
        with self._lock:
            if self._built is None or self._pid != os.getpid():
                if self._mapping is None:
                    raise ValueError("rewards that are built stay in their process; give as_trl or as_verl the mapping")
                self._built, self._pid = build_rewards(self._mapping, **self._options), os.getpid()
            return self._built

    def __getstate__(self) -> dict[str, Any]:
        if self._mapping is None:
            raise TypeError("rewards that are built cannot be pickled; give as_trl the mapping they are built from")
        return {"mapping": self._mapping, "options": self._options}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        self._mapping, self._options = state["mapping"], state["options"]
        self._lock, self._pid, self._built = threading.Lock(), os.getpid(), None


class _TrlReward:
    """A class, as TRL pickles reward functions for its workers, and closures cannot be pickled."""

    def __init__(self, source: _Source, name: str, answer_column: str, max_error_share: float) -> None:
        self.__name__ = name
        self._source, self._answer_column, self._max_error_share = source, answer_column, max_error_share

    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        completion_ids: Sequence[Sequence[int]] | None = None,
        log_extra: Callable[[str, list[Any]], None] | None = None,
        log_metric: Callable[[str, float], None] | None = None,
        **columns: Any,
    ) -> list[float | None]:
        inputs = []
        for i, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
            fields = {key: values[i] for key, values in columns.items() if key not in _NOT_FIELDS}
            if self._answer_column in fields:
                fields["answer"] = fields[self._answer_column]
            ids = None if completion_ids is None else completion_ids[i]
            inputs.append(RewardInput(prompt, _text(completion), fields, ids, group=repr(prompt)))
        rewards = self._source.get()
        if inputs:
            rewards.check(inputs[0].fields)
        scores = rewards.score(inputs)
        raise_if_failing(scores, self._max_error_share)
        self._report(rewards, scores, log_extra, log_metric)
        return [score.value for score in scores]

    def _report(
        self,
        rewards: Rewards,
        scores: Sequence[Score],
        log_extra: Callable[[str, list[Any]], None] | None,
        log_metric: Callable[[str, float], None] | None,
    ) -> None:
        _warn(self.__name__, scores)
        for part in rewards.parts:
            values = [score.parts[part] for score in scores]
            known = [value for value in values if value is not None]
            if log_extra is not None:
                log_extra(f"{self.__name__}/{part}", values)
            if log_metric is not None and known:
                log_metric(f"{self.__name__}/{part}", sum(known) / len(known))
        if log_metric is not None:
            log_metric(f"{self.__name__}/error_share", sum(map(_failed, scores)) / max(1, len(scores)))


def _text(completion: Any) -> str:
    """The text of a completion that may be a message list: the last message's, its text blocks joined."""
    if isinstance(completion, str):
        return completion
    content = completion[-1].get("content") or "" if completion else ""
    return content if isinstance(content, str) else "".join(block.get("text", "") for block in content)


def _failed(score: Score) -> bool:
    return score.value is None and score.status is not Status.NOT_APPLICABLE


def _reason(score: Score) -> str:
    """Why a total has no value: the status, and the reason of the first part that gives one."""
    reasons = [f"{part}: {info['reason']}" for part, info in score.info.items() if info.get("reason")]
    return ": ".join([str(score.status), *reasons[:1]])


def _warn(name: str, scores: Sequence[Score]) -> None:
    reasons = Counter(_reason(score) for score in scores if _failed(score))
    if reasons:
        log.warning(
            "%s: no score for %d of %d completions; most often %s",
            name,
            sum(reasons.values()),
            len(scores),
            reasons.most_common(1)[0][0],
        )
