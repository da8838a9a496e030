"""The learner and the embedded engine on a GPU against the same on the CPU. Runs where there is a GPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from grpo import GRPOTrainer, logprobs
from grpo.config import GRPOConfig
from grpo.learner import Learner
from grpo.packing import pack
from grpo.placement import compute_device
from grpo.records import PackedBatch, TrainingSample
from model.create import build_tokenizer, create_model
from model.family import load_model
from model.fp8.modules import kept_in_fp32
from rollout import Completion, SamplingParams, build_engine

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9
hopper = pytest.mark.skipif(not HOPPER, reason="needs a Hopper GPU")
ROOT = Path(__file__).resolve().parents[2]
LORA: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": [], "target_parameters": []}
CASES: dict[str, dict[str, Any]] = {
    "all weights": {"config": GRPOConfig(learning_rate=1e-3, beta=0.1, router_policy="update", max_steps=4)},
    "MTP and balance": {
        "config": GRPOConfig(learning_rate=1e-3, mtp_loss_weight=0.3, router_aux_loss_coef=0.01, max_steps=4)
    },
    "recomputed": {"config": GRPOConfig(learning_rate=1e-3, num_iterations=2, max_steps=4), "checkpointing": True},
    "adapter": {"config": GRPOConfig(learning_rate=1e-3, beta=0.1, max_steps=4), "lora": LORA},
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    spec = yaml.safe_load((ROOT / "configs" / "tiny_v3.yaml").read_text())
    spec["config"]["initializer_range"] = 0.1
    directory = tmp_path_factory.mktemp("tiny")
    create_model(spec, directory, seed=0)
    return directory


def minibatches(seed: int, routes: bool = False) -> list[list[PackedBatch]]:
    """A mini-batch of three groups of four random samples in two micro-batches."""
    rng = np.random.default_rng(seed)

    def sample(prompt: tuple[int, ...]) -> TrainingSample:
        ids = tuple(rng.integers(0, 50, 9).tolist())
        chosen = np.array([rng.permutation(8)[:2] for _ in range(2 * 14)]).reshape(14, 2, 2) if routes else None
        return TrainingSample(
            prompt, ids, 1 / 108, float(rng.normal()), tuple(rng.uniform(-5, -3, 9).tolist()), routed_experts=chosen
        )

    prompts = [tuple(rng.integers(0, 50, 6).tolist()) for _ in range(3)]
    return [pack([[sample(prompt) for _ in range(4)] for prompt in prompts], 90)]


def trained(directory: Path, device: str, steps: int, **options: Any) -> tuple[Learner, list[dict[str, float]]]:
    learner = Learner(directory, device=torch.device(device, 0) if device == "cuda" else device, **options)
    return learner, [dict(learner.step(minibatches(step, routes=True)).metrics) for step in range(steps)]


@pytest.mark.parametrize("case", CASES)
def test_three_steps_are_those_of_the_cpu(case: str, tiny: Path) -> None:
    if "lora" in CASES[case]:
        pytest.importorskip("peft")
    (on_cpu, want), (on_gpu, got) = (trained(tiny, device, 3, **CASES[case]) for device in ("cpu", "cuda"))
    assert {p.device.type for p in on_gpu.policy.master} == {"cuda"}
    for a, b in zip(want, got):
        assert set(b) - set(a) == {"memory/learner_gib"}
        for name, value in a.items():
            assert b[name] == pytest.approx(value, rel=2e-3, abs=2e-4), name
    for a, b in zip(on_cpu.policy.master, on_gpu.policy.master):
        if case != "adapter":
            torch.testing.assert_close(b.cpu(), a, rtol=0, atol=2e-4)
            continue
        apart = (b.detach().cpu() - a.detach()).abs()
        # AdamW moves a weight whose gradient is all rounding as far as any other: a few may part, by less than a step
        assert float((apart > 2e-4).float().mean()) < 0.01
        assert float(apart.max()) < 1e-3
    a, b = on_cpu.canary(), on_gpu.canary()
    assert a.prompts == b.prompts
    np.testing.assert_allclose(b.logprobs, a.logprobs, atol=2e-3)


@pytest.mark.parametrize("moments", ["float32", "bfloat16"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_resume_goes_on_as_if_never_stopped(dtype: str, moments: str, tiny: Path, tmp_path: Path) -> None:
    config = GRPOConfig(learning_rate=1e-3, adam_moment_dtype=moments, max_steps=4)  # type: ignore[arg-type]
    learner, _ = trained(tiny, "cuda", 2, config=config, dtype=dtype)
    learner.save(tmp_path / "saved")
    resumed = Learner(tiny, config, dtype=dtype, device=torch.device("cuda", 0))
    resumed.load(tmp_path / "saved")
    with_more = [one.step(minibatches(7)).metrics for one in (learner, resumed)]
    for name in ("loss", "grad_norm", "entropy"):
        assert with_more[0][name] == pytest.approx(with_more[1][name], rel=1e-4)
    for a, b in zip(learner.policy.master, resumed.policy.master):  # sums on a GPU come in any order
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6 if dtype == moments == "float32" else 3e-4)


def sampled(directory: Path, prompts: list[list[int]], **options: Any) -> PackedBatch:
    """What the embedded engine makes of the prompts, its routes included."""
    engine = build_engine(directory, enable_return_routed_experts=True, max_num_seqs=16, **options)
    groups = engine.generate(prompts, SamplingParams(n=3, max_tokens=20, seed=1, ignore_eos=True))

    def sample(prompt: list[int], c: Completion) -> TrainingSample:
        return TrainingSample(
            tuple(prompt), c.token_ids, 1.0, rollout_logprobs=c.logprobs, routed_experts=c.routed_experts
        )

    (batch,) = pack([[sample(prompt, c) for c in group] for prompt, group in zip(prompts, groups)], 10000)
    return batch


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_embedded_engine_agrees_with_the_learner(dtype: str, tiny: Path) -> None:
    device, prompts = compute_device("auto"), [[5, 6, 7, 8 + i] for i in range(6)]
    batch = sampled(tiny, prompts, dtype=getattr(torch, dtype), device=device)
    learner = Learner(tiny, GRPOConfig(), dtype=dtype, device=device)
    gap = (learner.logprobs(batch).cpu() - batch.rollout_logprobs).abs()
    assert float(gap.max()) < (1e-4 if dtype == "float32" else 0.3)
    assert float(gap.mean()) < (1e-5 if dtype == "float32" else 3e-2)


@hopper
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_fp8_kernels_take_the_steps_of_their_emulation(dtype: str, tiny: Path, tmp_path: Path) -> None:
    """With a KL reference in FP8 and MTP. In a model of such large weights a product that is off by 1e-4 changes many a
    code: numbers are near and no more. tests/model/test_fp8_kernels.py holds each product of a model by itself."""
    config = GRPOConfig(learning_rate=1e-3, beta=0.1, mtp_loss_weight=0.3, max_steps=4)
    (_, plain), (emulated, want), (kernels, got) = (
        trained(tiny, "cuda", 3, config=config, dtype=dtype, fp8=fp8) for fp8 in ("off", "emulate", "on")
    )
    in_fp8 = kept_in_fp32(kernels.policy.model)
    assert in_fp8 == kept_in_fp32(emulated.policy.model) and bool(in_fp8) == (dtype == "bfloat16")
    for name, parameter, master in zip(kernels.policy.names, kernels.policy.parameters, kernels.policy.master):
        assert (parameter is master) == (name in in_fp8 or dtype == "float32"), name
    far = {}
    for name in ("entropy", "grad_norm", "mtp_loss", "kl"):
        far[name] = [max(abs(a[name] / b[name] - 1) for a, b in zip(run[1:], want[1:])) for run in (got, plain)]
    start = dict(load_model(tiny, torch.float32).named_parameters())
    moved = [
        torch.cat([(m.detach().cpu() - start[n].detach()).flatten() for n, m in zip(x.policy.names, x.policy.master)])
        for x in (kernels, emulated)
    ]
    far["cosine"] = [float(torch.nn.functional.cosine_similarity(*moved, dim=0))]
    print(far)
    assert far["entropy"][0] < 0.01 and far["mtp_loss"][0] < 0.01 and far["grad_norm"][0] < 0.1, far
    assert far["cosine"][0] > 0.8, far
    kernels.save(tmp_path / "saved")
    resumed = Learner(tiny, config, dtype=dtype, device="cuda", fp8="on")
    resumed.load(tmp_path / "saved")
    ((batch, *_),) = minibatches(7)
    torch.testing.assert_close(resumed.logprobs(batch), kernels.logprobs(batch), rtol=0, atol=1e-6)


@hopper
def test_the_embedded_engine_computes_in_fp8_as_the_learner(tiny: Path) -> None:
    """Decode sums what codes stand for in FP32, the learner with the kernels' 14 bits: nearer than to no FP8 at all."""
    options: dict[str, Any] = {"device": compute_device("auto"), "fp8": "on"}
    batch = sampled(tiny, [[5, 6, 7, 8 + i] for i in range(6)], dtype=torch.float32, **options)
    learner = Learner(tiny, GRPOConfig(), dtype="float32", **options)
    plain = Learner(tiny, GRPOConfig(), dtype="float32", device=options["device"])
    gaps = [(one.logprobs(batch).cpu() - batch.rollout_logprobs).abs().mean().item() for one in (learner, plain)]
    print(gaps)
    assert gaps[0] < 0.1 and gaps[0] < 0.5 * gaps[1], gaps


