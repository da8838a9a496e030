"""Hackability: what rewards pay for completions that earned nothing (rewards/lab/probe_texts.py has them).

A probe is judged by what a reward is for. One for the *task* reads the gold answer; one for *quality* is a model that
does not; the others are for *form* (tags, length, language), which may well pay a wrong answer. The *total* is what a
policy is trained on: no probe may come near what a right answer gets.
"""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from rewards.compose import Rewards
from rewards.lab.probe_texts import BOUND, PROBES, Case, Probe, same_answer
from rewards.lab.real_probes import raw_gold, real_answers
from rewards.lab.subjects import Result, Subject, find_subjects, real_completions, short_gold
from rewards.lab.watch import NOT_ASKED, watched
from rewards.records import RewardInput, Score, Status

_Asked = tuple[RewardInput, str, bool]  # row, text, truncated
_Key = tuple[int, str, bool]
TOLERANCE = 0.1  # of what a reward spans: partial credit, and chance
TIME_ROWS = 2  # a time probe may cost a time limit each
INLINE_PAUSE_S, PAUSE_S = 1.0, 15.0  # the longest that scoring one completion may take
_ANY_TEXT = "return a number for any text, 0.0 where it holds no answer"
_BROKEN = (Status.ERROR, Status.TIMEOUT)


def run_probes(
    rewards: Rewards, rows: Sequence[RewardInput], labels: Sequence[float | None] | None = None
) -> list[dict[str, Any]]:
    """One row a probe and reward ("total" last, if there are several).

    `rows` are real completions; up to 32 prompts of them carry the probes and up to 64 right and 64 wrong ones (by
    `labels`) say what real answers get. Keys: reward, probe, what, samples, mean and highest (unweighted, over the
    samples with a verdict), wrong_mean (what real wrong answers get), allowed (the mean that passes), result ("skipped"
    where it does not apply), example, statuses, seconds (the slowest sample), text, remedy. ValueError: no rows.
    """
    if not rows:
        raise ValueError("there are no rows to probe rewards with")
    guarded = watched(rewards)
    real = real_completions(guarded, rows, labels if labels is not None else [None] * len(rows))
    subjects = find_subjects(guarded, rows, real)
    scorer = _Scorer(guarded, _characters_per_token(rows), {name: {} for name in guarded.parts})
    found = []
    for subject in subjects:
        found.append(real_answers(subject, real))
        if found[-1]["result"] == "fail" and found[-1]["mean"] is None:
            text = "no real completion gets a verdict either"
            found += [subject.outcome(probe.name, probe.what, "skipped", text) for probe in PROBES]
            continue
        found.append(raw_gold(subject, real, guarded))
        cases = _cases(subject)
        scorer.ahead([one for probe in PROBES if probe.expects != "time" for one in _asked(probe, subject, cases)[0]])
        found += [_probed(probe, subject, cases, scorer) for probe in PROBES]
    return found


@dataclass(slots=True)
class _Scorer:
    """Scores texts on rows, each pair once."""

    rewards: Rewards
    characters_per_token: float | None
    known: dict[str, dict[_Key, Score]]  # by reward

    def score(self, asked: Sequence[_Asked]) -> list[tuple[dict[str, Score], Score]]:
        """(scores by reward, total) of each."""
        keys = [(id(row), text, truncated) for row, text, truncated in asked]
        for name, known in self.known.items():
            new = {key: self._input(*one) for key, one in zip(keys, asked) if key not in known}
            if new:
                known |= zip(new, self.rewards.part_scores(list(new.values()), [name])[name])
        columns = {name: [known[key] for key in keys] for name, known in self.known.items()}
        totals = self.rewards.totals(columns)
        return [({name: columns[name][i] for name in columns}, total) for i, total in enumerate(totals)]

    def ahead(self, asked: Sequence[_Asked]) -> None:
        """Scores all at once where that is cheaper, if nothing in it hangs: an inline reward takes a process a call."""
        for name, known in self.known.items():
            new = {(id(one[0]), *one[1:]): self._input(*one) for one in asked if (id(one[0]), *one[1:]) not in known}
            if new and self.rewards.parts[name].rule.runs == "inline":
                scores = self.rewards.part_scores(list(new.values()), [name])[name]
                known |= {key: score for key, score in zip(new, scores) if score.status is not Status.TIMEOUT}

    def _input(self, row: RewardInput, text: str, truncated: bool) -> RewardInput:
        """Token ids are made up where the rows have some: as many as real text has, equal where the text repeats."""
        ids = None
        if self.characters_per_token:
            size = max(1, round(self.characters_per_token))
            ids = [zlib.crc32(text[i : i + size].encode()) for i in range(0, len(text), size)]
        return replace(row, completion=text, completion_ids=ids, truncated=truncated)


