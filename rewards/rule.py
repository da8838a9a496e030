"""What a reward is to the rest of the package: a batch function, the fields it reads, and how one verdict is read."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any, Literal

from rewards.records import RewardInput, Score, Status

Verdict = Score | float | None  # what a rule may say about one sample; None: it does not apply


@dataclass(frozen=True, slots=True)
class Rule:
    """A built reward. `score` returns one Score per input, in order, and raises nothing because of a completion.

    `needs` names the data fields without which it cannot score; they are checked before a run. `bounds`: the lowest
    and highest value it gives; None where nobody knows. `runs`: in this process, in a killable worker, in the code
    sandbox, or on a model; all but inline may be cached, under `version`, which changes when verdicts do. `grouped`:
    it compares the samples of a group, so it sees whole groups and is never cached. `perfect`: a completion that must
    score the upper bound, from a row's fields (None: this row has none); `grpo rewards check` scores it. `check` raises
    ValueError for a row that the reward cannot score. `close` frees what the reward holds.
    """

    score: Callable[[Sequence[RewardInput]], list[Score]]
    needs: frozenset[str] = frozenset()
    bounds: tuple[float, float] | None = None
    runs: Literal["inline", "worker", "sandbox", "model"] = "inline"
    version: str = "1"
    grouped: bool = False
    perfect: Callable[[Mapping[str, Any]], str | None] | None = None
    check: Callable[[Mapping[str, Any]], None] | None = None
    close: Callable[[], None] | None = None


def failure(status: Status, reason: str, queue_s: float = 0.0, run_s: float = 0.0) -> Score:
    """A Score without a value, with its reason."""
    return Score(None, status, info={"reason": reason}, queue_s=queue_s, run_s=run_s)


def as_score(verdict: object) -> Score:
    """A rule's verdict as a Score: a finite number is OK, None is NOT_APPLICABLE, anything else is an ERROR."""
    if isinstance(verdict, Score):
        return verdict
    if verdict is None:
        return failure(Status.NOT_APPLICABLE, "the reward returned None")
    if not isinstance(verdict, Real):
        return failure(Status.ERROR, f"returned {verdict!r:.80}; a reward returns a float or None")
    if not math.isfinite(verdict):
        return failure(Status.ERROR, f"returned {verdict!r}; a reward must be finite")
    return Score(float(verdict))


def each(rule: Callable[[RewardInput], Verdict]) -> Callable[[Sequence[RewardInput]], list[Score]]:
    """A batch function from a function of one sample. An exception becomes an ERROR for that sample alone."""

    def score(inputs: Sequence[RewardInput]) -> list[Score]:
        scores = []
        for sample in inputs:
            start = time.perf_counter()
            try:
                verdict = as_score(rule(sample))
            except Exception as error:  # the reward boundary: one bad sample must not stop the batch, nor score 0
                verdict = failure(Status.ERROR, f"{type(error).__name__}: {error}")
            scores.append(replace(verdict, run_s=time.perf_counter() - start))
        return scores

    return score
