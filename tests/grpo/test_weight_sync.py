"""Weights arrive bit by bit as they were sent, as one whole version or not at all."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from grpo.config import Config, GRPOConfig
from grpo.learner import Learner
from grpo.packing import pack
from grpo.records import TrainingSample
from grpo.roles import RolloutRole
from grpo.transport import ObjectStore
from grpo.weight_sync import Bucket, unpack
from model import DeepseekV3ForCausalLM
from model.create import create_model
from model.names import hf_state
from rollout import SamplingParams
from rollout.embedded import EmbeddedEngine
from tests.weights import posted, unpacked

TINY = Path(__file__).resolve().parents[2] / "configs" / "tiny_v3.yaml"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    directory = tmp_path_factory.mktemp("tiny")
    create_model(TINY, directory, seed=0)
    return directory


def tensors() -> list[tuple[str, torch.Tensor]]:
    """Mixed dtypes in an order that misaligns them, NaN and -0.0 among the values, a view with strides, a scalar."""
    generator = torch.Generator().manual_seed(0)
    odd = torch.tensor([0.0, -0.0, float("nan"), float("inf"), 1e-40])
    return [
        ("a", torch.randn(3, 5, generator=generator).bfloat16()),  # 30 bytes
        ("bias", torch.randn(4, generator=generator)),
        ("odd", odd),
        ("odd16", odd.bfloat16()),  # 10 bytes
        ("bytes", torch.arange(7, dtype=torch.uint8)),
        ("strided", torch.randn(6, 4, generator=generator).T),
        ("scalar", torch.tensor(2.5)),
        ("large", torch.randn(100, generator=generator)),
        ("last", torch.randn(2, 2, 2, generator=generator)),
    ]


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("max_bytes", [1, 64, 200, 1 << 20])
def test_round_trip_is_bit_equal(max_bytes: int) -> None:
    sent = tensors()
    got = unpacked(posted(sent, 3, max_bytes))
    assert [name for name, _ in got] == [name for name, _ in sent]
    for (name, want), (_, tensor) in zip(sent, got):
        assert (tensor.dtype, tensor.shape) == (want.dtype, want.shape), name
        assert raw(tensor) == raw(want), name


def test_buckets_are_small_and_numbered() -> None:
    made = posted(tensors(), 3, 64)
    # 30 + 16, 20 + 10 + 7, 96 alone, 4, 400 alone, 32; each tensor starts at a multiple of 16
    assert [b.nbytes for b in made] == [46, 37, 96, 4, 400, 32]
    assert [len(b.payload) for b in made] == [48, 64, 96, 16, 400, 32]
    assert [(b.version, b.index, b.count) for b in made] == [(3, i, 6) for i in range(6)]
    assert len(posted(tensors(), 3)) == 1


def test_buckets_are_copies() -> None:
    weight = torch.zeros(4)
    made = posted([("weight", weight)], 1)
    weight += 1
    assert dict(unpacked(made))["weight"].tolist() == [0, 0, 0, 0]


def test_read_only_memory_and_any_order() -> None:
    made = posted(tensors(), 3, 64)
    for bucket in made:
        bucket.payload.setflags(write=False)  # as Ray hands it over
    got = dict(unpacked(made[::-1]))
    for name, want in tensors():
        assert raw(got[name]) == raw(want), name


def spoiled() -> dict[str, list[Bucket]]:
    made = posted(tensors(), 3, 64)
    other = [dataclasses.replace(b, version=4) for b in made]
    return {
        "nothing": [],
        "last missing": made[:-1],
        "first missing": made[1:],
        "one twice": [*made, made[0]],
        "one twice for another": [*made[:-1], made[0]],
        "mixed": [*made[:2], *other[2:]],
        "both": made + other,
        "of two sizes": [made[0], *posted(tensors(), 3, 200)[1:]],
    }


@pytest.mark.parametrize("case", spoiled())
def test_anything_but_one_whole_version_is_refused(case: str) -> None:
    with pytest.raises(ValueError, match="not one whole version"):
        unpack(spoiled()[case], 3, ObjectStore().fetch)  # at once, before the first tensor


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_engine_takes_over_the_learners_weights(tiny: Path, tmp_path: Path, dtype: str) -> None:
    other = create_model(TINY, tmp_path, seed=1).to(getattr(torch, dtype))
    learner = Learner(tiny, GRPOConfig(), dtype=dtype)
    learner.policy_version = 7
    for name, buffer in learner.policy.model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.uniform_(-0.3, 0.3)  # float32, also in a bfloat16 model
    engine = EmbeddedEngine(other)
    before = engine.generate([[1, 9, 12]], SamplingParams(max_tokens=8, temperature=0))[0][0]
    made = learner.weights()
    assert {entry.dtype for bucket in made for entry in bucket.entries} == {"float32", dtype}
    engine.load_weights(unpacked(made), made[0].version)

    want, got = learner.policy.model.state_dict(), engine.model.state_dict()
    assert want.keys() == got.keys()
    for name, tensor in want.items():
        assert tensor.dtype == got[name].dtype, name
        assert raw(tensor) == raw(got[name]), name
    after = engine.generate([[1, 9, 12]], SamplingParams(max_tokens=8, temperature=0))[0][0]
    fresh = EmbeddedEngine(DeepseekV3ForCausalLM.from_pretrained(tiny, dtype=getattr(torch, dtype)))
    fresh.model.load_state_dict(want)
    fresh.decoder.refresh()
    assert after == dataclasses.replace(
        fresh.generate([[1, 9, 12]], SamplingParams(max_tokens=8, temperature=0))[0][0], policy_version=7
    )
    assert np.array(before.logprobs).tolist() != np.array(after.logprobs).tolist()


WIDE = {"n_routed_experts": 64, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "moe_intermediate_size": 64}


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Most of its weights are experts, as in large models."""
    spec = yaml.safe_load(TINY.read_text())
    spec["config"] |= WIDE
    directory = tmp_path_factory.mktemp("wide")
    create_model(spec, directory, seed=0)
    return directory


