"""Learner speed with packed samples against padded ones: the peer is padding. Writes results/packing.json.

    python -m benchmarks.packing

Both sides run grpo.learner on the same samples and the same budget of tokens a micro-batch. Padded: every completion is
filled up to the longest, so all rows have one length, and the filling goes through the head too, as it does in
trainers that pad; its weight in the loss is 0. Ideal gain: padded tokens over packed tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.common import alternate, machine, quartiles, timed, write_result
from benchmarks.make_model import CAP, MEAN_LENGTH, make
from grpo.config import GRPOConfig
from grpo.learner import Learner
from grpo.packing import pack
from grpo.records import PackedBatch, TrainingSample

CLAIM = "Packing gains at least 0.8 of what leaving out every padding token could gain."
PROMPTS, GENERATIONS, PROMPT_LENGTH = 16, 8, 24
BUDGET = 8192  # tokens of a micro-batch
SHARED, ALONE, PADDED = "packed, prompt once a group", "packed, prompt with each sample", "padded"


def lengths(shape: str, rng: np.random.Generator) -> np.ndarray:
    """[PROMPTS, GENERATIONS] completion lengths."""
    if shape == "uneven":  # as benchmarks.make_model's: about geometric
        drawn = rng.geometric(1 / MEAN_LENGTH, (PROMPTS, GENERATIONS))
    else:  # "even": hardly anything to gain
        drawn = rng.integers(CAP - 8, CAP + 1, (PROMPTS, GENERATIONS))
    return np.clip(drawn, 1, CAP)


def samples(shape: str) -> list[list[TrainingSample]]:
    rng = np.random.default_rng(0)
    counts = lengths(shape, rng)
    groups = []
    for row in counts:
        prompt = tuple(rng.integers(3, 40, PROMPT_LENGTH).tolist())
        completions = [tuple(rng.integers(3, 40, n).tolist()) for n in row]
        signs = [(-1.0) ** i for i in range(len(row))]  # advantages
        groups.append(
            [TrainingSample(prompt, c, 1 / counts.sum(), a, (-3.7,) * len(c)) for c, a in zip(completions, signs)]
        )
    return groups


def padded(groups: Sequence[Sequence[TrainingSample]]) -> list[PackedBatch]:
    """Micro-batches of rows of one length."""
    longest = max(len(s.completion_ids) for group in groups for s in group)

    def fill(s: TrainingSample) -> TrainingSample:
        missing = longest - len(s.completion_ids)
        return dataclasses.replace(
            s,
            completion_ids=s.completion_ids + (0,) * missing,
            rollout_logprobs=(*s.rollout_logprobs, *(0.0,) * missing),
        )

    batches = pack([[fill(s)] for group in groups for s in group], BUDGET)
    real = iter(len(s.completion_ids) for group in groups for s in group)
    for batch in batches:
        weights = batch.weights.view(-1, longest)
        for row in weights:
            row[next(real) :] = 0.0
    return batches


def measure(learner: Learner, batches: list[PackedBatch], real: int) -> dict[str, Any]:
    seconds = timed(lambda: learner.step([batches]), repeats=4, warmup=1)
    return {"seconds": quartiles(seconds), "tokens_per_second": quartiles([real / took for took in seconds])}


def compare(shape: str, model: Path) -> dict[str, Any]:
    groups = samples(shape)
    singles = [[s] for group in groups for s in group]
    learner = Learner(model, GRPOConfig(learning_rate=1e-6))
    sides = {SHARED: pack(groups, BUDGET), ALONE: pack(singles, BUDGET), PADDED: padded(groups)}
    real = sum(len(s.completion_ids) for (s,) in singles)
    tokens = {side: sum(len(b.input_ids) for b in batches) for side, batches in sides.items()}
    rounds = alternate({side: lambda b=batches: measure(learner, b, real) for side, batches in sides.items()}, rounds=3)
    speeds = {
        side: quartiles([run["tokens_per_second"]["median"] for run in runs])["median"] for side, runs in rounds.items()
    }
    result: dict[str, Any] = {"completion_tokens": real, "model_tokens": tokens, "tokens_per_second": speeds}
    for side in (SHARED, ALONE):
        gain, ideal = speeds[side] / speeds[PADDED], tokens[PADDED] / tokens[side]
        result[side] = {"gain": gain, "ideal": ideal, "share_of_ideal": gain / ideal}
        print(f"packing {shape}, {side}: {speeds[side]:.0f} tokens/s against {speeds[PADDED]:.0f} padded, "
              f"{gain:.2f} times; ideal {ideal:.2f}, reached {gain / ideal:.2f}")  # fmt: skip
    return result | {"rounds": rounds}


def main() -> None:
    before = machine()
    torch.set_num_threads(1)
    model = make("uneven") / "model"
    print(write_result("packing", CLAIM, before, {shape: compare(shape, model) for shape in ("uneven", "even")}))


if __name__ == "__main__":
    main()
