"""OpenRLHF's grader behind its reward signature, as its wheel has no example; benchmarks/adapters.py loads it twice."""

import torch
from openrlhf.utils.math_utils import extract_boxed_answer, grade_answer


def reward_func(queries: list, prompts: list, labels: list, **kwargs: object) -> dict:
    responses = [query[len(prompt) :] for query, prompt in zip(queries, prompts)]
    pairs = zip(map(extract_boxed_answer, responses), labels)
    scores = torch.tensor([float(found is not None and grade_answer(found, label)) for found, label in pairs])
    return {"rewards": scores - 0.5, "scores": scores, "extra_logs": {"accuracy": scores.mean()}}
