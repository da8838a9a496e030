"""What resuming a learner means, for the tests of every kind of learner."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from grpo.learner import Learner

State = dict[str, torch.Tensor]


def check_resume(
    learner: Learner, fresh: Learner, steps: Sequence[Any], state: Callable[[Learner], State], folder: Path
) -> State:
    """Saves after two of three steps; a fresh learner, and one that has gone further, repeat the third bit for bit.

    Returns the state after it.
    """
    learner.step(steps[0])
    learner.step(steps[1])
    learner.save(folder)
    updates = learner.updates
    metrics, want = learner.step(steps[2]).metrics, state(learner)
    for resumed in (fresh, learner):
        resumed.load(folder)
        assert (resumed.updates, resumed.policy_version) == (updates, 2)
        assert resumed.step(steps[2]).metrics == metrics
        got = state(resumed)
        assert got.keys() == want.keys()
        for name, tensor in want.items():
            assert torch.equal(got[name], tensor), name
    return want
