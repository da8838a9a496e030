"""Which sampled answers become training data: a pure function of scored answers, so it can be made again.

accepted  the reward reaches distill.threshold, the answer ended by itself and is not empty
kept      of a prompt's accepted answers, without duplicates, the max_per_prompt shortest; then cap_mean_length

The shortest of a prompt are on average no longer than its different accepted ones. Over the data set that does not
follow: easy prompts have many accepted answers and short ones, hard prompts few and long ones, and k of each, without
duplicates, shifts the weight to the hard. So with cap_mean_length answers above the accepted mean go, the longest first
and the shortest of a prompt after all others, until the kept mean is not above the accepted one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, NamedTuple

from grpo.config import DistillConfig

TOLERANCE = 1e-9  # weights such as 0.7 + 0.2 + 0.1 add up to a little less than 1
REASONS = ("unscored", "below_threshold", "truncated", "empty", "duplicate", "over_max_per_prompt", "over_mean_length")


class Answer(NamedTuple):
    """A kept answer."""

    prompt_id: str
    sample: int
    length: int  # sampled tokens, the end token counted
    rank: int  # among the kept answers of its prompt, 0 the shortest


@dataclass(frozen=True)
class Selection:
    """What was chosen, and why the rest was not: `sampled` is `kept` plus all of `dropped`."""

    kept: tuple[Answer, ...]
    prompts: int
    sampled: int
    accepted: int
    dropped: Mapping[str, int]  # reason -> answers
    mean_length: Mapping[str, float | None]  # of sampled, accepted and kept answers; None: there are none
    highest: float | None  # reward

    def summary(self) -> dict[str, Any]:
        """For provenance.json."""
        return {
            "prompts": self.prompts,
            "prompts_kept": len({answer.prompt_id for answer in self.kept}),
            "sampled": self.sampled,
            "accepted": self.accepted,
            "kept": len(self.kept),
            "acceptance_rate": self.accepted / max(self.sampled, 1),
            "mean_length": dict(self.mean_length),
            "dropped": dict(self.dropped),
        }


def select(samples: Iterable[Mapping[str, Any]], config: DistillConfig) -> Selection:
    """`samples`: rows of samples.jsonl (grpo.steps.sample_rows), those of a prompt one after the other.

    Two answers are duplicates if they are one text, whitespace around it apart. Among equally long ones the higher
    reward comes first, then the earlier sample.
    """
    dropped: Counter[str] = Counter(dict.fromkeys(REASONS, 0))
    kept: list[Answer] = []
    prompts = sampled = sampled_tokens = accepted_count = accepted_tokens = 0
    highest = None
    for prompt_id, rows in groupby(samples, key=lambda row: row["prompt_id"]):
        prompts += 1
        accepted = []
        for row in rows:
            sampled += 1
            sampled_tokens += row["length"]
            if row["reward"] is not None:
                highest = row["reward"] if highest is None else max(highest, row["reward"])
            reason = why_rejected(row, config.threshold)
            if reason:
                dropped[reason] += 1
            else:
                accepted.append(row)
        accepted_count += len(accepted)
        accepted_tokens += sum(row["length"] for row in accepted)
        distinct: dict[str, Mapping[str, Any]] = {}
        for row in sorted(accepted, key=lambda row: (row["length"], -row["reward"], row["sample"])):
            distinct.setdefault(row["completion"].strip(), row)
        chosen = list(distinct.values())[: config.max_per_prompt]
        dropped["duplicate"] += len(accepted) - len(distinct)
        dropped["over_max_per_prompt"] += len(distinct) - len(chosen)
        kept += [Answer(prompt_id, row["sample"], row["length"], rank) for rank, row in enumerate(chosen)]
    if config.cap_mean_length:
        before, kept = len(kept), capped(kept, accepted_tokens, accepted_count)
        dropped["over_mean_length"] = before - len(kept)
    assert sampled == len(kept) + dropped.total(), f"{sampled=} {len(kept)=} {dropped=}"
    mean_length = {
        "sampled": _mean(sampled_tokens, sampled),
        "accepted": _mean(accepted_tokens, accepted_count),
        "kept": _mean(sum(answer.length for answer in kept), len(kept)),
    }
    return Selection(tuple(kept), prompts, sampled, accepted_count, dict(dropped), mean_length, highest)


def why_rejected(row: Mapping[str, Any], threshold: float) -> str:
    """The reason why an answer is not accepted; empty if it is."""
    if row["reward"] is None:
        return "unscored"
    if row["reward"] < threshold - TOLERANCE:
        return "below_threshold"
    if row["finish_reason"] == "length":  # it has no end to learn
        return "truncated"
    return "" if row["completion"].strip() else "empty"


def capped(kept: Sequence[Answer], tokens: int, count: int) -> list[Answer]:
    """`kept` without the longest, until their mean length is at most tokens / count (in integers, so exactly)."""
    total, left, gone = sum(answer.length for answer in kept), len(kept), set()
    for answer in sorted(kept, key=lambda answer: (answer.rank == 0, -answer.length)):
        if total * count <= tokens * left:
            break
        if answer.length * count > tokens:
            gone.add(answer)
            total, left = total - answer.length, left - 1
    return [answer for answer in kept if answer not in gone]


def _mean(total: int, count: int) -> float | None:
    return total / count if count else None
