"""Several rewards as one: weights, gates, clipping, routing by a column, the total, and the circuit breaker."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from rewards.cache import RewardCache
from rewards.records import RewardInput, Score, Status
from rewards.rule import Rule, failure
from rewards.worker import WorkerPool

_WORST_FIRST = (Status.ERROR, Status.TIMEOUT, Status.UNPARSEABLE_GOLD, Status.NOT_APPLICABLE)


class RewardFailure(RuntimeError):
    """Rewards failed on too many samples for the run to be trusted."""


@dataclass(frozen=True, slots=True)
class Part:
    """One reward of the mapping."""

    rule: Rule
    weight: float = 1.0
    gated_by: str | None = None  # counts only where that reward is above 0; where it is not, this one adds 0
    clip: tuple[float, float] | None = None  # what counts is kept within
    when: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)  # column -> its values in rows it applies to

    def bounds(self) -> tuple[float, float]:
        """Lowest and highest value that can count; infinite where nobody knows."""
        low, high = self.rule.bounds or (-math.inf, math.inf)
        if self.clip is not None:
            low, high = (min(max(bound, self.clip[0]), self.clip[1]) for bound in (low, high))
        return low, high

    def counts_in(self, fields: Mapping[str, Any]) -> bool:
        """Whether the row is one that this reward is for."""
        return all(fields.get(column) in values for column, values in self.when.items())


class Rewards:
    """What build_rewards returns. Safe to use from any thread; a worker pool is shared by all parts."""

    def __init__(
        self, parts: Mapping[str, Part], pool: WorkerPool, max_error_share: float, cache: RewardCache | None = None
    ) -> None:
        self.parts = dict(parts)
        self.max_error_share = max_error_share
        self._pool, self._cache = pool, cache

    @property
    def weights(self) -> dict[str, float]:
        """Reward name -> weight."""
        return {name: part.weight for name, part in self.parts.items()}

    def highest(self) -> float:
        """No total is above this; infinite where a reward that counts does not know its bounds."""
        tops = [max(part.weight * b for b in part.bounds()) for part in self.parts.values() if part.weight]
        return sum(max(0.0, top) for top in tops)  # 0: what does not apply, or has a shut gate, adds nothing

    def needs(self) -> set[str]:
        """Every data field that some reward cannot do without."""
        return {name for part in self.parts.values() for name in (*part.rule.needs, *part.when)}

    def check(self, fields: Mapping[str, Any] | Iterable[str]) -> None:
        """Raise ValueError naming the reward and the field that the data lack, or what it cannot score in the row.

        Given a row, a reward may lack the fields of rows that it is not for; given names alone, it needs them all.
        """
        have = set(fields)
        for name, part in self.parts.items():
            for column in sorted(part.when.keys() - have):
                raise ValueError(f"rewards.{name}.when names the column {column!r}, the data have {sorted(have)}")
            if isinstance(fields, Mapping) and not part.counts_in(fields):
                continue
            for missing in sorted(part.rule.needs - have):
                raise ValueError(
                    f"rewards.{name} needs the data field {missing!r}, the data have {sorted(have)}; "
                    "set data.answer_column or add the column"
                )
            if isinstance(fields, Mapping) and part.rule.check is not None:
                try:
                    part.rule.check(fields)
                except ValueError as error:
                    raise ValueError(f"rewards.{name}: {error}") from None

    def score(self, inputs: Sequence[RewardInput]) -> list[Score]:
        """One total per input, in order.

        value: sum of weight * term over the parts that apply; terms: what each counted with, unweighted; parts: every
        part's own value; info: {part: {"status", its own "parts" if it has some, ...}}. A NOT_APPLICABLE part is left
        out. A part of non-zero weight that failed (ERROR, TIMEOUT, UNPARSEABLE_GOLD) makes the total that status
        without a value: a sample is never scored lower because a grader broke. A part of weight 0 is only watched.
        """
        return self.totals(self.part_scores(inputs))

    def part_scores(self, inputs: Sequence[RewardInput], names: Iterable[str] = ()) -> dict[str, list[Score]]:
        """Each part by itself (all, or those named), before gates and clipping: one Score per input, in order."""
        chosen = {name: self.parts[name] for name in names or self.parts}
        waiting = [name for name, part in chosen.items() if part.rule.runs != "inline"]
        with ThreadPoolExecutor(max(1, len(waiting))) as threads:  # they wait for processes or servers, side by side
            futures = {name: threads.submit(_run, name, chosen[name], inputs) for name in waiting}
            columns = {name: _run(name, part, inputs) for name, part in chosen.items() if name not in futures}
            return columns | {name: future.result() for name, future in futures.items()}

    def totals(self, columns: Mapping[str, Sequence[Score]]) -> list[Score]:
        """What `score` gives, from the scores of all parts."""
        rows = zip(*(columns[name] for name in self.parts), strict=True)
        return [self._total(dict(zip(self.parts, row))) for row in rows]

    def close(self) -> None:
        """Stop the worker processes and whatever else the rewards hold."""
        for part in self.parts.values():
            if part.rule.close is not None:
                part.rule.close()
        self._pool.close()
        if self._cache is not None:
            self._cache.close()

    def __enter__(self) -> Rewards:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _total(self, scores: Mapping[str, Score]) -> Score:
        terms: dict[str, float | None] = {}
        statuses = set[Status]()
        info: dict[str, dict[str, Any]] = {}
        for name, part in self.parts.items():
            score = scores[name]
            info[name] = {"status": str(score.status), **score.info}
            if score.parts:
                info[name]["parts"] = dict(score.parts)
            if not part.weight:
                continue
            value, status = score.value, score.status
            if part.gated_by is not None and not info[name].get("routed_away"):
                gate = scores[part.gated_by]
                if gate.value is None:
                    info[name]["gate"], value, status = str(gate.status), None, gate.status
                elif gate.value > 0:
                    info[name]["gate"] = "open"
                else:  # the part adds 0 whatever it would have said
                    info[name]["gate"], value, status = "shut", 0.0, Status.OK
            if value is not None and part.clip is not None and info[name].get("gate") != "shut":
                value = min(max(value, part.clip[0]), part.clip[1])
            terms[name] = value
            statuses.add(status)
        failed = [status for status in _WORST_FIRST if status in statuses]
        if failed and (failed[0] is not Status.NOT_APPLICABLE or Status.OK not in statuses):
            total, status = None, failed[0]
        else:
            total = sum(self.parts[name].weight * value for name, value in terms.items() if value is not None)
            status = Status.OK
        return Score(
            None if total is None else float(total),
            status,
            parts={name: score.value for name, score in scores.items()},
            terms=terms,
            info=info,
            queue_s=sum(score.queue_s for score in scores.values()),
            run_s=sum(score.run_s for score in scores.values()),
        )


def error_share(scores: Sequence[Score]) -> float:
    """The share of scores that failed by ERROR or TIMEOUT: the grader's failures, not the completion's."""
    return sum(score.status in (Status.ERROR, Status.TIMEOUT) for score in scores) / max(1, len(scores))


def raise_if_failing(scores: Sequence[Score], max_error_share: float) -> None:
    """The circuit breaker, for the loop to call on a batch: RewardFailure if more than that share failed.

    A single failed sample never stops a run, however small the batch.
    """
    failed = [score for score in scores if score.status in (Status.ERROR, Status.TIMEOUT)]
    if len(failed) < 2 or error_share(scores) <= max_error_share:
        return
    reasons = Counter(
        f"{name}: {part.get('reason', part['status'])}"
        for score in failed
        for name, part in score.info.items()
        if isinstance(part, Mapping) and part.get("status") in (Status.ERROR, Status.TIMEOUT)
    )
    raise RewardFailure(
        f"rewards failed on {len(failed)} of {len(scores)} samples (allowed share {max_error_share:g}); "
        f"most often {reasons.most_common(1)[0][0] if reasons else 'without a reason'}"
    )


def _run(name: str, part: Part, inputs: Sequence[RewardInput]) -> list[Score]:
    """The part's scores. Rows it is not for and rows that lack a field it needs (an ERROR) stay out of its sight."""
    scores: list[Score | None] = [None] * len(inputs)
    places = []
    for place, sample in enumerate(inputs):
        missing = sorted(part.rule.needs - sample.fields.keys())
        if not part.counts_in(sample.fields):
            scores[place] = Score(None, Status.NOT_APPLICABLE, info={"routed_away": True})
        elif missing:
            scores[place] = failure(Status.ERROR, f"the row has no field {missing[0]!r}")
        else:
            places.append(place)
    answers = part.rule.score([inputs[place] for place in places]) if places else []
    assert len(answers) == len(places), f"{name} gave {len(answers)} scores for {len(places)} inputs"
    for place, answer in zip(places, answers):
        scores[place] = answer
    return scores  # type: ignore[return-value]