def test_another_architecture_trains_on_a_gpu(tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    tokenizer = build_tokenizer(yaml.safe_load((ROOT / "configs" / "tiny_v3.yaml").read_text())["tokenizer"])
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model("qwen2", vocab_size=len(tokenizer), num_key_value_heads=2, **sizes)
    )
    model.save_pretrained(tmp_path)
    (_, want), (on_gpu, got) = (trained_plain(tmp_path, device) for device in ("cpu", "cuda"))
    assert on_gpu.policy.device.type == "cuda"
    assert got["loss"] == pytest.approx(want["loss"], abs=1e-4)
    assert got["grad_norm"] == pytest.approx(want["grad_norm"], rel=1e-3)


def trained_plain(directory: Path, device: str) -> tuple[Learner, dict[str, float]]:
    learner = Learner(directory, GRPOConfig(learning_rate=1e-3), device=device)
    return learner, dict(learner.step(minibatches(0)).metrics)


def test_a_whole_run_on_a_gpu(tmp_path: Path) -> None:
    """Warm start, steps, evaluation, checkpoint and resume."""
    rows = [{"prompt": f"{a}+{b}=", "answer": str(a + b)} for a in range(9) for b in range(9)]
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    content = {
        "run": {"cluster": "inline", "output_dir": str(tmp_path / "run"), "save_steps": 1},
        "model": {"init": str(ROOT / "configs" / "tiny_v3.yaml"), "device": "cuda"},
        "data": {"path": str(tmp_path / "sums.jsonl"), "completion_template": "<answer>{answer}</answer>"},
        "rollout": {"max_completion_length": 8},
        "rewards": {"exact_match": {"weight": 1.0, "tag": "answer"}},
        "sft": {"max_steps": 5, "batch_size": 16},
        "grpo": {"max_steps": 2, "prompts_per_step": 4, "num_generations": 4},
    }
    result = GRPOTrainer(content).train()
    assert result.accuracy_after is not None
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1, 2]
    assert max(row["sampling/sampling_logp_difference/max"] for row in rows[1:]) < 1e-3
    assert all(row["memory/learner_gib"] > 0 for row in rows[1:])
    GRPOTrainer(None, ["--grpo.max_steps=3"], resume=str(tmp_path / "run")).train()
    assert (tmp_path / "run" / "checkpoints" / "step_3").is_dir()


