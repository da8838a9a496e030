"""Real vLLM that samples with the adapter itself: a few kilobytes a push, the learner's numbers, and faults that are
named. Where that cannot be, or the learner computes something else, weights are merged.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from grpo import GRPOTrainer
from grpo.cluster import Cluster, RunFailure
from grpo.config import Config, GRPOConfig, load_config
from grpo.learner import Learner
from grpo.packing import pack
from grpo.records import TrainingSample
from grpo.roles import RolloutRole, learner_role
from model import DeepseekV3Config
from model.create import build_tokenizer
from model.family import read_config
from model.names import PEFT_PREFIX
from rollout import WeightFault, build_engine
from rollout.vllm_lora import why_merged
from tests.rollout.conftest import VLLM_TINY
from tests.rollout.test_vllm_auto import GREEDY, PROMPTS, saved
from tests.weights import unpacked

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="`make test-vllm` has vLLM"),
]
ROOT = Path(__file__).parents[2]
A = f"{PEFT_PREFIX}model.layers.{{}}.self_attn.{{}}.lora_A.weight"
B = f"{PEFT_PREFIX}model.layers.{{}}.mlp.{{}}.lora_B.weight"


def config(directory: Path, lora: dict[str, Any], **changes: Any) -> Config:
    return load_config(
        {
            "model": {"path": str(directory), "family": "auto", "lora": lora, **changes.get("model", {})},
            "rollout": {"engine": "vllm", "engine_options": {"kv_cache_gb": 0.03}, **changes.get("rollout", {})},
            "grpo": {"learning_rate": 1e-2, "max_steps": 100},
        },
        [],
    )


class Pair:
    """A learner of an adapter, and an engine that holds what it has."""

    def __init__(self, directory: Path, lora: dict[str, Any], **model: Any) -> None:
        self.config = config(directory, lora, model=model)
        self.role = RolloutRole(self.config, str(directory))
        assert self.role.why_merged() == ""
        self.learner = learner_role(self.config, *[str(directory)] * 3)
        self.learner.send_adapter()
        self.push()

    def push(self, since: int | None = None) -> float:
        """Every check on. Returns the bytes."""
        return self.role.load_weights(self.learner.weights(since), self.learner.policy_version)["bytes"]

    def step(self) -> float:
        """A step of the learner, and what came to change since."""
        version = self.learner.policy_version
        rng = np.random.default_rng(version)
        samples = [
            TrainingSample(tuple(p), tuple(rng.integers(3, 60, 9).tolist()), 0.01, float(rng.normal())) for p in PROMPTS
        ]
        self.learner.step([pack([[sample] for sample in samples], 1000)])
        return self.push(since=version)

    def gap(self) -> torch.Tensor:
        """How far the log-probabilities of a greedy draw are from the learner's."""
        got = self.drawn()
        samples = [TrainingSample(tuple(p), ids, 1.0, 0.0, logprobs) for p, (ids, logprobs) in zip(PROMPTS, got)]
        (batch,) = pack([[sample] for sample in samples], 10_000)
        return (self.learner.logprobs(batch) - torch.tensor([v for _, logprobs in got for v in logprobs])).abs()

    def drawn(self) -> list[tuple[tuple[int, ...], tuple[float, ...]]]:
        return drawn(self.role.engine)


def drawn(engine: Any) -> list[tuple[tuple[int, ...], tuple[float, ...]]]:
    return [(c.token_ids, c.logprobs) for group in engine.generate(PROMPTS, GREEDY) for c in group]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved("qwen2", tmp_path_factory.mktemp("qwen2") / "model", tie_word_embeddings=True)


@pytest.fixture(scope="module")
def pair(directory: Path) -> Pair:
    """Rank 3, which vLLM fills up to 8, on every matrix of the layers."""
    return Pair(directory, {"r": 3, "lora_alpha": 7})


def the_adapter_is_what_the_engine_computes_with(pair: Pair, directory: Path, out: Path) -> None:
    """Against the learner, transformers with merged weights, and an engine that is revived with base and adapter."""
    start = pair.drawn()
    adapter = sum(tensor.nbytes for tensor in pair.learner.adapter.tensors().values())  # type: ignore[union-attr]
    assert [pair.step() for _ in range(3)] == [adapter] * 3
    got = pair.drawn()
    assert pair.gap().max() < 1e-4
    pair.learner.save(out)
    for (tokens, logprobs), (ours, own) in zip(got, drawn(build_engine(out)), strict=True):
        assert tokens == ours
        np.testing.assert_allclose(logprobs, own, atol=1e-4)
    moved = max(np.abs(np.subtract(a[1][:1], b[1][:1])).max() for a, b in zip(start, got))
    assert moved > 1e-2
    revived = RolloutRole(pair.config, str(directory))
    revived.load_weights(pair.learner.weights(), pair.learner.policy_version)
    assert drawn(revived.engine) == got
    pair.push()  # everything once more
    assert pair.drawn() == got