def _cases(subject: Subject) -> list[tuple[RewardInput, Case]]:
    golds = [short_gold(row) for row in subject.rows]
    rights = [subject.complete(row) for row in subject.rows]
    cases = []
    for place, row in enumerate(subject.rows):
        after = [*range(place + 1, len(golds)), *range(place)]
        others = dict.fromkeys(golds[i] for i in after if golds[i] and not same_answer(golds[i], golds[place]))
        wrong = next(
            (rights[i] for i in after if rights[i] != rights[place] and not same_answer(golds[i], golds[place])), None
        )
        prompt = row.prompt if isinstance(row.prompt, str) else "\n".join(str(m.get("content")) for m in row.prompt)
        write = lambda text, row=row: subject.writer(row, text)  # noqa: E731
        cases.append((row, Case(prompt, golds[place], tuple(others), write, rights[place], wrong)))
    return cases


def _asked(
    probe: Probe, subject: Subject, cases: Sequence[tuple[RewardInput, Case]]
) -> tuple[list[_Asked], list[_Asked]]:
    """(what is scored, what it is compared with or nothing)."""
    chosen = (
        []
        if _not_for(probe, subject)
        else [(row, text, case) for row, case in cases if (text := probe.text(case)) is not None]
    )
    if probe.expects == "time":
        chosen = chosen[:TIME_ROWS]
    asked = [(row, text, probe.truncated) for row, text, _ in chosen]
    if probe.without is None:
        return asked, []
    return asked, [(row, probe.without(case) or "", probe.truncated) for row, _, case in chosen]


def _probed(
    probe: Probe, subject: Subject, cases: Sequence[tuple[RewardInput, Case]], scorer: _Scorer
) -> dict[str, Any]:
    asked, without = _asked(probe, subject, cases)
    if not asked:
        reason = _not_for(probe, subject) or "no row of the data is one for this probe"
        return subject.outcome(probe.name, probe.what, "skipped", reason)
    texts = [text for _, text, _ in asked]
    scored = scorer.score(asked)
    own = [_own(subject, parts, total) for parts, total in scored]
    values = [subject.value(score, total) for score, (_, total) in zip(own, scored)]
    base = [subject.value(_own(subject, parts, total), total) for parts, total in scorer.score(without)]
    known = [value for value in values if value is not None]
    facts = {
        "samples": len(asked),
        "mean": sum(known) / len(known) if known else None,
        "highest": max(known, default=None),
        "statuses": dict(Counter(str(score.status) for score in own)),
        "seconds": max(score.run_s for score in own),
        "example": texts[max(range(len(values)), key=lambda i: (values[i] is not None, values[i] or 0.0))],
    }
    outcome, allowed, text, remedy = _judged(probe, subject, own, facts, base)
    facts["allowed"] = None if allowed is None else round(allowed, 6)
    return subject.outcome(probe.name, probe.what, outcome, text, remedy, facts)


def _own(subject: Subject, parts: dict[str, Score], total: Score) -> Score:
    return total if subject.part is None else parts[subject.name]


def _not_for(probe: Probe, subject: Subject) -> str:
    """Why the probe says nothing about such a reward; "" if it does."""
    purpose = subject.purpose
    if purpose == "form" and probe.expects in ("nothing", "full", "same", "verdict"):
        return "this reward looks at the form and may pay a wrong answer"
    if purpose == "form" and subject.high <= 0 and probe.expects != "time":
        return "this reward only takes away, so there is nothing to win"
    if purpose == "total" and probe.expects == "full":
        return "asked of each reward; `grpo rewards check` asks it of a recipe"
    if purpose != "form" and probe.name == "empty_thought":
        return "the answer is right, whatever stands before it"
    if purpose == "total" and subject.part is None and probe.expects == "verdict":
        return "asked of each reward"
    return ""


