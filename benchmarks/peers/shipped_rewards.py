"""Peer: a framework's reward functions, called as it calls them. Run by benchmarks/adapters.py in .venv-rewards.

python -m benchmarks.peers.shipped_rewards SAMPLES.json CASES.json     # prints case -> the value of every sample
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

Samples = list[dict[str, Any]]


def load(function: str) -> Any:
    where, _, name = function.rpartition(":")
    if not where.endswith(".py"):
        return getattr(importlib.import_module(where), name)
    spec = importlib.util.spec_from_file_location(Path(where).stem, where)
    assert spec is not None and spec.loader is not None, where
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, name)


def chat(sample: dict[str, Any]) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    prompt, completion = sample["prompt"], sample["completion"]
    return [{"role": "user", "content": prompt}], [{"role": "assistant", "content": completion}]


def trl(case: dict[str, Any], samples: Samples) -> list[float | None]:
    """As GRPOTrainer._calculate_rewards: all samples of the batch at once."""
    chats = [chat(sample) for sample in samples]
    return load(case["function"])(
        prompts=[prompt for prompt, _ in chats],
        completions=[completion for _, completion in chats],
        completion_ids=[sample["completion_ids"] for sample in samples],
        solution=[sample["gold"] for sample in samples],
        trainer_state=None,
        log_extra=lambda *_: None,
        log_metric=lambda *_: None,
    )


def verl(case: dict[str, Any], samples: Samples) -> list[float]:
    """As its reward managers call a dispatcher, and its dispatcher the files."""
    function, values = load(case["function"]), []
    for sample in samples:
        if case["dispatched"]:
            answer = function(
                data_source=case["fields"]["data_source"],
                solution_str=sample["completion"],
                ground_truth=sample["gold"],
                extra_info={},
            )
        else:
            answer = function(sample["completion"], sample["gold"], **case["kwargs"])
        answer = answer["score"] if isinstance(answer, dict) else answer
        values.append(float(answer[0] if isinstance(answer, tuple) else answer))
    return values


def openrlhf(case: dict[str, Any], samples: Samples) -> list[float]:
    """By its own executor."""
    from openrlhf.utils.agent import SingleTurnAgentExecutor

    executor = SingleTurnAgentExecutor(case["function"].rpartition(":")[0])
    queries = [sample["prompt"] + sample["completion"] for sample in samples]
    prompts, labels = [sample["prompt"] for sample in samples], [sample["gold"] for sample in samples]
    answers = asyncio.run(executor._fetch_rewards_via_func(queries, prompts, labels))
    return [answer["rewards"].item() for answer in answers]


def verifiers(case: dict[str, Any], samples: Samples) -> list[float]:
    """By the rubric itself."""
    rubric, values = load(case["function"]), []

    async def score() -> None:
        for sample in samples:
            prompt, completion = chat(sample)
            state: Any = {"prompt": prompt, "completion": completion, "answer": sample["gold"], "task": "default"}
            state |= {"info": {}, "trajectory": [], "timing": {"scoring_ms": 0.0, "total_ms": 0.0}}
            await rubric.score_rollout(state, contextlib.nullcontext())
            values.append(state["reward"])

    asyncio.run(score())
    return values


def main(samples_file: str, cases_file: str) -> dict[str, list[float | None]]:
    samples, cases = (json.loads(Path(file).read_text()) for file in (samples_file, cases_file))
    styles = {"trl": trl, "verl": verl, "openrlhf": openrlhf, "verifiers": verifiers}
    results = {}
    with contextlib.redirect_stdout(sys.stderr):  # some of them print every sample
        for case in cases:
            mine = [{**samples[place], "gold": gold} for place, gold in case["golds"]]
            results[case["name"]] = styles[case["style"]](case, mine)
    return results


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:])))
