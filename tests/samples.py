"""Random samples for the tests of learners."""

from __future__ import annotations

import numpy as np

from grpo.packing import pack
from grpo.records import PackedBatch, TrainingSample


def batches(seed: int = 0) -> list[list[PackedBatch]]:
    """A mini-batch of three groups of four random samples, in two micro-batches."""
    rng = np.random.default_rng(seed)

    def sample(prompt: tuple[int, ...]) -> TrainingSample:
        ids = tuple(rng.integers(0, 50, 7).tolist())
        return TrainingSample(prompt, ids, 1 / 84, float(rng.normal()), tuple(rng.uniform(-5, -3, 7).tolist()))

    prompts = [tuple(rng.integers(0, 50, 6).tolist()) for _ in range(3)]
    return [pack([[sample(prompt) for _ in range(4)] for prompt in prompts], 80)]
