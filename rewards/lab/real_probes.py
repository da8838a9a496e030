"""Probes made of real completions: does the reward read their form, and the gold answers as they are stored?"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace
from typing import Any

from rewards.compose import Rewards
from rewards.lab.subjects import Real, Subject, mean, short_gold, with_gold
from rewards.records import RewardInput, Score, Status

_FEW = 5  # completions that say something about all
_LATEX = re.compile(r"[\\^_{]")


def real_answers(subject: Subject, real: Real) -> dict[str, Any]:
    """A template mismatch: every real completion gets the same, right or wrong, so no group teaches anything."""
    name, what = "template", "real completions: right and wrong ones must not all get the same"
    scores = real.totals if subject.part is None else real.parts[subject.name]
    triples = [
        (row, score, label)
        for row, score, label in zip(real.rows, scores, real.right)
        if subject.part is None or subject.part.counts_in(row.fields)
    ]
    known = [score.value for _, score, _ in triples if score.value is not None]
    facts = {
        "samples": len(triples),
        "mean": mean(known),
        "highest": max(known, default=None),
        "statuses": dict(Counter(str(score.status) for _, score, _ in triples)),
        "seconds": max((score.run_s for _, score, _ in triples), default=0.0),
    }
    if not known and any(score.status is not Status.NOT_APPLICABLE for _, score, _ in triples):
        reason = triples[0][1].info.get("reason") or triples[0][1].status
        text = f"no real completion gets a verdict: {reason!s:.160}"
        return subject.outcome(name, what, "fail", text, "mend what the reason names before anything else", facts)
    if subject.purpose == "form":
        text = "this reward looks at the form, which may well be the same"
        return subject.outcome(name, what, "skipped", text, facts=facts)
    right = [(row, s) for row, s, label in triples if (label if label is not None else _seems_right(row))]
    if len(known) < _FEW or len(right) in (0, len(triples)):
        return subject.outcome(
            name, what, "skipped", "too few real completions, or none of them right, or all", facts=facts
        )
    paid = mean([score.value for _, score in right])
    lost = subject.purpose != "quality" and len(right) >= _FEW and (paid or 0.0) < subject.low + 0.05 * subject.span
    facts["example"] = right[0][0].completion[-300:]
    if len(set(known)) > 1 and not lost:
        return subject.outcome(name, what, "pass", f"they get {min(known):.2f} to {max(known):.2f}", facts=facts)
    if (paid or 0.0) > subject.low + subject.span / 2:
        text = f"every real completion gets {paid:.2f}, the wrong ones too: every group has zero variance"
        return subject.outcome(name, what, "fail", text, "the reward does not look at the answer; compare it", facts)
    text = f"right real completions get {paid or 0.0:.2f}, like wrong ones: every group has zero variance"
    form = subject.complete(right[0][0])
    asks = f"it pays for {form[-60:]!r}, " if form is not None else "its form is not theirs, "
    gold = str(right[0][0].fields.get("answer")).strip()
    if form is None and gold != short_gold(right[0][0]):
        asks = f"the gold answer is a whole text, {gold[-40:]!r}: keep the final answer of it alone; "
    remedy = (
        f"{asks}the completions end in {right[0][0].completion[-40:]!r}: set the reward's tag or pattern, or the prompt"
    )
    return subject.outcome(name, what, "fail", text, remedy, facts)


def raw_gold(subject: Subject, real: Real, rewards: Rewards) -> dict[str, Any]:
    r"""Right answers that are rejected because the gold one is LaTeX that stands in no \boxed{} and no $...$."""
    name, what = "raw_gold", "right answers where the gold one is raw LaTeX, beside the same gold in a box"
    if subject.purpose != "task":
        return subject.outcome(name, what, "skipped", "asked of rewards that read the gold answer")
    made = [
        replace(row, completion=f"\\boxed{{{gold}}}" if form is None else form)
        for row in subject.rows
        if _LATEX.search(gold := short_gold(row))
        for form in (subject.complete(row), None)
    ]
    labelled = [row for row, label in zip(real.rows, real.right) if label is True and _LATEX.search(short_gold(row))]
    inputs = list({(row.completion, short_gold(row)): row for row in [*labelled, *made]}.values())
    if not inputs:
        return subject.outcome(name, what, "skipped", "no gold answer has LaTeX in it")

    def scores(wrap: str) -> list[Score]:
        wrapped = [with_gold(row, wrap.replace("GOLD", short_gold(row))) for row in inputs]
        return rewards.part_scores(wrapped if wrap else inputs, [subject.name])[subject.name]

    raw, boxed, dollars = scores(""), scores(r"\boxed{GOLD}"), scores("$GOLD$")
    rejected = [
        row
        for row, score, others in zip(inputs, raw, zip(boxed, dollars))
        if not _accepted(subject, score) and any(_accepted(subject, other) for other in others)
    ]
    facts = {
        "samples": len(inputs),
        "mean": mean([score.value for score in raw]),
        "highest": max((s.value for s in raw if s.value is not None), default=None),
        "statuses": dict(Counter(str(score.status) for score in raw)),
        "seconds": max(score.run_s for score in raw),
    }
    if not rejected:
        return subject.outcome(name, what, "pass", "no right answer is rejected because its gold is raw", facts=facts)
    facts["example"] = f"{rejected[0].completion[-200:]} (gold: {short_gold(rejected[0])[:80]})"
    text = f"rejects {len(rejected)} of {len(inputs)} right answers because the gold one is raw LaTeX"
    remedy = r"put gold answers in \boxed{...} or $...$ before they are parsed (math_answer does)"
    return subject.outcome(name, what, "fail", text, remedy, facts)


def _accepted(subject: Subject, score: Score) -> bool:
    return score.status is Status.OK and score.value is not None and score.value > subject.low + subject.span / 2


def _seems_right(row: RewardInput) -> bool:
    """Without a label: the completion ends in the gold answer."""
    gold = short_gold(row)
    return bool(gold) and re.search(rf"(?<![\w.]){re.escape(gold)}(?!\w)", row.completion[-80:]) is not None
