"""Pushes to vLLM of what changed: exact for every unit that is loaded as one, small for an adapter, refused where the
base is another.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from grpo.config import Config, GRPOConfig, RolloutConfig
from grpo.learner import Learner
from grpo.roles import RolloutRole
from model import DeepseekV3ForCausalLM
from model.names import hf_state, load_unit
from rollout import SamplingParams, WeightFault, build_engine
from tests.weights import unpacked

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="`make test-vllm` has vLLM"),
]
OPTIONS: dict[str, Any] = {"kv_cache_gb": 0.03}
PROMPTS = [np.random.default_rng(i).integers(3, 96, 2 + 3 * i % 23).tolist() for i in range(12)]


@pytest.fixture(scope="module")
def directory(vllm_tiny: Callable[..., Path]) -> Path:
    """Most of its weights are experts, as in large models."""
    return vllm_tiny(n_routed_experts=64, n_group=1)


@pytest.fixture(scope="module")
def role(directory: Path) -> RolloutRole:
    role = RolloutRole(Config(rollout=RolloutConfig(engine="vllm", engine_options=OPTIONS)), str(directory))
    return role


@pytest.fixture
def learner(directory: Path, role: RolloutRole) -> Learner:
    """A learner that has pushed everything."""
    learner = Learner(directory, GRPOConfig(), canaries=True)
    role.load_weights(learner.weights(), 0)
    return learner


def drawn(engine: Any) -> list[Any]:
    params = SamplingParams(temperature=0.0, max_tokens=10, ignore_eos=True)
    return [(c.token_ids, c.logprobs) for group in engine.generate(PROMPTS, params) for c in group]


def units(learner: Learner) -> list[str]:
    """One unit of every kind that the model has outside its MTP layer, which vLLM does not run."""
    found: dict[str, str] = {}
    for name, _ in hf_state(learner.policy.model):
        if ".layers.3." not in name:
            unit = load_unit(name)
            found.setdefault(".".join(part for part in unit.split(".") if not part.isdigit()), unit)
    return list(found.values())


def test_every_unit_may_come_alone(learner: Learner, role: RolloutRole, tmp_path: Path) -> None:
    """Each changes by itself; the proof over all tensors holds after each push, and the last engine is a fresh one."""
    model = learner.policy.model
    kinds = units(learner)
    assert len(kinds) == 17
    generator = torch.Generator().manual_seed(1)
    for version, unit in enumerate(kinds, 1):
        with torch.no_grad():
            for name, tensor in hf_state(model):  # views: the model changes
                if load_unit(name) == unit:
                    tensor += 0.05 * torch.randn(tensor.shape, generator=generator)
        learner.policy_version = version
        made = learner.weights(since=version - 1)
        assert {
            load_unit(entry.name) for bucket in made for entry in bucket.entries if ".layers.3." not in entry.name
        } == {unit}
        role.load_weights(made, version)
        role.engine.check_weights([(name, tensor.clone()) for name, tensor in hf_state(model)])  # type: ignore[attr-defined]
    model.save_pretrained(tmp_path / "model")
    fresh = build_engine(tmp_path / "model", "vllm", dtype="float32", **OPTIONS)
    assert drawn(role.engine) == drawn(fresh)


def test_a_change_of_attention_sends_under_5_percent(learner: Learner, role: RolloutRole, tmp_path: Path) -> None:
    """What an adapter on attention comes to, merged. Results are a fresh engine's to the last bit."""
    whole = sum(bucket.nbytes for bucket in learner.weights())
    before = drawn(role.engine)
    for version in (1, 2, 3):
        generator = torch.Generator().manual_seed(version)
        with torch.no_grad():
            for name, tensor in learner.policy.model.state_dict().items():
                if "self_attn" in name and name.endswith("_proj.weight") and "mtp" not in name:
                    tensor += 0.02 * torch.randn(tensor.shape, generator=generator)
        learner.policy_version = version
        made = learner.weights(since=version - 1)
        assert {entry.name.split(".")[3] for bucket in made for entry in bucket.entries} == {"self_attn"}
        assert 0 < role.load_weights(made, version)["bytes"] < 0.05 * whole
    learner.save(tmp_path / "merged")
    fresh = build_engine(tmp_path / "merged", "vllm", dtype="float32", **OPTIONS)
    assert drawn(fresh) == drawn(role.engine) != before


def test_what_does_not_fit_is_refused_or_found(learner: Learner, role: RolloutRole, directory: Path) -> None:
    engine: Any = role.engine
    pairs = {name: tensor.clone() for name, tensor in hf_state(learner.policy.model)}
    before = drawn(engine)
    half = "model.layers.1.self_attn.q_a_proj.weight"
    with pytest.raises(ValueError, match=r"kv_a_proj_with_mqa\.weight is missing: it must come together with"):
        engine.load_weights([(half, pairs[half])], 1, base=0)
    expert = "model.layers.2.mlp.experts.5.up_proj.weight"
    with pytest.raises(ValueError, match=r"experts\.0\.down_proj.weight is missing: it must come together with"):
        engine.load_weights([(expert, pairs[expert])], 1, base=0)
    with pytest.raises(ValueError, match="came as the changes since 4, but the engine holds 0"):
        engine.load_weights([], 5, base=4)
    assert drawn(engine) == before

    other = DeepseekV3ForCausalLM.from_pretrained(directory)
    with torch.no_grad():
        other.model.layers[1].self_attn.o_proj.weight += 0.01  # type: ignore[union-attr, operator]
    learner.policy_version = 1
    engine.load_weights([(n, t) for n, t in hf_state(other) if "layers.1.self_attn.o_proj" in n], 1, base=0)
    made = learner.weights(since=0)  # nothing changed, says the learner; the canaries know better
    assert not unpacked(made)
    with pytest.raises(WeightFault, match="canary prompts under version 1"):
        role.load_weights(made, 1)
    with pytest.raises(ValueError, match="load a whole version first"):
        role.load_weights(made, 1)
    role.load_weights(learner.weights(), 1)
    assert drawn(engine) == before
