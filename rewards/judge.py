"""The judge reward: a language model behind an OpenAI-compatible endpoint gives grades, or compares within a group."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import replace

from rewards.chat_client import ChatClient, Endpoint, Reply
from rewards.grading import Ask, grade, grading, total_usage
from rewards.judge_text import BETTER, PAIRWISE, Question, digest, pairwise, template_text
from rewards.pairwise import compare
from rewards.records import RewardInput, Score
from rewards.rule import Rule


def judge(
    *,
    base_url: str,
    model: str,
    api_key_env: str = "",
    mode: str = "pointwise",
    template: str = "",
    rubric: str = "",
    scale: Sequence[int] = (0, 10),
    reference: str = "auto",
    include_thinking: bool = False,
    opponents: int = 0,
    ranking: str = "win_share",
    structured: bool = True,
    temperature: float | None = 0.0,
    max_tokens: int = 1024,
    seed: int | None = 0,
    timeout: float = 120.0,
    retries: int = 4,
    concurrency: int = 16,
    requests_per_minute: int = 0,
    tokens_per_minute: int = 0,
    max_requests: int = 0,
    max_total_tokens: int = 0,
) -> Rule:
    """A grade from 0 to 1 by a language model at `base_url` (the part before /chat/completions).

    `mode` pointwise: a verdict on `scale`, mapped to 0..1. pairwise: completions of a group are compared two by two,
    each pair in both orders, with `opponents` others each (even; 0: all); the score is the share of wins, or with
    `ranking: bradley_terry` the chance to win against an average strength (see rewards/pairwise.py).

    `template` (text, or a .txt or .md file) may use {prompt}, {completion} (pairwise {completion_a}, {completion_b}),
    {rubric}, {answer} and every other column; `rubric` alone changes what the built-in ones ask for. `reference`: show
    the row's answer (auto: where it has one). The judge sees what follows </think>, unless `include_thinking`.

    `structured`: verdicts as JSON by the server's response_format, where it has that; else on the last line. An answer
    without a verdict is an ERROR, never 0. Passing failures are tried again `retries` times. `max_requests` and
    `max_total_tokens` are the budget of this process: once it is spent, every further sample is an ERROR and the
    circuit breaker stops the run. 0 is no limit. Seconds: `timeout`, of one attempt. ValueError: a bad option.
    """
    if mode not in ("pointwise", "pairwise"):
        raise ValueError(f"rewards.judge.mode is {mode!r}; choose pointwise or pairwise")
    endpoint = Endpoint(
        base_url,
        model,
        api_key_env,
        temperature,
        max_tokens,
        seed,
        timeout,
        retries,
        concurrency,
        requests_per_minute,
        tokens_per_minute,
        max_requests,
        max_total_tokens,
    )
    client = ChatClient("judge", endpoint)
    ask = asker(client, structured)
    if mode == "pairwise":
        if ranking not in ("win_share", "bradley_terry"):
            raise ValueError(f"rewards.judge.ranking is {ranking!r}; choose win_share or bradley_terry")
        if isinstance(opponents, bool) or not isinstance(opponents, int) or opponents < 0 or opponents % 2:
            raise ValueError(f"rewards.judge.opponents is {opponents!r}; give an even number, or 0 for all others")
        question = _pair_question(template, rubric)

        def score_groups(inputs: Sequence[RewardInput]) -> list[Score]:
            return compare(inputs, question, ask, opponents, ranking, include_thinking)

        version = digest(question, endpoint.sampling(), structured)
        return Rule(score_groups, question.fields(), (0.0, 1.0), "model", version, grouped=True, close=client.close)
    how = grading("judge", template, rubric, scale, reference, include_thinking)

    def score(inputs: Sequence[RewardInput]) -> list[Score]:
        return grade(inputs, how, ask)

    version = digest(how, endpoint.sampling(), structured)
    return Rule(score, how.needs, (0.0, 1.0), "model", version, close=client.close)


def asker(client: ChatClient, structured: bool) -> Ask:
    """Asks for JSON as long as the server has response_format, for a last line otherwise."""
    plain = threading.Event()
    if not structured:
        plain.set()

    def ask(question: Question, bodies: Sequence[str]) -> list[Reply]:
        if plain.is_set():
            return client.ask([f"{body}\n\n{question.ending}" for body in bodies])
        replies = client.ask([f"{body}\n\n{question.json_ending}" for body in bodies], question.schema)
        again = [place for place, reply in enumerate(replies) if reply.refused_schema]
        if again:
            plain.set()
            for place, reply in zip(again, client.ask([f"{bodies[place]}\n\n{question.ending}" for place in again])):
                replies[place] = replace(reply, usage=total_usage([replies[place], reply]))
        return replies

    return ask


def _pair_question(template: str, rubric: str) -> Question:
    text = template_text("judge", template) or PAIRWISE
    for field in ("{completion_a}", "{completion_b}"):
        if field not in text:
            raise ValueError(f"rewards.judge.template never shows {field}; put it where the judge should read it")
    return pairwise(text, rubric or BETTER)
