"""The self_voting reward: the samples of a group vote on the answer. No gold answer is needed."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

from rewards.judge_text import as_text
from rewards.math_answer import extract, tidy
from rewards.records import RewardInput, Score, Status
from rewards.rule import Rule, failure
from rewards.text_rules import last_tagged

_NUMBER = re.compile(r"[+-]?(?:\d+|\d{1,3}(?:,\d{3})+)(?:\.\d+)?")


def self_voting(*, score: str = "majority", minimum_share: float = 0.0) -> Rule:
    """1.0 if the answer is the one that most samples of the group give (maj@k of the policy as judge), else 0.0.

    `score: share` gives the share of the group with the same answer instead. An answer is the last box,
    the last <answer> pair or what follows the last ####, after </think>; a sample without one has no vote and scores
    0.0. NOT_APPLICABLE for the whole group: no
    votes, a group of one, a tie for the most votes (majority only), or a winner with less than `minimum_share` of the
    group. Only as good as the policy's majority: combine it with something that knows. ValueError: a bad option.
    """
    if score not in ("majority", "share"):
        raise ValueError(f"rewards.self_voting.score is {score!r}; choose majority or share")
    if isinstance(minimum_share, bool) or not isinstance(minimum_share, int | float) or not 0 <= minimum_share <= 1:
        raise ValueError(f"rewards.self_voting.minimum_share is {minimum_share!r}; give a share from 0 to 1")

    def score_groups(inputs: Sequence[RewardInput]) -> list[Score]:
        groups: dict[str, list[int]] = {}
        for place, sample in enumerate(inputs):
            groups.setdefault(sample.group or as_text(sample.prompt), []).append(place)
        scores: dict[int, Score] = {}
        for places in groups.values():
            answers = [voted_answer(inputs[place].completion) for place in places]
            scores |= zip(places, _votes(answers, score == "share", minimum_share))
        return [scores[place] for place in range(len(inputs))]

    return Rule(score_groups, bounds=(0.0, 1.0), grouped=True)


def voted_answer(completion: str) -> str | None:
    """The answer that math_answer would read, in one spelling (4,200 and 4200.0 are one); None where there is none."""
    text, boxed = extract(completion, ",")  # joined boxes are one answer
    if not boxed:
        spoken = completion.rpartition("</think>")[2]
        tagged = last_tagged(spoken, "answer")
        if tagged is None and "####" not in spoken:
            return None
        text = tidy(spoken.rpartition("####")[2].strip().partition("\n")[0] if tagged is None else tagged)
    text = " ".join(text.split())
    return (_one_spelling(text) if _NUMBER.fullmatch(text) else text) or None


def _one_spelling(number: str) -> str:
    """Of a number as _NUMBER has it; in text, as a float would take large ones for equal."""
    whole, _, decimals = number.replace(",", "").lstrip("+-").partition(".")
    plain = (whole.lstrip("0") or "0") + f".{decimals}".rstrip("0").rstrip(".")
    return f"-{plain}" if number.startswith("-") and plain != "0" else plain


def _votes(answers: Sequence[str | None], share: bool, minimum_share: float) -> list[Score]:
    votes = Counter(answer for answer in answers if answer is not None)
    ranked = votes.most_common(2)
    if len(answers) == 1:
        reason = "alone in its group: there is nobody to vote with"
    elif not ranked:
        reason = "no sample of the group has an answer to vote for"
    elif not share and len(ranked) == 2 and ranked[0][1] == ranked[1][1]:
        reason = f"a tie: {ranked[0][1]} votes each"
    elif ranked[0][1] < minimum_share * len(answers):
        reason = f"{ranked[0][1]} of {len(answers)} votes are less than minimum_share {minimum_share:g}"
    else:
        winner = ranked[0][0]
        shares = {answer: count / len(answers) for answer, count in votes.items()}
        return [
            Score(0.0, info={"reason": "no answer to vote with"})
            if answer is None
            else Score(
                shares[answer] if share else float(answer == winner), info={"answer": answer, "share": shares[answer]}
            )
            for answer in answers
        ]
    return [failure(Status.NOT_APPLICABLE, reason) for _ in answers]
