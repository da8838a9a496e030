"""Scoring 10,000 math and format samples through build_rewards against the bare library calls. Writes
results/reward_throughput.json.

    python -m benchmarks.reward_throughput

The samples are GSM8K model solutions whose answers were put into boxes, in four ways of writing a number, half of
them in think and answer tags. Both sides score every sample for both its answer and its layout on two processes that
have been started and warmed: ours are the killable workers of the pool; the peer's are multiprocessing's, which call
math-verify's parse and verify with their defaults and match one regular expression, 64 samples a message.
"""

from __future__ import annotations

import json
import logging
import multiprocessing
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import ROOT, alternate, machine, quartiles, versions, write_result
from rewards import RewardInput, Rewards, build_rewards

CLAIM = "10,000 math and format samples are scored in at most 1.2 times the time of the bare library calls."
SAMPLES, PROCESSES, ROUNDS, CHUNK = 10_000, 2, 3, 64
LAYOUT = re.compile(r"\s*<think>(?:(?!</?think>|</?answer>).)+</think>\s*<answer>(?:(?!</?think>|</?answer>).)+</answer>\s*", re.DOTALL)  # fmt: skip  # noqa: E501
WAYS = ("{0}", "{0}.0", "\\${0}", "\\frac{{2 \\cdot {0}}}{{2}}")


def samples() -> list[tuple[str, str]]:
    """(completion, gold). SystemExit: GSM8K's model solutions are not there."""
    places = [folder / "shared/data/gsm8k/model_solutions.jsonl" for folder in Path(ROOT).parents]
    found = next((place for place in places if place.exists()), None)
    if found is None:
        raise SystemExit(f"error: {places[0]} is missing; put GSM8K's example_model_solutions.jsonl there")
    rows = []
    for line in found.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        gold = row["ground_truth"].rpartition("A: ")[2]
        for solution in (value for value in row.values() if isinstance(value, dict)):
            thoughts, _, answer = solution["solution"].rpartition("A: ")
            rows.append((thoughts.strip(), answer.strip(), gold))
    made = []
    for place in range(SAMPLES):
        thoughts, answer, gold = rows[place % len(rows)]
        box = f"\\boxed{{{WAYS[place % len(WAYS)].format(answer)}}}"
        tagged = place // len(WAYS) % 2
        made.append((f"<think>{thoughts}</think>\n<answer>{box}</answer>" if tagged else f"{thoughts}\n{box}", gold))
    return made


def bare(sample: tuple[str, str]) -> tuple[float, float]:
    """What one writes without this package."""
    from math_verify import parse, verify

    completion, gold = sample
    right = verify(parse(f"\\boxed{{{gold}}}"), parse(completion))
    return float(right), float(LAYOUT.fullmatch(completion) is not None)


def score_bare(pool: Any, rows: Sequence[tuple[str, str]]) -> dict[str, Any]:
    start = time.perf_counter()
    values = pool.map(bare, rows, chunksize=CHUNK)
    return {"seconds": time.perf_counter() - start, "values": values}


def score_ours(rewards: Rewards, rows: Sequence[tuple[str, str]]) -> dict[str, Any]:
    inputs = [RewardInput("", completion, {"answer": gold}) for completion, gold in rows]
    start = time.perf_counter()
    scores = rewards.score(inputs)
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "values": [(s.parts["math_answer"], s.parts["format_tags"]) for s in scores]}


def main() -> None:
    before = machine()
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    rows = samples()
    mapping = {"math_answer": 1.0, "format_tags": 0.2}
    with (
        multiprocessing.get_context("forkserver").Pool(PROCESSES) as pool,
        build_rewards(mapping, workers=PROCESSES) as rewards,
    ):
        sides = {"ours": lambda: score_ours(rewards, rows), "bare": lambda: score_bare(pool, rows)}
        score_ours(rewards, rows[:200])
        score_bare(pool, rows[:200])
        rounds = alternate(sides, ROUNDS)
    seconds = {side: quartiles([run["seconds"] for run in runs]) for side, runs in rounds.items()}
    ratio = seconds["ours"]["median"] / seconds["bare"]["median"]
    pairs = list(zip(rounds["ours"][0]["values"], rounds["bare"][0]["values"]))
    results = {
        "samples": len(rows),
        "processes": PROCESSES,
        "seconds": seconds,
        "ratio": ratio,
        "same_math_verdicts": sum(one[0] == other[0] for one, other in pairs) / len(pairs),
        "same_format_verdicts": sum(one[1] == other[1] for one, other in pairs) / len(pairs),
        "versions": versions("math-verify", "sympy"),
    }
    print(
        f"ours {seconds['ours']['median']:.2f} s, bare {seconds['bare']['median']:.2f} s: {ratio:.2f} times its time; "
        f"same verdicts: math {results['same_math_verdicts']:.4f}, format {results['same_format_verdicts']:.4f}"
    )
    print(write_result("reward_throughput", CLAIM, before, results))


if __name__ == "__main__":
    main()
