"""vLLM drafting with the MTP layer: greedy tokens and log-probabilities as without, and a draft model that follows."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from grpo.cluster import Cluster
from grpo.config import Config, GRPOConfig, RolloutConfig, RunConfig
from grpo.learner import Learner
from grpo.roles import RolloutRole
from model import DeepseekV3ForCausalLM
from model.names import hf_state
from rollout import SamplingParams, WeightFault, build_engine

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="`make test-vllm` has vLLM"),
]
OPTIONS: dict[str, Any] = {"kv_cache_gb": 0.03}
PROMPTS = [np.random.default_rng(i).integers(3, 96, 2 + 3 * i % 23).tolist() for i in range(24)]
GREEDY = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)


@pytest.fixture(scope="module")
def directory(vllm_tiny: Callable[..., Path]) -> Path:
    """A model whose MTP layer often agrees with it: attention and experts add little to the embedding."""
    path = vllm_tiny()
    model = DeepseekV3ForCausalLM.from_pretrained(path)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith(("o_proj.weight", "down_proj", "down_proj.weight")):
                tensor *= 0.01
        width = model.config.hidden_size
        model.mtp_layers[0].eh_proj.weight[:, :width] = torch.eye(width)  # type: ignore[union-attr, operator, index]
        model.mtp_layers[0].eh_proj.weight[:, width:] = 0  # type: ignore[union-attr, operator, index]
    model.save_pretrained(path)
    return path


@pytest.fixture(scope="module", params=[1, 3])
def role(request: pytest.FixtureRequest, directory: Path) -> RolloutRole:
    rollout = RolloutConfig(
        engine="vllm", engine_options=OPTIONS, speculative_tokens=request.param, replay_routing=True
    )
    role = RolloutRole(Config(rollout=rollout), str(directory))
    return role


def drawn(engine: Any, params: SamplingParams = GREEDY) -> list[Any]:
    return [completion for group in engine.generate(PROMPTS, params) for completion in group]


def test_speculation_changes_nothing_but_the_speed(role: RolloutRole, directory: Path) -> None:
    """Greedy: tokens, log-probabilities and routes are the embedded engine's, at 24 x 24 tokens. A push after that
    changes policy and draft; both are proved, and it holds again."""
    learner = Learner(directory, GRPOConfig(), canaries=True)
    role.load_weights(learner.weights(), 0)
    embedded = build_engine(directory, enable_return_routed_experts=True)
    for version in (1, 2):
        ours, theirs = drawn(embedded), drawn(role.engine)
        assert [c.token_ids for c in ours] == [c.token_ids for c in theirs]
        assert max(np.abs(np.subtract(a.logprobs, b.logprobs)).max() for a, b in zip(ours, theirs)) < 1e-4
        routes = [(np.sort(a.routed_experts, -1), np.sort(b.routed_experts, -1)) for a, b in zip(ours, theirs)]
        assert sum(int((a != b).any(-1).sum()) for a, b in routes) == 0
        generator = torch.Generator().manual_seed(version)
        with torch.no_grad():
            for tensor in learner.policy.model.state_dict().values():
                tensor += 0.005 * torch.randn(tensor.shape, generator=generator)
        learner.policy_version = version
        answer = role.load_weights(learner.weights(since=version - 1), version)
        assert 0.1 * answer["drafted"] < answer["accepted"] < answer["drafted"]
        embedded.load_weights(hf_state(learner.policy.model), version)


def test_sampled_log_probabilities_are_the_learners(role: RolloutRole, directory: Path) -> None:
    role.load_weights(Learner(directory, GRPOConfig()).weights(), 0)
    model = DeepseekV3ForCausalLM.from_pretrained(directory)
    params = SamplingParams(temperature=0.8, max_tokens=20, seed=3, ignore_eos=True)
    completions = drawn(role.engine, params)
    assert [c.token_ids for c in drawn(role.engine, params)] == [c.token_ids for c in completions]
    for prompt, completion in zip(PROMPTS, completions):
        with torch.no_grad():
            logits = model(torch.tensor([[*prompt, *completion.token_ids]])).logits[0, len(prompt) - 1 : -1] / 0.8
        want = logits.log_softmax(-1).gather(1, torch.tensor(completion.token_ids)[:, None])[:, 0]
        np.testing.assert_allclose(completion.logprobs, want, atol=1e-4)


def test_samples_keep_the_policys_distribution(role: RolloutRole, directory: Path) -> None:
    """1,500 second tokens, each drafted and then accepted or replaced: chi-squared against exact probabilities."""
    role.load_weights(Learner(directory, GRPOConfig()).weights(), 0)
    role.engine.speculated()  # type: ignore[attr-defined]
    model, prompt, temperature = DeepseekV3ForCausalLM.from_pretrained(directory), PROMPTS[3], 0.7
    with torch.no_grad():
        first = (model(torch.tensor([prompt])).logits[0, -1].double() / temperature).softmax(-1)
        rows = torch.tensor([[*prompt, token] for token in range(96)])
        second = first @ (model(rows).logits[:, -1].double() / temperature).softmax(-1)
    params = SamplingParams(n=1_500, temperature=temperature, max_tokens=4, seed=1, ignore_eos=True)
    [group] = role.engine.generate([prompt], params)
    found = np.bincount([c.token_ids[1] for c in group], minlength=96)
    want = second.numpy() * len(group)
    keep = want > 3
    assert want[keep].sum() > 0.7 * len(group)
    chi = float(((found - want) ** 2 / want)[keep].sum())
    degrees = int(keep.sum())
    assert abs(chi - degrees) < 5 * np.sqrt(2 * degrees), (chi, degrees)
    counts = role.engine.speculated()  # type: ignore[attr-defined]
    assert 300 < counts["accepted"] < counts["drafted"]


def test_acceptance_is_a_metric_of_the_sync(directory: Path) -> None:
    """Of what was sampled since the last push, over all engines."""
    rollout = RolloutConfig(engine="vllm", engine_options=OPTIONS, speculative_tokens=2, max_completion_length=12)
    config = Config(run=RunConfig(cluster="inline"), rollout=rollout, rewards={"length": {"weight": 1.0, "max": 6}})
    cluster = Cluster(config, directory, directory)
    assert cluster.sync_weights(0)["rollout/draft_acceptance"] == 0  # nothing sampled yet
    answers = cluster.sample(PROMPTS, [dataclasses.replace(GREEDY, n=1)] * len(PROMPTS))
    assert [len(group[0].token_ids) for group in answers] == [24] * len(PROMPTS)
    metrics = cluster.sync_weights(0)
    assert 0.1 < metrics["rollout/draft_acceptance"] < 1 and metrics["sync/bytes"] == 0


def test_a_stale_draft_is_named(role: RolloutRole, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The policy's loader leaves MTP layers out; without a load of its own the draft would silently fall behind."""
    learner = Learner(directory, GRPOConfig(), canaries=True)
    role.load_weights(learner.weights(), 0)
    model, engine = learner.policy.model, role.engine
    rpc = engine.rpc  # type: ignore[attr-defined]

    def without(method: str, *args: Any) -> Any:
        if method == "load":
            args = ([pair for pair in args[0] if ".layers.3." not in pair[0]],)
        return rpc(method, *args)

    for version, part in enumerate(("self_attn.o_proj", "mlp.experts.down_proj", "eh_proj", "enorm"), 1):
        with torch.no_grad():
            for name, tensor in model.mtp_layers.state_dict().items():
                if part in name:
                    tensor += 0.05
        learner.policy_version = version
        made = learner.weights(since=version - 1)
        with monkeypatch.context() as patch:
            patch.setattr(engine, "rpc", without)
            with pytest.raises(WeightFault, match=rf"draft model: model\.layers\.3\.{part.split('.down')[0]}"):
                role.load_weights(made, version)
        role.load_weights(learner.weights(), version)


def test_truncation_and_a_model_without_mtp_are_refused(
    role: RolloutRole, vllm_tiny: Callable[..., Path], directory: Path
) -> None:
    cuts: list[dict[str, Any]] = [{"top_p": 0.9}, {"top_k": 5}, {"min_p": 0.1}]
    for cut in cuts:
        with pytest.raises(ValueError, match="prompt 0 is to be sampled with top_p, top_k or min_p, and speculative"):
            role.engine.generate([[5]], SamplingParams(max_tokens=2, **cut))
        with pytest.raises(ValueError, match=r"rollout\.speculative_tokens 2 does not go with top_p, top_k or min_p"):
            Config(rollout=RolloutConfig(engine="vllm", speculative_tokens=2, **cut))
    assert role.engine.generate([[5]], dataclasses.replace(GREEDY, top_p=0.9, max_tokens=1))  # greedy has no draw
    with pytest.raises(ValueError, match=r"needs rollout\.engine vllm, not embedded"):
        Config(rollout=RolloutConfig(speculative_tokens=2))
    with pytest.raises(ValueError, match="has no MTP layer to draft with"):
        build_engine(vllm_tiny(num_nextn_predict_layers=0), "vllm", speculative_tokens=1, **OPTIONS)
