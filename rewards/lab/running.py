"""Running rewards over the lab's samples: in batches of whole groups, as a step would, timed; and in other ways."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rewards.compose import Rewards
from rewards.records import RewardInput, Score

BATCH = 512  # samples scored at a time, about a GRPO step's
TRIED = 256  # samples of the determinism checks
SAME = 1e-6  # scores no further apart are equal

Progress = Callable[[str, int, int], None]  # what is done, samples done, samples in all


@dataclass(frozen=True, slots=True)
class Scored:
    """A reward's scores, one per sample, and the seconds they took."""

    scores: Sequence[Score]
    seconds: float

    def values(self) -> np.ndarray:
        """[n] float64; NaN where there is none."""
        return values_of(self.scores)


def values_of(scores: Sequence[Score]) -> np.ndarray:
    """[n] float64; NaN where there is no value."""
    return np.array([np.nan if score.value is None else score.value for score in scores], dtype=np.float64)


def score_all(rewards: Rewards, inputs: Sequence[RewardInput], progress: Progress) -> dict[str, Scored]:
    """Every reward by itself over all samples, one reward after the other so that their times are their own."""
    batches = _batches(_groups(inputs), BATCH)
    results = {}
    for name in rewards.parts:
        scores: list[Score | None] = [None] * len(inputs)
        seconds, done = 0.0, 0
        for batch in batches:
            progress(name, done, len(inputs))
            start = time.perf_counter()
            answers = rewards.part_scores([inputs[place] for place in batch], [name])[name]
            seconds += time.perf_counter() - start
            for place, answer in zip(batch, answers):
                scores[place] = answer
            done += len(batch)
        progress(name, done, len(inputs))
        results[name] = Scored([score for score in scores if score is not None], seconds)
    return results


def determinism(
    build: Callable[[int], Rewards],
    inputs: Sequence[RewardInput],
    first: Mapping[str, Scored],
    workers: int,
    repeat: int,
    progress: Progress,
) -> dict[str, list[dict[str, Any]]]:
    """Whether scores depend on what they should not: order, batch size, number of workers, chance (`repeat` scorings).

    The first three on at most TRIED samples, whole groups; they cost a model-based reward real calls, so it gets them
    only with `repeat` above 1. `build(workers)` makes the rewards anew, without a cache.
    """
    groups = _groups(inputs)
    order = np.random.default_rng(0).permutation(len(groups))
    tried: list[list[int]] = []
    for index in order:
        if tried and sum(map(len, tried)) + len(groups[index]) > TRIED:
            break
        tried.append(groups[index])
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in first}
    fewer = 1 if workers > 1 else 2
    with build(workers) as same, build(fewer) as other:
        for name, part in same.parts.items():

            def record(
                check: str, detail: str, again: Rewards, batches: Sequence[Sequence[int]], name: str = name
            ) -> None:
                found[name].append(
                    {"check": check, "detail": detail, **_compare(again, name, inputs, first[name].scores, batches)}
                )
                progress(f"{name}: {check}", 0, 0)

            units = tried if part.rule.grouped else [[place] for places in tried for place in places]
            if part.rule.runs != "model" or repeat > 1:
                shuffled = [units[i] for i in np.random.default_rng(1).permutation(len(units))]
                what = "group" if part.rule.grouped else "sample"
                record("order", f"{what}s in another order", same, _batches(shuffled, TRIED))
                record("batch size", f"1 {what} at a time", same, units)
                record("batch size", "32 samples at a time", same, _batches(units, 32))
                if part.rule.runs in ("worker", "sandbox"):
                    record("workers", f"{fewer} instead of {workers}", other, _batches(units, TRIED))
            for number in range(2, repeat + 1):
                record("repeat", f"scoring {number} of {repeat}", same, _batches(groups, BATCH))
    return found


def _compare(
    rewards: Rewards,
    name: str,
    inputs: Sequence[RewardInput],
    before: Sequence[Score],
    batches: Sequence[Sequence[int]],
) -> dict[str, Any]:
    """How many scores change, by how much at most, and how many get another status."""
    flips, statuses, largest, samples = 0, 0, 0.0, 0
    for batch in batches:
        for place, now in zip(batch, rewards.part_scores([inputs[place] for place in batch], [name])[name]):
            samples += 1
            was = before[place]
            statuses += now.status is not was.status
            if now.value is not None and was.value is not None:
                difference = abs(now.value - was.value)
                largest = max(largest, difference)
                flips += difference > SAME
    return {"samples": samples, "flips": flips, "status_flips": statuses, "max_difference": largest}


def _groups(inputs: Sequence[RewardInput]) -> list[list[int]]:
    groups: dict[str, list[int]] = {}
    for place, sample in enumerate(inputs):
        groups.setdefault(sample.group, []).append(place)
    return list(groups.values())


def _batches(units: Sequence[Sequence[int]], size: int) -> list[list[int]]:
    """Units joined to batches of at most `size` samples; a unit is never cut."""
    batches: list[list[int]] = [[]]
    for unit in units:
        if batches[-1] and len(batches[-1]) + len(unit) > size:
            batches.append([])
        batches[-1].extend(unit)
    return batches
