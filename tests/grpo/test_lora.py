"""The learner under LoRA: only the adapter learns, the base is the reference, resume is exact, engines need no peft."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from grpo import GRPOTrainer
from grpo.config import ConfigError, GRPOConfig, load_config
from grpo.evaluate import evaluate_policy
from grpo.learner import Learner
from grpo.packing import pack
from grpo.policy import AdapterOff
from grpo.records import TrainingSample
from model import DeepseekV3ForCausalLM
from model.create import create_model
from rollout import SamplingParams, build_engine
from tests.resume import check_resume
from tests.samples import batches
from tests.weights import unpacked

peft = pytest.importorskip("peft")
ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "configs" / "tiny_v3.yaml"
LORA: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": [], "target_parameters": []}


def state(learner: Learner) -> dict[str, torch.Tensor]:
    """Every tensor of the model, and the optimiser's."""
    found = {name: tensor.clone() for name, tensor in learner.policy.model.state_dict().items()}
    for name, master in zip(learner.policy.names, learner.policy.master):
        found |= {f"{key} {name}": value.clone() for key, value in learner.optimizer.state.get(master, {}).items()}
    return found


def equal(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> bool:
    return got.keys() == want.keys() and all(torch.equal(got[name], want[name]) for name in want)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_only_the_adapter_learns(tiny: Path, tmp_path: Path, dtype: str) -> None:
    learner = Learner(tiny, GRPOConfig(learning_rate=1e-2), dtype=dtype, lora=LORA)
    before = state(learner)
    for seed in range(3):
        learner.step(batches(seed))
        learner.weights()
    learner.save(tmp_path)
    after = state(learner)
    moved = {name for name, tensor in before.items() if not torch.equal(after[name], tensor)}
    assert moved == set(learner.policy.names)
    assert all(".lora_" in name for name in moved)
    assert {master.dtype for master in learner.policy.master} == {torch.float32}
    assert all(parameter is master for parameter, master in zip(learner.policy.parameters, learner.policy.master))
    assert len(learner.optimizer.state) == len(learner.policy.names)
    frozen = [p for n, p in learner.policy.model.named_parameters() if ".lora_" not in n]
    assert frozen and all(p.grad is None and not p.requires_grad for p in frozen)


def test_the_reference_is_the_base_and_no_second_model(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[object] = []
    load = DeepseekV3ForCausalLM.from_pretrained
    monkeypatch.setattr(
        DeepseekV3ForCausalLM, "from_pretrained", lambda *a, **k: loaded.append(load(*a, **k)) or loaded[-1]
    )
    learner = Learner(tiny, GRPOConfig(beta=0.1, learning_rate=1e-2), lora=LORA, reference_dir=tiny)
    assert len(loaded) == 1
    base = Learner(tiny, GRPOConfig())
    ((batch, _),) = batches()
    start = learner.logprobs(batch)
    assert torch.equal(start, base.logprobs(batch))  # B is 0
    assert learner.step(batches()).metrics["kl"] == 0
    assert isinstance(learner.reference, AdapterOff)
    assert torch.equal(learner.logprobs(batch, learner.reference), start)
    assert (learner.logprobs(batch) - start).abs().max() > 1e-2
    kl = learner.step(batches()).metrics["kl"]
    assert kl > 1e-4
    # the same step with the reference in a model of its own
    twin = Learner(tiny, GRPOConfig(beta=0.1, learning_rate=1e-2), lora=LORA)
    twin.reference = base.policy
    twin.step(batches())
    assert twin.step(batches()).metrics["kl"] == kl
    assert equal(state(twin), state(learner))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_engines_get_plain_weights_that_compute_the_learners_numbers(tiny: Path, dtype: str) -> None:
    learner = Learner(tiny, GRPOConfig(learning_rate=1e-2), dtype=dtype, lora=LORA)
    for seed in range(3):
        learner.step(batches(seed))
    plain = Learner(tiny, GRPOConfig(), dtype=dtype)
    sent = dict(unpacked(learner.weights()))
    assert {n: (t.dtype, t.shape) for n, t in sent.items()} == {
        n: (t.dtype, t.shape) for n, t in unpacked(plain.weights())
    }
    engine = build_engine(tiny, dtype=getattr(torch, dtype))
    engine.load_weights(sent.items(), 3)
    plain.policy.model.load_state_dict(engine.model.state_dict())  # type: ignore[attr-defined]
    ((batch, _),) = batches(9)
    assert torch.equal(plain.logprobs(batch), learner.logprobs(batch))
    assert (learner.logprobs(batch) - Learner(tiny, GRPOConfig(), dtype=dtype).logprobs(batch)).abs().max() > 1e-2
    if dtype == "float32":
        prompt = [3, 1, 4, 1, 5]
        completion = engine.generate([prompt], SamplingParams(max_tokens=12, seed=1))[0][0]
        drawn = TrainingSample(tuple(prompt), completion.token_ids, 1.0, 0.0, completion.logprobs)
        (row,) = pack([[drawn]], 1000)
        assert (learner.logprobs(row) - torch.tensor(completion.logprobs)).abs().max() < 1e-5


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_resume_is_bit_equal(tiny: Path, tmp_path: Path, dtype: str) -> None:
    config = GRPOConfig(
        learning_rate=1e-2,
        warmup_steps=5,
        weight_decay=0.1,
        router_policy="update",
        router_bias_update_rate=0.01,
        beta=0.1,
    )
    learner = Learner(tiny, config, dtype=dtype, lora=LORA)
    fresh = Learner(tiny, config, dtype=dtype, lora=LORA, seed=3)
    want = check_resume(learner, fresh, [batches(seed) for seed in range(3)], state, tmp_path)
    assert learner.updates == 3
    biases = [name for name in want if name.endswith("e_score_correction_bias") and "mtp" not in name]
    assert len(biases) == 2 and all(want[name].any() for name in biases)


def test_checkpoints_that_do_not_fit(tiny: Path, tmp_path: Path) -> None:
    learner = Learner(tiny, GRPOConfig(), lora=LORA)
    learner.save(tmp_path / "lora")
    Learner(tiny, GRPOConfig()).save(tmp_path / "plain")
    create_model(TINY, tmp_path / "other", seed=1)
    for loader, directory, message in (
        (learner, "plain", "has no adapter/: it was trained without model.lora"),
        (Learner(tiny, GRPOConfig()), "lora", "is a checkpoint of an adapter"),
        (Learner(tmp_path / "other", GRPOConfig(), lora=LORA), "lora", "was trained on other base weights"),
        (
            Learner(tiny, GRPOConfig(), lora=LORA | {"r": 8}),
            "lora",
            "has r 4, lora_alpha 8 and 56 tensors; model.lora giv",
        ),
        (Learner(tiny, GRPOConfig(), lora=LORA | {"lora_alpha": 9}), "lora", "gives r 4, lora_alpha 9"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            loader.load(tmp_path / directory)
        assert "\n" not in str(error.value)


def settings(tmp: Path, **model: Any) -> dict[str, Any]:
    rows = [{"prompt": f"{a}+{b}=", "answer": str(a + b)} for a in range(10) for b in range(10)]
    (tmp / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "run": {"cluster": "inline", "output_dir": str(tmp / "run"), "save_steps": 2},
        "model": {"init": str(TINY), "lora": {"r": 4, "lora_alpha": 8}, **model},
        "data": {"path": str(tmp / "sums.jsonl"), "eval_size": 8},
        "rollout": {"max_completion_length": 6},
        "rewards": {"length": {"weight": 0.5, "max": 6}, "exact_match": 1.0},
        "grpo": {"max_steps": 3, "prompts_per_step": 4, "num_generations": 4, "learning_rate": 3e-2, "beta": 0.01},
    }


def test_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    GRPOTrainer(settings(tmp_path)).train()
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()][1:]
    assert max(row["sampling/sampling_logp_difference/max"] for row in rows) < 1e-4
    assert rows[-1]["kl"] > 1e-3
    last = tmp_path / "run" / "checkpoints" / "step_3"
    assert {"adapter_config.json", "adapter_model.safetensors"} <= {path.name for path in (last / "adapter").iterdir()}
    # on the base that adapter_config.json names, the adapter gives the merged weights beside it
    config = peft.PeftConfig.from_pretrained(str(last / "adapter"))
    base = transformers.DeepseekV3ForCausalLM.from_pretrained(config.base_model_name_or_path)
    loaded = peft.PeftModel.from_pretrained(base, str(last / "adapter"))
    merged = DeepseekV3ForCausalLM.from_pretrained(last)
    ids = torch.arange(20)[None]
    with torch.no_grad():
        want = merged(ids).logits
        assert (loaded(ids).logits - want).abs().max() <= 1e-5 * want.abs().max()
    monkeypatch.setitem(sys.modules, "peft", None)  # whoever evaluates needs none
    result = evaluate_policy(str(tmp_path / "run"), [], n=2, ks=[1])
    assert result["greedy_accuracy"] == rows[-1]["eval/accuracy"]


def test_bad_settings_end_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"unknown key 'model.lora.rank'; did you mean"):
        load_config(settings(tmp_path, lora={"rank": 4}))
    with pytest.raises(ValueError, match="names nothing; adapters can sit on"):
        GRPOTrainer(settings(tmp_path, lora={"target_modules": ["q_prj"]})).train()
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ValueError, match=r"pip install 'grpo-v3\[lora\]'"):
        GRPOTrainer(settings(tmp_path)).train()
    assert not (tmp_path / "run").exists()