def test_on_every_matrix_with_a_tied_head(pair: Pair, directory: Path, tmp_path: Path) -> None:
    the_adapter_is_what_the_engine_computes_with(pair, directory, tmp_path / "out")


def test_on_a_part_of_fused_layers(tmp_path: Path) -> None:
    """The learner adds products here (target_modules), and q has an adapter where k and v have none."""
    directory = saved("qwen3", tmp_path / "qwen3", head_dim=32)
    pair = Pair(directory, {"r": 8, "lora_alpha": 8, "target_modules": ["q_proj", "up_proj", "down_proj"]})
    the_adapter_is_what_the_engine_computes_with(pair, directory, tmp_path / "out")


Tensors = list[tuple[str, torch.Tensor]]


def swapped(weights: Tensors) -> Tensors:
    both = A.format(0, "v_proj"), A.format(1, "v_proj")
    other = dict(zip(both, reversed(both)))
    tensors = dict(weights)
    return [(name, tensors[other.get(name, name)]) for name in tensors]


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (lambda w, lora: (swapped(w), lora), f"{A.format(0, 'v_proj')} differs from what was pushed"),
        (
            lambda w, lora: (w, lora | {"lora_alpha": 14}),
            f"{PEFT_PREFIX}model.layers.0.self_attn.q_proj.lora_B.weight is scaled by 4.667 in the engine, not by "
            "lora_alpha / r = 2.333",
        ),
        (
            lambda w, lora: ([p for p in w if ".1.mlp.up_proj" not in p[0]], lora),
            f"{PEFT_PREFIX}model.layers.1.mlp.up_proj.lora_A.weight differs",
        ),
        (None, f"{A.format(0, 'q_proj')} differs from what was pushed"),  # the one before stays
    ],
)
def test_an_adapter_that_went_wrong_in_the_engine_is_named(
    pair: Pair, monkeypatch: pytest.MonkeyPatch, fault: Callable[..., Any] | None, message: str
) -> None:
    engine: Any = pair.role.engine
    rpc = engine.rpc

    def faulty(method: str, *args: Any) -> Any:
        if method != "load_adapter":
            return rpc(method, *args)
        return rpc(method, *fault(*args)) if fault else None

    monkeypatch.setattr(engine, "rpc", faulty)
    with pytest.raises(WeightFault) as caught:
        pair.step()
    assert message in str(caught.value)
    with pytest.raises(ValueError, match="load a whole version"):
        pair.drawn()
    monkeypatch.undo()
    pair.push()


def test_another_base_than_the_learners_is_named(pair: Pair) -> None:
    engine: Any = pair.role.engine
    name = "model.layers.1.mlp.up_proj.weight"
    weights = [(n, t + 0.01 if n == name else t) for n, t in unpacked(pair.learner.weights())]
    engine.load_weights(weights, pair.learner.policy_version)
    with pytest.raises(WeightFault, match=f"in vLLM: {name} computes something else"):
        engine.check_weights(weights)
    pair.push()


def test_canaries_alone_find_an_adapter_that_requests_do_not_name(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rollout.vllm_lora.request", lambda: None)
    pair.role.check = "canary"
    with pytest.raises(WeightFault, match="canary prompts under version"):
        pair.step()
    pair.role.check = "full"
    monkeypatch.undo()
    pair.push()


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (lambda w: w[:-1], "lora_B.weight is missing: it must come together with"),
        (lambda w: [(n, t[:2] if ".lora_A" in n else t) for n, t in w], r"has the shape \(2, 64\); the engine's model"),
        (lambda w: [*w, w[0]], "was given twice"),
        (lambda w: [*w, (f"{PEFT_PREFIX}model.layers.9.x", w[0][1])], "is no tensor of the model"),
    ],
)
def test_an_adapter_with_a_tensor_too_few_or_too_many_is_refused(pair: Pair, fault: Any, message: str) -> None:
    engine, before = pair.role.engine, pair.drawn()
    weights = list(pair.learner.adapter.tensors().items())  # type: ignore[union-attr]
    with pytest.raises(ValueError, match=message):
        engine.load_weights(fault(weights), engine.policy_version + 1, base=engine.policy_version)
    assert pair.drawn() == before


