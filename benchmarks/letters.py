"""A known scorer over short texts, for benchmarks of reward models: how much of an answer is of the kind asked for.

`known_score` has the form of a user's reward function, so a run can watch it with weight 0. Standard library alone: it
runs in workers.
"""

from __future__ import annotations

import random
from typing import Any

KINDS = {"v": "aeiou", "c": "bcdfg", "d": "13579"}  # vowels, consonants, odd digits
SHORTEST, LONGEST = 6, 12


def known_score(completion: str, prompt: str) -> float:
    """Share of the characters that are of the kind that the prompt `<number> <kind>:` asks for; 0 for none at all."""
    wanted = KINDS[prompt[-2]]
    return sum(character in wanted for character in completion) / max(len(completion), 1)


def make_rows(count: int, seed: int) -> list[dict[str, Any]]:
    """Pairs of random answers to random prompts, the better one chosen, and a third answer for a warm start.

    Lengths say nothing: those of chosen and rejected have the same distribution.
    """
    draw, rows = random.Random(seed), []
    while len(rows) < count:
        prompt = f"{draw.randrange(1000)} {draw.choice(list(KINDS))}:"
        first, second, third = (_answer(draw) for _ in range(3))
        a, b = known_score(first, prompt), known_score(second, prompt)
        if a == b:
            continue
        chosen, rejected = (first, second) if a > b else (second, first)
        rows.append({"prompt": prompt, "chosen": chosen, "rejected": rejected, "completion": third})
    return rows


def _answer(draw: random.Random) -> str:
    """The share of each kind is anything from none to all."""
    shares = [draw.expovariate(1.0) for _ in KINDS]
    kinds = draw.choices(list(KINDS), shares, k=draw.randint(SHORTEST, LONGEST))
    return "".join(draw.choice(KINDS[kind]) for kind in kinds)