def role(directory: Path) -> RolloutRole:
    return RolloutRole(Config(), str(directory))


def nudge(learner: Learner, *parts: str) -> None:
    """Every tensor of the policy whose name has one of the parts changes."""
    with torch.no_grad():
        for name, tensor in learner.policy.model.state_dict().items():
            if any(part in name for part in parts):
                tensor += 0.01 * torch.randn(tensor.shape)
    learner.policy_version += 1


def same(learner: Learner, engine: Any) -> bool:
    got = engine.model.state_dict()
    return all(raw(tensor) == raw(got[name]) for name, tensor in learner.policy.model.state_dict().items())


def test_only_what_changed_travels(wide: Path) -> None:
    learner, worker = Learner(wide, GRPOConfig()), role(wide)
    whole = worker.load_weights(learner.weights(), 0)["bytes"]
    assert whole == 4 * sum(t.numel() for _, t in hf_state(learner.policy.model))
    nudge(learner, "self_attn")
    made = learner.weights(since=0)
    assert {bucket.base for bucket in made} == {0}
    names = [entry.name for bucket in made for entry in bucket.entries]
    assert len(names) == 7 * 4 and all(".self_attn." in name for name in names)  # 7 tensors of 4 layers, MTP's too
    answer = worker.load_weights(made, 1)
    assert answer["policy_version"] == 1 and 0 < answer["bytes"] < 0.05 * whole
    assert same(learner, worker.engine)
    learner.policy_version = 2
    assert worker.load_weights(learner.weights(since=1), 2)["bytes"] == 0
    nudge(learner, "layers.1.mlp")
    worker.load_weights(learner.weights(since=2), 3)
    assert same(learner, worker.engine)