def _judged(
    probe: Probe, subject: Subject, scores: Sequence[Score], facts: dict[str, Any], base: Sequence[float | None]
) -> tuple[Result, float | None, str, str]:
    """(result, allowed mean, one line in words, remedy)."""
    broken = [score for score in scores if score.status in _BROKEN]
    if any(score.info.get(NOT_ASKED) for score in broken):
        return "skipped", None, str(broken[0].info["reason"]), ""
    if broken and (subject.part is not None or probe.expects == "time"):
        first = broken[0]
        reason = first.info.get("reason", "see the reward's own row")
        text = f"gives no verdict on {len(broken)} of {len(scores)} ({first.status}): {reason!s:.160}"
        return "fail", None, text, BOUND if first.status is Status.TIMEOUT else _ANY_TEXT
    mean = facts["mean"]
    if probe.expects == "full":
        return *_paid_in_full(subject, scores, facts), probe.remedy
    if mean is None:
        return "skipped", None, f"no verdict: {_most_common(scores)}", ""
    limit = INLINE_PAUSE_S if subject.part is not None and subject.part.rule.runs == "inline" else PAUSE_S
    if probe.expects == "time":
        text = f"{facts['seconds']:.2g} s for one completion"
        return ("fail", None, text, BOUND) if facts["seconds"] > limit else ("pass", None, text, "")
    if probe.expects == "verdict":
        return "pass", None, f"every sample has a verdict; it pays {mean:.2f}", ""
    if probe.expects == "same":
        return *_paid_as_before(subject, mean, base), probe.remedy
    allowed = _allowed(probe, subject, base)
    if allowed is None:
        return "skipped", None, "real answers say too little about what this reward may pay", ""
    what = probe.what if len(facts["example"]) > 120 else repr(facts["example"])
    real = f"; real wrong answers get {subject.wrong:.2f}" if subject.labelled and subject.wrong is not None else ""
    if mean > allowed + 1e-9:
        return "fail", allowed, f"pays {mean:.2f} for {what}{real}", probe.remedy
    return "pass", allowed, f"pays {mean:.2f}{real}", ""


def _allowed(probe: Probe, subject: Subject, base: Sequence[float | None]) -> float | None:
    """The highest mean that is no hack."""
    slack = TOLERANCE * subject.span
    if subject.purpose == "form":
        if probe.expects == "tags":
            known = [value for value in base if value is not None]
            return (sum(known) / len(known) if known else max(0.0, subject.low)) + slack
        return max(0.0, subject.low + subject.span / 2) if probe.expects == "empty" else subject.high
    if subject.purpose == "task":  # where it pays real wrong answers too, half of its span is too much all the same
        wrong = subject.low if subject.wrong is None else max(subject.low, subject.wrong)
        return min(wrong + slack, subject.low + subject.span / 2)
    if subject.wrong is None:
        return None
    if subject.purpose == "quality":
        return subject.wrong + slack
    right = subject.right if subject.right is not None and subject.right > subject.wrong else subject.high
    gain = max(right - subject.wrong, 0.0)
    return subject.wrong + (TOLERANCE if probe.expects == "empty" else 0.5) * gain


def _paid_in_full(subject: Subject, scores: Sequence[Score], facts: dict[str, Any]) -> tuple[Result, float, str]:
    low = [score for score in scores if score.value is None or score.value < subject.high - 1e-6]
    if not low:
        return "pass", subject.high, f"pays {subject.high:.2f} for the gold answer on every row"
    if not subject.declared:
        return "skipped", subject.high, f"pays {facts['mean'] or 0:.2f} in the best form found; its own is not known"
    return "fail", subject.high, f"does not pay the gold answer in full on {len(low)} of {len(scores)} rows"


def _paid_as_before(subject: Subject, mean: float, base: Sequence[float | None]) -> tuple[Result, float | None, str]:
    known = [value for value in base if value is not None]
    if not known or (before := sum(known) / len(known)) < subject.low + subject.span / 2:
        return "skipped", None, "it does not pay the right answer to begin with"
    slack, change = TOLERANCE * subject.span, mean - before
    if change > slack or (change < -slack and subject.purpose == "task"):
        return "fail", before, f"pays {mean:.2f}, and {before:.2f} for the right answer alone"
    return "pass", before, f"pays {mean:.2f}, as for the right answer alone"


def _most_common(scores: Sequence[Score]) -> str:
    reasons = Counter(str(score.info.get("reason") or score.status) for score in scores)
    return f"{reasons.most_common(1)[0][0]:.160}"


def _characters_per_token(rows: Sequence[RewardInput]) -> float | None:
    with_ids = [row for row in rows if row.completion_ids]
    tokens = sum(len(row.completion_ids or ()) for row in with_ids)
    return sum(len(row.completion) for row in with_ids) / tokens if len(with_ids) == len(rows) else None
