"""Scores completions that may hang a grader, the inline ones included, without hanging the lab.

An inline reward runs in a forked child with a deadline, as in this process nothing could stop it. One that timed out on
several batches is not asked again: its verdict is known, and every further answer would cost its whole time limit.
"""

from __future__ import annotations

import copy
import json
import multiprocessing
from collections.abc import Callable, Sequence
from dataclasses import replace
from multiprocessing.connection import Connection

from rewards.compose import Rewards
from rewards.records import RewardInput, Score, Status
from rewards.rule import Rule, failure

INLINE_LIMIT_S = 5.0  # for a batch
STRIKES = 3  # batches without one verdict
NOT_ASKED = "not_asked"  # in the info of a score that is presumed
_Batch = Callable[[Sequence[RewardInput]], list[Score]]


def watched(rewards: Rewards) -> Rewards:
    """The same rewards, sharing their workers: do not close what is returned.

    An inline reward that gives no verdict within INLINE_LIMIT_S is a TIMEOUT.
    """
    copied = copy.copy(rewards)
    copied.parts = {name: replace(part, rule=_watched(part.rule)) for name, part in rewards.parts.items()}
    return copied


def _watched(rule: Rule) -> Rule:
    strikes = 0

    def ask(inputs: Sequence[RewardInput]) -> list[Score]:
        nonlocal strikes
        if strikes >= STRIKES:
            reason = f"not asked, as {strikes} batches in a row timed out"
            return [Score(None, Status.TIMEOUT, info={"reason": reason, NOT_ASKED: True})] * len(inputs)
        scores = _in_child(rule.score, inputs) if rule.runs == "inline" else _two_first(rule, inputs)
        strikes = strikes + 1 if scores and all(score.status is Status.TIMEOUT for score in scores) else 0
        return scores

    return replace(rule, score=ask)


def _two_first(rule: Rule, inputs: Sequence[RewardInput]) -> list[Score]:
    """The scores; where the first two time out, so would the rest."""
    if rule.grouped or len(inputs) <= 2:
        return rule.score(inputs)
    first = rule.score(inputs[:2])
    if all(score.status is Status.TIMEOUT for score in first):
        return first + [first[-1]] * len(inputs[2:])
    return first + rule.score(inputs[2:])


def _in_child(score: _Batch, inputs: Sequence[RewardInput]) -> list[Score]:
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    child = context.Process(target=_answer, args=(theirs, score, inputs), daemon=True)
    child.start()
    theirs.close()
    try:
        if not ours.poll(INLINE_LIMIT_S):
            reason = f"no verdict after {INLINE_LIMIT_S:g} s, and it runs inline: nothing could stop it"
            return [failure(Status.TIMEOUT, reason, run_s=INLINE_LIMIT_S)] * len(inputs)
        return [
            Score(value, Status(status), info=info, run_s=run_s)
            for value, status, info, run_s in json.loads(ours.recv_bytes())
        ]
    except EOFError:
        return [failure(Status.ERROR, "the process that ran it died (crash or out of memory)")] * len(inputs)
    finally:
        child.kill()
        child.join()
        ours.close()


def _answer(connection: Connection, score: _Batch, inputs: Sequence[RewardInput]) -> None:
    rows = [[s.value, s.status, dict(s.info), s.run_s] for s in score(inputs)]
    connection.send_bytes(json.dumps(rows, default=repr).encode())
