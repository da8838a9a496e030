"""Routes that vLLM took, in the learner: the same ones in FP32, and replayed where they are others."""

from __future__ import annotations

import dataclasses
import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from grpo.config import Config, GRPOConfig, ModelConfig, RolloutConfig
from grpo.learner import Learner
from grpo.records import Group, PackedBatch, Prompt, Sample
from grpo.roles import RolloutRole
from grpo.steps import pack_step, sampling_params, with_advantages
from grpo.weight_sync import Bucket, Canary
from model import DeepseekV3ForCausalLM, SequenceLayout
from model.moe import Experts, TopkRouter
from rewards import Score
from rollout import WeightFault

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="`make test-vllm` has vLLM"),
]
CONFIG = Config(
    rollout=RolloutConfig(
        engine="vllm",
        engine_options={"kv_cache_gb": 0.03},
        max_num_seqs=96,
        replay_routing=True,
        max_completion_length=30,
    ),
    grpo=GRPOConfig(num_generations=4, prompts_per_step=24, learning_rate=1e-9),
)


@pytest.fixture(scope="module")
def directory(vllm_tiny: Any) -> Path:
    return vllm_tiny()


@pytest.fixture(scope="module")
def groups(directory: Path) -> list[Group]:
    """What a rollout role with vLLM answers to 24 prompts of 2 to 24 tokens."""
    rng = np.random.default_rng(0)
    prompts = [Prompt(f"p{i}", "", tuple(rng.integers(3, 96, 2 + 3 * i % 23).tolist())) for i in range(24)]
    role = RolloutRole(CONFIG, str(directory))
    completions = role.engine.generate([p.token_ids for p in prompts], [sampling_params(CONFIG, p) for p in prompts])
    groups = [
        Group(p, tuple(Sample(p, i, c, "", Score(float(rng.random()))) for i, c in enumerate(group)))
        for p, group in zip(prompts, completions)
    ]
    return with_advantages(groups, CONFIG)


@pytest.fixture
def batch(groups: list[Group]) -> PackedBatch:
    [[batch]] = pack_step(groups, CONFIG)
    return batch


@torch.no_grad()
def routes(learner: Learner, batch: PackedBatch) -> torch.Tensor:
    """[T, L, K] sorted: the learner's experts of the packed tokens."""
    layout = SequenceLayout.from_segments(batch.cu_seqlens, batch.parent, batch.position_ids)
    model = learner.policy.model
    experts = model.forward_packed(batch.input_ids, layout, batch.routed_experts, output_routing=True).routed_experts
    assert experts is not None
    return experts.sort(-1).values


def test_routes_are_the_learners(directory: Path, groups: list[Group], batch: PackedBatch) -> None:
    """Over 5,000 token-layers; a byte an expert on the way."""
    experts = [s.completion.routed_experts for group in groups for s in group.samples]
    assert {e.dtype for e in experts if e is not None} == {np.dtype(np.uint8)}
    learner = Learner(directory, CONFIG.grpo)
    assert batch.routed_experts is not None
    own = routes(learner, dataclasses.replace(batch, routed_experts=None))
    assert own.shape[0] * own.shape[1] > 5_000
    assert int((own != batch.routed_experts.sort(-1).values).any(-1).sum()) == 0
    metrics = learner.step([[batch]]).metrics
    assert metrics["sampling/routes_differ"] == 0
    assert metrics["sampling/sampling_logp_difference/max"] < 1e-4


def test_the_loss_uses_planted_routes(directory: Path, batch: PackedBatch, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other experts for every tenth token: in both layers, against routers that choose them; in the last, counted."""
    learner = Learner(directory, CONFIG.grpo)
    true = batch.routed_experts
    assert true is not None
    planted = true.clone()
    planted[::10] = (true[::10] + 3) % 8  # of 8 experts: no choice of two stays as it was
    flipped = dataclasses.replace(batch, routed_experts=planted)
    assert torch.equal(routes(learner, flipped), planted.sort(-1).values)
    replayed = learner.logprobs(flipped)
    assert (replayed - learner.logprobs(batch)).abs().max() > 0.1
    loss = learner.step([[flipped]]).metrics["loss"]

    other, calls = Learner(directory, CONFIG.grpo), []

    def select(self: TopkRouter, scores: torch.Tensor) -> torch.Tensor:
        calls.append(len(scores))
        return planted[:, (len(calls) - 1) % 2]

    with monkeypatch.context() as patch:
        patch.setattr(TopkRouter, "select", select)
        free = dataclasses.replace(batch, routed_experts=None)
        assert torch.equal(other.logprobs(free), replayed)
        assert other.step([[free]]).metrics["loss"] == loss
    assert len(calls) == 4

    planted = true.clone()
    planted[::10, -1] = (true[::10, -1] + 3) % 8
    metrics = Learner(directory, CONFIG.grpo).step([[dataclasses.replace(batch, routed_experts=planted)]]).metrics
    assert metrics["sampling/routes_differ"] == pytest.approx(len(planted[::10]) / len(planted))


@pytest.fixture(scope="module")
def directory_in_bf16(vllm_tiny: Any) -> Path:
    """A model in which it matters which experts are taken."""
    directory = vllm_tiny(num_hidden_layers=8)
    model = DeepseekV3ForCausalLM.from_pretrained(directory)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, Experts):
                module.down_proj.mul_(3.0)
    model.save_pretrained(directory)
    return directory


def posted(learner: Learner, monkeypatch: pytest.MonkeyPatch) -> tuple[list[Bucket], Canary]:
    """A push, and its canaries, of a learner whose routers choose other experts than its engine's: planted, as it
    depends on the machine where BF16 breaks ties otherwise."""
    select = TopkRouter.select
    with monkeypatch.context() as patch:
        patch.setattr(TopkRouter, "select", lambda self, scores: (select(self, scores) + 3) % 8)
        return learner.weights(), learner.canary()


def test_canaries_in_bf16_are_judged_with_the_routes_that_vllm_took(
    directory_in_bf16: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = CONFIG.model_copy(update={"model": ModelConfig(dtype="bfloat16")})
    role = RolloutRole(config, str(directory_in_bf16))
    learner = Learner(directory_in_bf16, GRPOConfig(), dtype="bfloat16", canaries=True)
    buckets, own = posted(learner, monkeypatch)
    found = role.load_weights(buckets, 0)["rerouted"]
    assert found is not None and found.cap == 5e-2
    assert np.abs(np.subtract(found.logprobs, own.logprobs)).mean() > 5e-2  # with its own routes the learner differs
    learner.check_rerouted(found)

    with torch.no_grad():  # an engine with other weights, and routes of its own: not what the learner computes
        learner.policy.model.lm_head.weight.mul_(1.2)
    with pytest.raises(WeightFault, match=r"with the engine's own choice of experts .* \(0\.05 is allowed\)"):
        learner.check_rerouted(found)


def test_without_routes_canaries_in_bf16_have_to_agree(
    directory_in_bf16: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = CONFIG.model_copy(
        update={
            "model": ModelConfig(dtype="bfloat16"),
            "rollout": CONFIG.rollout.model_copy(update={"replay_routing": False}),
        }
    )
    learner = Learner(directory_in_bf16, GRPOConfig(), dtype="bfloat16", canaries=True)
    buckets, _ = posted(learner, monkeypatch)
    with pytest.raises(WeightFault, match=r"on average 0\.05 is allowed.*rollout\.replay_routing would tell"):
        RolloutRole(config, str(directory_in_bf16)).load_weights(buckets, 0)