def test_merged_by_choice(directory: Path) -> None:
    role = RolloutRole(config(directory, {"r": 4, "lora_alpha": 8}, rollout={"lora": "merged"}), str(directory))
    assert role.why_merged() == "rollout.lora is merged"
    learner = Learner(directory, GRPOConfig(), lora={"r": 4, "lora_alpha": 8}, canaries=True)
    role.load_weights(learner.weights(), 0)


def test_in_bfloat16_the_learner_adds_as_the_engine_does(directory: Path) -> None:
    """Rounding apart: two forward passes of one model in bfloat16 are about 1e-2 from each other."""
    pair = Pair(directory, {"r": 4, "lora_alpha": 8, "target_modules": ["v_proj", "down_proj"]}, dtype="bfloat16")
    for _ in range(3):
        pair.step()
    assert pair.gap().mean() < 0.03


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, ""),
        ({"config": DeepseekV3Config(**VLLM_TINY)}, "dense models only; MLA and routed experts get weights"),
        ({"names": ["model.layers.0.mlp.experts.0.up_proj.weight"]}, "dense models only"),
        ({"names": [f"{PEFT_PREFIX}transformer.h.0.attn.c_attn.lora_A.weight"]}, "the adapter sits on c_attn"),
        ({"on_cpu": False}, "no float32 on a GPU"),
        ({"on_cpu": False, "dtype": "bfloat16"}, "in bfloat16 the learner multiplies by merged matrices"),
        ({"on_cpu": False, "dtype": "bfloat16", "lora": {"r": 8, "target_modules": ["q_proj"]}}, ""),
        ({"options": {"tensor_parallel_size": 2}}, "with rollout.engine_options.tensor_parallel_size"),
        ({"lora": {"r": 600}}, "model.lora.r 600 is more than vLLM has room for"),
    ],
)
def test_when_adapters_are_merged(directory: Path, changes: dict[str, Any], reason: str) -> None:
    given: dict[str, Any] = {"config": read_config(directory), "names": [A.format(0, "q_proj")], "lora": {"r": 8}}
    given |= {"dtype": "float32", "options": {}, "on_cpu": True, **changes}
    assert (reason in why_merged(**given)) if reason else why_merged(**given) == ""


def test_a_run_and_its_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The line that says how the adapter travels, pushes of its size, policy and engine equal, resume too."""
    tokenizer = build_tokenizer(yaml.safe_load((ROOT / "configs" / "tiny_v3.yaml").read_text())["tokenizer"])
    directory = saved("qwen2", tmp_path / "model", tie_word_embeddings=True)
    tokenizer.save_pretrained(directory)
    rows = [{"prompt": f"{a}+{b}=", "answer": str(a + b)} for a in range(10) for b in range(10)]
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    content = config(directory, {"r": 4, "lora_alpha": 8}).model_dump(mode="json")
    content |= {
        "run": {"cluster": "inline", "output_dir": str(tmp_path / "run"), "save_steps": 2, "eval_steps": 2},
        "data": {"path": str(tmp_path / "sums.jsonl"), "eval_size": 8},
        "rewards": {"exact_match": 1.0, "length": {"weight": 0.5, "max": 6}},
    }
    content["rollout"]["max_completion_length"] = 6
    content["grpo"] |= {"max_steps": 4, "prompts_per_step": 4, "num_generations": 4}

    def metrics() -> list[dict[str, Any]]:
        return [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]

    sync = Cluster.sync_weights

    def stop(self: Cluster, version: int) -> dict[str, float]:
        if version == 4:
            raise RunFailure("stopped here")
        return sync(self, version)

    with monkeypatch.context() as patch, pytest.raises(RunFailure, match="--resume"):
        patch.setattr(Cluster, "sync_weights", stop)
        GRPOTrainer(content).train()
    assert "adapter: pushed to the engines as it is" in capsys.readouterr().out
    before = metrics()
    GRPOTrainer(resume=str(tmp_path / "run")).train()
    after = metrics()
    assert [row["step"] for row in after] == [0, 1, 2, 3, 4]
    assert after[3]["reward"] == before[3]["reward"] and after[3]["grad_norm"] == before[3]["grad_norm"]
    assert all(row["sampling/sampling_logp_difference/max"] < 1e-4 for row in after[1:])
    assert after[3]["sync/bytes"] == after[4]["sync/bytes"] < 0.5 * (directory / "model.safetensors").stat().st_size
