"""Comparisons within a group: who meets whom, what the two orders of a pair come to, and a score from the results."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rewards.chat_client import Reply
from rewards.grading import Ask, total_usage
from rewards.judge_text import NoVerdict, Question, as_text, choice, judged_text, nothing_to_judge, read_verdict
from rewards.records import RewardInput, Score, Status
from rewards.rule import failure

Pair = tuple[int, int]
_POINTS = {"A": 1.0, "tie": 0.5, "B": 0.0}


@dataclass(frozen=True, slots=True)
class Outcome:
    """What both orders of a pair say: points of the first from 0 to 1, and whether they disagree."""

    points: float
    flipped: bool = False


def compare(
    inputs: Sequence[RewardInput],
    question: Question,
    ask: Ask,
    opponents: int = 0,
    ranking: str = "win_share",
    include_thinking: bool = False,
) -> list[Score]:
    """One Score per input, from comparisons with others of its group; every pair is asked about in both orders.

    Equal texts tie without a question. An empty or symbols-only completion scores 0.0 and loses to the others. A pair
    without a verdict in either order is left out; a sample with less than half of its pairs left is an ERROR. A group
    of one is NOT_APPLICABLE. info: order_flip_rate of the group's judged pairs, comparisons, usage.
    """
    groups: dict[str, list[int]] = {}
    for place, sample in enumerate(inputs):
        groups.setdefault(sample.group or as_text(sample.prompt), []).append(place)
    texts = [judged_text(sample, include_thinking) for sample in inputs]
    refused = [nothing_to_judge(text) for text in texts]
    pairs = {
        key: [(places[i], places[j]) for i, j in schedule(len(places), opponents)] for key, places in groups.items()
    }
    judged = [
        (one, other)
        for group in pairs.values()
        for one, other in group
        if not refused[one] and not refused[other] and texts[one] != texts[other]
    ]
    bodies = [
        question.body({**inputs[one].fields, "prompt": inputs[one].prompt, "completion_a": a, "completion_b": b})
        for one, other in judged
        for a, b in ((texts[one], texts[other]), (texts[other], texts[one]))
    ]
    replies = ask(question, bodies) if bodies else []
    answers = {pair: replies[2 * number : 2 * number + 2] for number, pair in enumerate(judged)}
    results: dict[Pair, Outcome | str] = {}
    for one, other in (pair for group in pairs.values() for pair in group):
        if (one, other) in answers:
            results[one, other] = _outcome(answers[one, other])
        else:
            results[one, other] = Outcome((1 + bool(refused[other]) - bool(refused[one])) / 2)
    scores: dict[int, Score] = {}
    for key, places in groups.items():
        own = {pair: results[pair] for pair in pairs[key]}
        scores |= _group_scores(places, own, answers, refused, _RANKINGS[ranking])
    return [scores[place] for place in range(len(inputs))]


def schedule(size: int, opponents: int) -> list[Pair]:
    """Who meets whom among `size`: everybody, or each the `opponents` nearest around a ring (an even number)."""
    if not opponents or opponents >= size - 1:
        return [(i, j) for i in range(size) for j in range(i + 1, size)]
    return [(i, (i + step) % size) for step in range(1, opponents // 2 + 1) for i in range(size)]


def win_share(places: Sequence[int], points: Mapping[Pair, float]) -> dict[int, float]:
    """Mean points of each; 0.5 for one without a result."""
    won: dict[int, list[float]] = {place: [] for place in places}
    for (one, other), value in points.items():
        won[one].append(value)
        won[other].append(1 - value)
    return {place: sum(values) / len(values) if values else 0.5 for place, values in won.items()}


def bradley_terry(places: Sequence[int], points: Mapping[Pair, float], rounds: int = 200) -> dict[int, float]:
    """p / (p + 1) of the Bradley-Terry strengths p: the chance to beat a strength of 1.

    Strengths by minorisation-maximisation (Hunter, Annals of Statistics 2004, eq. 3), with one draw against strength
    1 added for each, which keeps them finite and fixes their scale.
    """
    strength = dict.fromkeys(places, 1.0)
    won = dict.fromkeys(places, 0.5)
    for (one, other), value in points.items():
        won[one] += value
        won[other] += 1 - value
    for _ in range(rounds):
        met = {place: 1 / (strength[place] + 1) for place in places}
        for one, other in points:
            share = 1 / (strength[one] + strength[other])
            met[one] += share
            met[other] += share
        strength = {place: won[place] / met[place] for place in places}
    return {place: p / (p + 1) for place, p in strength.items()}


_RANKINGS: dict[str, Callable[[Sequence[int], Mapping[Pair, float]], dict[int, float]]] = {
    "win_share": win_share,
    "bradley_terry": bradley_terry,
}


def _outcome(replies: Sequence[Reply]) -> Outcome | str:
    """Of a pair's two orders, or why there is none."""
    points = []
    for reply, swapped in zip(replies, (False, True)):
        if reply.status is not Status.OK:
            return reply.reason
        try:
            value = _POINTS[choice(read_verdict(reply.text)[0])]
        except NoVerdict as error:
            return str(error)
        points.append(1 - value if swapped else value)
    return Outcome(sum(points) / 2, points[0] != points[1])


def _group_scores(
    places: Sequence[int],
    results: Mapping[Pair, Outcome | str],
    answers: Mapping[Pair, Sequence[Reply]],
    refused: Sequence[str],
    rank: Callable[[Sequence[int], Mapping[Pair, float]], dict[int, float]],
) -> dict[int, Score]:
    known = {pair: result for pair, result in results.items() if isinstance(result, Outcome)}
    values = rank(places, {pair: result.points for pair, result in known.items()})
    asked = [result for pair, result in known.items() if pair in answers]
    flips = sum(result.flipped for result in asked) / len(asked) if asked else None
    scores = {}
    for place in places:
        met = [pair for pair in results if place in pair]
        own = [reply for pair in met if pair in answers and pair[0] == place for reply in answers[pair]]
        info: dict[str, Any] = {"comparisons": sum(pair in known for pair in met), "order_flip_rate": flips}
        info |= {"usage": total_usage(own)} if own else {}  # of the pairs it comes first in: each is counted once
        run_s, queue_s = sum(reply.run_s for reply in own), sum(reply.queue_s for reply in own)
        if refused[place]:
            info["reason"] = f"{refused[place]}; the judge was not asked"
            scores[place] = Score(0.0, info=info)
        elif len(places) == 1:
            scores[place] = failure(Status.NOT_APPLICABLE, "alone in its group: there is nothing to compare with")
        elif 2 * info["comparisons"] < len(met):
            info["reason"] = next(result for pair in met if isinstance(result := results[pair], str))
            scores[place] = Score(None, Status.ERROR, info=info, queue_s=queue_s, run_s=run_s)
        else:
            scores[place] = Score(values[place], info=info, queue_s=queue_s, run_s=run_s)
    return scores