def test_what_is_loaded_as_one_travels_together(wide: Path) -> None:
    """One number of one tensor: its fused partners come along, all experts of its layer, and nothing else."""
    learner = Learner(wide, GRPOConfig())
    state = learner.policy.model.state_dict()
    layer = "model.layers.1."
    cases = {
        layer + "self_attn.q_a_proj.weight": ["self_attn.kv_a_proj_with_mqa.weight", "self_attn.q_a_proj.weight"],
        layer + "mlp.shared_experts.up_proj.weight": [
            "mlp.shared_experts.gate_proj.weight",
            "mlp.shared_experts.up_proj.weight",
        ],
        layer + "mlp.gate.e_score_correction_bias": ["mlp.gate.e_score_correction_bias", "mlp.gate.weight"],
        layer + "mlp.experts.down_proj": sorted(
            f"mlp.experts.{e}.{part}_proj.weight" for e in range(64) for part in ("gate", "up", "down")
        ),
    }
    learner.weights()
    for version, (name, want) in enumerate(cases.items(), 1):
        state[name].flatten()[0] += 1
        learner.policy_version = version
        sent = [entry.name for bucket in learner.weights(since=version - 1) for entry in bucket.entries]
        assert sorted(sent) == [layer + n for n in want]


def test_an_engine_that_missed_a_version_takes_no_changes(wide: Path) -> None:
    learner, worker, late = Learner(wide, GRPOConfig()), role(wide), role(wide)
    worker.load_weights(learner.weights(), 0)
    for version in (1, 2):
        nudge(learner, "self_attn")
        made = learner.weights(since=version - 1)
        worker.load_weights(made, version)
        worker.load_weights(made, version)  # sent again to one that has it
    assert same(learner, worker.engine)
    with pytest.raises(ValueError, match="version 2 came as the changes since 1, but the engine holds 0"):
        late.load_weights(made, 2)
    whole = learner.weights(since=0)  # no longer what was sent last: everything
    assert {bucket.base for bucket in whole} == {None}
    late.load_weights(whole, 2)
    assert same(learner, late.engine)
    with pytest.raises(ValueError, match="on several bases"):
        first, *others = posted(tensors(), 3, 200)
        unpacked([first, *(dataclasses.replace(b, base=2) for b in others)])
    learner.policy_version = 3
    bad = [dataclasses.replace(b, base=2) for b in posted([("model.layers.1.x", torch.ones(1))], 3)]
    with pytest.raises(ValueError, match=r"model\.layers\.1\.x is no tensor"):
        late.load_weights(bad, 3)
    with pytest.raises(ValueError, match="load a complete one first"):
        late.load_weights(learner.weights(since=2), 3)


def test_a_step_of_an_adapter_sends_what_it_trains(wide: Path) -> None:
    lora = {"r": 4, "lora_alpha": 8, "target_modules": ["q_a_proj", "o_proj"], "target_parameters": []}
    learner, worker = Learner(wide, GRPOConfig(learning_rate=1e-2), lora=lora), role(wide)
    whole = worker.load_weights(learner.weights(), 0)["bytes"]
    for version in (1, 2):  # B is 0 at first: A moves from the second step on
        samples = [[TrainingSample((3, 4, 5), (6, 7 + i), 0.5, float(i) - 0.5, (-4.0,) * 2) for i in range(2)]]
        learner.step([pack(samples, 100)])
        made = learner.weights(since=version - 1)
        sent = {entry.name.split(".self_attn.")[-1] for bucket in made for entry in bucket.entries}
        assert sent == {"q_a_proj.weight", "kv_a_proj_with_mqa.weight", "o_proj.weight"}
        assert 0 < worker.load_weights(made, version)["bytes"] < 0.05 * whole
    got = worker.engine.model.state_dict()  # type: ignore[attr-defined]
    merged = learner.published.state_dict()
    assert all(raw(got[name]) == raw(tensor) for name, tensor in merged.items())
