"""Real vLLM with a model of another family (model.family auto): pushes are proved, and faults in them are named."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from grpo.config import GRPOConfig
from grpo.learner import Learner
from grpo.packing import pack
from grpo.records import TrainingSample
from model.family import load_model, published_state
from rollout import SamplingParams, WeightFault, build_engine
from tests.weights import unpacked

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="`make test-vllm` has vLLM"),
]
SIZES: dict[str, Any] = {
    "vocab_size": 60,
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,  # heads of 32, the smallest that vLLM has a kernel for on a CPU
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "eos_token_id": 1,
}
OPTIONS: dict[str, Any] = {"dtype": "float32", "max_num_seqs": 16, "kv_cache_gb": 0.03}
PROMPTS = [np.random.default_rng(i).integers(3, 60, 2 + 3 * i % 17).tolist() for i in range(12)]
GREEDY = SamplingParams(temperature=0.0, max_tokens=10)


def saved(kind: str, path: Path, **changes: Any) -> Path:
    """Random biases and norms too."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SIZES, **changes))
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if name.endswith("bias") or "norm" in name:
                tensor += 0.3 * torch.randn(tensor.shape)
    model.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved("qwen2", tmp_path_factory.mktemp("qwen2") / "model", tie_word_embeddings=True)


@pytest.fixture(scope="module")
def engine(directory: Path) -> Any:
    return build_engine(directory, "vllm", **OPTIONS)


def drawn(engine: Any) -> list[tuple[tuple[int, ...], tuple[float, ...]]]:
    return [(c.token_ids, c.logprobs) for group in engine.generate(PROMPTS, GREEDY) for c in group]


def push(learner: Learner, engine: Any, version: int) -> None:
    """A step of the learner with every tensor changed, and its weights to the engine, all checks on."""
    rng = np.random.default_rng(version)
    samples = [
        TrainingSample(tuple(p), tuple(rng.integers(3, 60, 9).tolist()), 0.01, float(rng.normal())) for p in PROMPTS
    ]
    learner.step([pack([[sample] for sample in samples], 1000)])
    received = learner.weights()
    weights = unpacked(received)
    engine.load_weights(weights, version)
    engine.check_weights(weights)
    assert received[0].canary is not None
    engine.check_canary(received[0].canary.prompts, received[0].canary.logprobs)


def pushes_end_in_a_fresh_engine(directory: Path, engine: Any, out: Path) -> None:
    """Greedy tokens and log-probabilities exactly; and to 1e-4 those of the plain engine over transformers."""
    learner = Learner(directory, GRPOConfig(learning_rate=1e-2), canaries=True)
    start = drawn(engine)
    for version in (1, 2, 3):
        push(learner, engine, version)
    learner.save(out)
    fresh = build_engine(out, "vllm", **OPTIONS)
    got = drawn(engine)
    assert got == drawn(fresh) != start
    for (tokens, logprobs), (ours, own) in zip(got, drawn(build_engine(out))):
        assert tokens == ours
        np.testing.assert_allclose(logprobs, own, atol=1e-4)


def test_tied_heads_and_biases(engine: Any, directory: Path, tmp_path: Path) -> None:
    pushes_end_in_a_fresh_engine(directory, engine, tmp_path)


def test_untied_heads_and_norms_of_queries(tmp_path: Path) -> None:
    directory = saved("qwen3", tmp_path / "qwen3", head_dim=32)
    engine = build_engine(directory, "vllm", **OPTIONS)
    pushes_end_in_a_fresh_engine(directory, engine, tmp_path / "out")


@pytest.mark.parametrize(
    "name",
    [
        "model.embed_tokens.weight",
        "model.layers.0.self_attn.k_proj.weight",
        "model.layers.1.self_attn.v_proj.bias",
        "model.layers.1.mlp.up_proj.weight",
        "model.layers.0.input_layernorm.weight",
    ],
)
def test_a_tensor_that_went_wrong_in_the_engine_is_named(
    engine: Any, directory: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Its first two rows change places on the way into the engine."""
    weights = list(published_state(load_model(directory)))
    rpc = engine.rpc

    def fault(pairs: list[tuple[str, torch.Tensor]]) -> list[tuple[str, torch.Tensor]]:
        return [(n, t[[1, 0, *range(2, len(t))]] if n == name else t) for n, t in pairs]

    monkeypatch.setattr(
        engine, "rpc", lambda method, *args: rpc(method, *(map(fault, args) if method == "load" else args))
    )
    engine.load_weights(weights, 2)
    with pytest.raises(WeightFault, match=f"in vLLM: {name} "):
        engine.check_weights(weights)
    monkeypatch.undo()
    engine.load_weights(weights, 3)
    engine.check_weights(weights)


def test_a_tied_head_that_computes_with_older_weights_is_named(
    engine: Any, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What vLLM does by itself on a CPU: the head's kernel keeps the copy that it packed at the start."""
    weights, rpc = list(published_state(load_model(directory))), engine.rpc

    def plain(method: str, *args: Any) -> Any:
        if method != "load":
            return rpc(method, *args)
        return engine.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(args[0])})

    engine.load_weights([(name, tensor + 0.1) for name, tensor in weights], 1)
    monkeypatch.setattr(engine, "rpc", plain)
    engine.load_weights(weights, 2)
    with pytest.raises(WeightFault, match=r"in vLLM: lm_head\.weight computes something else"):
        engine.check_weights(weights)
    monkeypatch.undo()
    engine.load_weights(weights, 3)
    engine.check_weights(weights)
