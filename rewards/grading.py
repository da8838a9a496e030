"""From completions to Scores by way of a judge's answers: who is asked about, each question once, votes counted."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from rewards.chat_client import Reply
from rewards.judge_text import (
    AGREEMENT,
    QUALITY,
    WITH_REFERENCE,
    WITHOUT_REFERENCE,
    NoVerdict,
    Question,
    as_text,
    checked_scale,
    judged_text,
    nothing_to_judge,
    on_scale,
    pointwise,
    read_verdict,
    template_text,
)
from rewards.records import RewardInput, Score, Status

Ask = Callable[[Question, Sequence[str]], list[Reply]]  # a reply to each body; equal bodies are drawn anew
Reference = Literal["auto", "always", "never"]


@dataclass(frozen=True, slots=True)
class Grading:
    """How completions are graded: two questions, of which `reference` and the row choose, and the scale."""

    with_reference: Question
    without_reference: Question
    scale: tuple[int, int]
    reference: Reference
    include_thinking: bool

    @property
    def needs(self) -> frozenset[str]:
        """The data fields that a row must have."""
        used = [self.with_reference] if self.reference == "always" else []
        used += [self.without_reference] if self.reference == "never" else []
        either = self.with_reference.fields() & self.without_reference.fields()
        return frozenset().union(either, *(question.fields() for question in used))

    def shows_reference(self, fields: Mapping[str, Any]) -> bool:
        """Whether a row is asked about with its reference answer: where it has one and it may be used."""
        return self.reference == "always" or (self.reference == "auto" and bool(as_text(fields.get("answer")).strip()))

    def question(self, shows_reference: bool) -> Question:
        """The one with or without a reference."""
        return self.with_reference if shows_reference else self.without_reference

    def body(self, sample: RewardInput) -> str:
        """The question about a sample, without its ending."""
        values = {**sample.fields, "prompt": sample.prompt, "completion": judged_text(sample, self.include_thinking)}
        return self.question(self.shows_reference(sample.fields)).body(values)


def grading(
    name: str,
    template: str = "",
    rubric: str = "",
    scale: Sequence[int] = (0, 10),
    reference: str = "auto",
    include_thinking: bool = False,
) -> Grading:
    """The grading that options of a reward describe. A template of one's own asks both with and without reference.

    ValueError: a bad scale, a reference other than auto, always or never, a template that never shows {completion}.
    """
    if reference not in ("auto", "always", "never"):
        raise ValueError(f"rewards.{name}.reference is {reference!r}; choose auto, always or never")
    text = template_text(name, template)
    if text and "{completion}" not in text:
        raise ValueError(f"rewards.{name}.template never shows {{completion}}; put it where the judge should read it")
    bounds = checked_scale(name, scale)
    return Grading(
        pointwise(text or WITH_REFERENCE, rubric or AGREEMENT, bounds),
        pointwise(text or WITHOUT_REFERENCE, rubric or QUALITY, bounds),
        bounds,
        reference,  # type: ignore[arg-type]
        include_thinking,
    )


def grade(inputs: Sequence[RewardInput], how: Grading, ask: Ask, votes: int = 1) -> list[Score]:
    """One Score per input: the verdict of most of the votes, mapped from the scale to 0..1.

    A completion that is empty or has symbols only (and is not the reference answer) scores 0.0 without a question.
    Equal questions of a batch are asked once. No verdict is an ERROR, or a TIMEOUT where the judge was too slow.
    """
    scores: list[Score | None] = [None] * len(inputs)
    bodies: dict[bool, dict[str, list[int]]] = {}  # with reference or not -> body -> places in the batch
    for place, sample in enumerate(inputs):
        reason = refusal(sample, how)
        if reason:
            scores[place] = Score(0.0, info={"reason": f"{reason}; the judge was not asked"})
        else:
            same_kind = bodies.setdefault(how.shows_reference(sample.fields), {})
            same_kind.setdefault(how.body(sample), []).append(place)
    for shown, places in bodies.items():
        replies = ask(how.question(shown), [body for body in places for _ in range(votes)])
        assert len(replies) == votes * len(places), f"{len(replies)} replies to {votes} x {len(places)} questions"
        for number, same in enumerate(places.values()):
            first = _score(replies[number * votes : (number + 1) * votes], how.scale)
            scores[same[0]] = first
            for place in same[1:]:  # the same words, asked and paid once
                info = {key: value for key, value in first.info.items() if key != "usage"}
                scores[place] = Score(first.value, first.status, info=info)
    assert all(score is not None for score in scores)
    return scores  # type: ignore[return-value]


def refusal(sample: RewardInput, how: Grading) -> str:
    """Why a judge must not be asked about the completion, or ""."""
    text = judged_text(sample, how.include_thinking)
    return "" if text and text == as_text(sample.fields.get("answer")).strip() else nothing_to_judge(text)


def total_usage(replies: Sequence[Reply]) -> dict[str, int]:
    """Requests and tokens of several replies, without zeros."""
    total = Counter[str]()
    for reply in replies:
        total.update(reply.usage)
    return {key: count for key, count in total.items() if count}


def _score(replies: Sequence[Reply], scale: tuple[int, int]) -> Score:
    """The verdict of the majority of the replies; equally frequent verdicts are averaged.

    ERROR if less than half of the replies have a verdict.
    """
    grades, explanations, unread = [], [], []
    for reply in replies:
        if reply.status is not Status.OK:
            unread.append((reply.status, reply.reason, ""))
            continue
        try:
            verdict, explanation = read_verdict(reply.text)
            grades.append(on_scale(verdict, scale))
            explanations.append(explanation)
        except NoVerdict as error:
            unread.append((Status.ERROR, str(error), reply.text[-300:]))
    usage = total_usage(replies)
    info: dict[str, Any] = {"usage": usage} if usage else {}
    queue_s, run_s = (sum(getattr(reply, key) for reply in replies) for key in ("queue_s", "run_s"))
    if 2 * len(grades) < len(replies) or not grades:
        status, info["reason"], answer = unread[0]
        info |= {"answer": answer} if answer else {}
        return Score(None, status, info=info, queue_s=queue_s, run_s=run_s)
    verdict = statistics.fmean(statistics.multimode(grades))
    info["verdict"] = verdict
    info["explanation"] = next((text for grade, text in zip(grades, explanations) if grade == verdict), "")[:2000]
    if len(replies) > 1:
        info["votes"] = {f"{grade:g}": count for grade, count in Counter(grades).most_common()}
        info["unread"] = len(unread)
    value = (verdict - scale[0]) / (scale[1] - scale[0])
    return Score(value, info=info, queue_s=queue_s, run_s=run_s)
