"""The generative_reward: a model that writes its reasons and then a grade, as DeepSeek-V3's model-based reward does."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rewards.chat_client import ChatClient, Endpoint, Reply, check_sampling
from rewards.grading import Ask, grade, grading
from rewards.judge import asker
from rewards.judge_text import Question, digest
from rewards.records import RewardInput, Score, Status
from rewards.rule import Rule

Generate = Callable[[Sequence[str]], Sequence[str | None]]  # a text to each prompt; equal prompts are drawn anew


def generative_reward(
    *,
    model: str = "",
    base_url: str = "",
    api_key_env: str = "",
    chat: bool = False,
    template: str = "",
    rubric: str = "",
    scale: Sequence[int] = (0, 1),
    reference: str = "auto",
    include_thinking: bool = False,
    votes: int = 1,
    temperature: float = 0.0,
    max_tokens: int = 512,
    seed: int = 0,
    timeout: float = 120.0,
    retries: int = 4,
    concurrency: int = 16,
    requests_per_minute: int = 0,
    tokens_per_minute: int = 0,
    max_requests: int = 0,
    max_total_tokens: int = 0,
    load_generator: Callable[[str, Mapping[str, Any]], Generate] | None = None,
    generate: Generate | None = None,
) -> Rule:
    """A grade from 0 to 1: a model writes its reasons, then `Verdict: N` on the last line (N on `scale`).

    DeepSeek-V3 (arXiv 2412.19437, section 5.2.1): with a reference answer, whether the response matches it; without
    one, a grade from question and response alone (`reference`). The model is a directory (`model`; `chat`: questions go
    through its chat template), or with `base_url` an endpoint that serves it. `grpo rewards verdicts` makes data that
    `grpo sft` trains one on. Other options are those of `judge`; those about requests are for an endpoint.

    `votes`: so many verdicts of each completion, of which the most frequent counts (the policy as its own judge); needs
    a temperature above 0. Resources: `load_generator(model, options)` makes an engine over a directory, which it may
    load on first use; `generate` stands in where neither model nor base_url is given. An answer without a verdict is an
    ERROR. ValueError: a bad option, or no model.
    """
    if isinstance(votes, bool) or not isinstance(votes, int) or votes < 1:
        raise ValueError(f"rewards.generative_reward.votes is {votes!r}; give a whole number, 1 or more")
    if votes > 1 and temperature == 0:
        raise ValueError(
            f"rewards.generative_reward.votes is {votes}, but at temperature 0 all of them are the same; set "
            "rewards.generative_reward.temperature, e.g. to 1"
        )
    check_sampling("generative_reward", temperature, max_tokens, seed)
    how = grading("generative_reward", template, rubric, scale, reference, include_thinking)
    if base_url:
        limits = (requests_per_minute, tokens_per_minute, max_requests, max_total_tokens)
        sampling = (temperature, max_tokens, seed, timeout, retries, concurrency)
        client = ChatClient("generative_reward", Endpoint(base_url, model, api_key_env, *sampling, *limits))
        ask, close = asker(client, structured=False), client.close
    else:
        if model:
            if not callable(load_generator):
                raise ValueError(
                    f"rewards.generative_reward.model is {model!r}, and nothing here loads models; set "
                    "rewards.generative_reward.base_url to an endpoint that serves it"
                )
            options = {"temperature": temperature, "max_tokens": max_tokens, "seed": seed, "chat": chat}
            generate = load_generator(model, options)
        if not callable(generate):
            raise ValueError(
                "rewards.generative_reward has no model; set rewards.generative_reward.model to a directory, and "
                "base_url too where an endpoint serves it"
            )
        ask, close = _asks(generate), getattr(generate, "close", None)

    def score(inputs: Sequence[RewardInput]) -> list[Score]:
        return grade(inputs, how, ask, votes)

    version = digest(how, model, getattr(generate, "version", ""), temperature, max_tokens, seed, votes, chat)
    return Rule(score, how.needs, (0.0, 1.0), "model", version, close=close)


def prompt_of(question: Question, body: str) -> str:
    """What the model reads, in training as in use."""
    return f"{body}\n\n{question.ending}"


def _asks(generate: Generate) -> Ask:
    def ask(question: Question, bodies: Sequence[str]) -> list[Reply]:
        start = time.perf_counter()
        texts = generate([prompt_of(question, body) for body in bodies])
        run_s = (time.perf_counter() - start) / max(1, len(texts))
        missing = "no whole answer: the question is longer than the model's context, or the answer than max_tokens"
        return [
            Reply("", Status.ERROR, missing, run_s=run_s) if text is None else Reply(text, run_s=run_s)
            for text in texts
        ]

    return ask