@pytest.mark.parametrize("kept", [0, 1 << 30])
def test_log_probabilities_in_bfloat16(kept: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In several chunks, logits kept or computed again, against float64; the head's gradient is added up in FP32."""
    monkeypatch.setattr(logprobs, "KEPT_ON_A_GPU", kept)
    monkeypatch.setattr(logprobs, "CHUNK_LOGITS_ON_A_GPU", 100 * 512)
    torch.manual_seed(0)
    inputs = [torch.randn(n, 256).bfloat16() / 4 for n in (330, 512)]
    target, upstream = torch.randint(512, (330,)), torch.randn(330)
    exact = [x.double().requires_grad_() for x in inputs]
    want = torch.log_softmax(exact[0] @ exact[1].t(), -1).gather(1, target[:, None])[:, 0]
    ours = [x.cuda().requires_grad_() for x in inputs]
    got, _ = logprobs.token_logprobs(*ours, target.cuda())
    torch.testing.assert_close(got.cpu().double(), want, rtol=0, atol=0.02)
    wanted = torch.autograd.grad(want, exact, upstream.double())
    for again in (True, False):  # a second backward pass has to compute the logits that the first one wrote over
        found = torch.autograd.grad(got, ours, upstream.cuda(), retain_graph=again)
        for a, b in zip(found, wanted, strict=True):
            assert (a.cpu().double() - b).norm() < 4e-3 * b.norm()
