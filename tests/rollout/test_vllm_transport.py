"""Weights reach a real vLLM from a learner in another process, by broadcast (gloo) and through shared memory."""

from __future__ import annotations

import importlib.util
import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from grpo.config import Config, GRPOConfig, load_config
from grpo.learner import Learner
from grpo.roles import RolloutRole
from grpo.transport import build_transport
from rollout import SamplingParams

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="`make test-vllm` has vLLM"),
]
PROMPTS = [np.random.default_rng(i).integers(3, 96, 2 + 3 * i % 23).tolist() for i in range(6)]
KINDS = {"broadcast": "lm_head.weight", "ipc": "model.layers.3.shared_head.norm.weight"}  # -> what is damaged
SPAWN = multiprocessing.get_context("spawn")


def settings(transport: str) -> Config:
    options = {"max_model_len": 64, "kv_cache_gb": 0.03}
    rollout = {"engine": "vllm", "engine_options": options, "weight_transport": transport, "broadcast_timeout": 20}
    return load_config({"rollout": rollout})


def learn(directory: str, calls: Any, answers: Any) -> None:
    """A learner that changes a part of its weights, posts them, and flips a bit on the way if asked."""
    torch.set_num_threads(1)
    learner = Learner(directory, GRPOConfig(), canaries=True)
    ends = {kind: build_transport(settings(kind), "learner", "") for kind in KINDS}
    state = learner.policy.model.state_dict()
    while (call := calls.get()) is not None:
        kind, version, part, since, damaged = call
        learner.transport, learner.policy_version = ends[kind], version
        with torch.no_grad():
            for name, tensor in state.items():
                if part in name:
                    tensor *= 1.05
        posted = learner.weights(since, ["rollout-0"])
        bits = state["lm_head.weight"].view(torch.int32)
        if damaged and kind == "ipc":
            bits = list(ends[kind].kept.values())[-1][-1].view(torch.int32).view(1, -1)  # type: ignore[attr-defined]
        if damaged:
            bits[-1, -1] ^= 1
        answers.put(posted)
        learner.send_weights(posted)
        if damaged and kind == "broadcast":
            bits[-1, -1] ^= 1
        calls.get()  # the engine has loaded
        learner.release_weights(posted)


def test_a_learner_in_another_process(vllm_tiny: Callable[..., Path]) -> None:
    directory = str(vllm_tiny())
    calls, answers = SPAWN.Queue(), SPAWN.Queue()
    process = SPAWN.Process(target=learn, args=(directory, calls, answers), daemon=True)
    process.start()
    role = RolloutRole(settings("broadcast"), directory, "rollout-0")
    ends = {kind: build_transport(settings(kind), "rollout-0", "") for kind in KINDS}
    params = SamplingParams(temperature=0.0, max_tokens=10, ignore_eos=True)

    def push(kind: str, version: int, part: str, since: int | None, damaged: bool = False) -> dict[str, float]:
        calls.put((kind, version, part, since, damaged))
        role.transport = ends[kind]
        try:
            return role.load_weights(answers.get(timeout=60), version)
        finally:
            calls.put("loaded")

    def drawn() -> list[Any]:
        return [(c.token_ids, c.logprobs) for group in role.engine.generate(PROMPTS, params) for c in group]

    version, seen = 0, [drawn()]
    for kind, damaged in KINDS.items():
        whole = push(kind, version + 1, "", None)  # every tensor, each proved as it lies in the engine, and canaries
        seen.append(drawn())
        changes = push(kind, version + 2, "self_attn.o_proj", version + 1)
        seen.append(drawn())
        assert 0 < changes["bytes"] < 0.1 * whole["bytes"] and changes["check_seconds"] > 0
        with pytest.raises(ValueError, match=rf"^{damaged} of version {version + 3} was damaged on its way"):
            push(kind, version + 3, "", None, damaged=True)
        assert drawn() == seen[-1] and role.engine.policy_version == version + 2  # nothing of it was taken
        version += 3
    assert len({str(tokens) for tokens in seen}) == len(seen)
    calls.put(None)
    process.join(20)
