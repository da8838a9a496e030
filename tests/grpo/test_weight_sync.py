"""Weights arrive bit by bit as they were sent, as one whole version or not at all."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from grpo.config import GRPOConfig
from grpo.learner import Learner
from grpo.weight_sync import Bucket, buckets, unpack
from model import DeepseekV3ForCausalLM
from model.create import create_model
from rollout import SamplingParams
from rollout.embedded import EmbeddedEngine

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
    got = list(unpack(list(buckets(sent, 3, max_bytes))))
    assert [name for name, _ in got] == [name for name, _ in sent]
    for (name, want), (_, tensor) in zip(sent, got):
        assert (tensor.dtype, tensor.shape) == (want.dtype, want.shape), name
        assert raw(tensor) == raw(want), name


def test_buckets_are_small_and_numbered() -> None:
    made = list(buckets(tensors(), 3, 64))
    # 30 + 16, 20 + 10 + 7, 96 alone, 4, 400 alone, 32
    assert [b.data.nbytes for b in made] == [46, 37, 96, 4, 400, 32]
    assert [(b.version, b.index, b.count) for b in made] == [(3, i, 6) for i in range(6)]
    assert len(list(buckets(tensors(), 3))) == 1


def test_buckets_are_copies() -> None:
    weight = torch.zeros(4)
    made = list(buckets([("weight", weight)], 1))
    weight += 1
    assert dict(unpack(made))["weight"].tolist() == [0, 0, 0, 0]


def test_read_only_memory_and_any_order() -> None:
    made = list(buckets(tensors(), 3, 64))
    for bucket in made:
        bucket.data.setflags(write=False)  # as Ray hands it over
    got = dict(unpack(made[::-1]))
    for name, want in tensors():
        assert raw(got[name]) == raw(want), name


def spoiled() -> dict[str, list[Bucket]]:
    made = list(buckets(tensors(), 3, 64))
    other = [dataclasses.replace(b, version=4) for b in made]
    return {
        "nothing": [],
        "last missing": made[:-1],
        "first missing": made[1:],
        "one twice": [*made, made[0]],
        "one twice for another": [*made[:-1], made[0]],
        "mixed": [*made[:2], *other[2:]],
        "both": made + other,
        "of two sizes": [made[0], *list(buckets(tensors(), 3, 200))[1:]],
    }


@pytest.mark.parametrize("case", spoiled())
def test_anything_but_one_whole_version_is_refused(case: str) -> None:
    with pytest.raises(ValueError, match="not one whole version"):
        unpack(spoiled()[case])  # at once, before the first tensor


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
    assert {entry[1] for bucket in made for entry in bucket.entries} == {"float32", dtype}
    engine.load_weights(unpack(made), made[0].version)

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
