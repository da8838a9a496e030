"""model.family auto: small random transformers models through the learner, the engines, LoRA and whole runs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from grpo import GRPOTrainer
from grpo.cluster import Cluster, RunFailure
from grpo.config import GRPOConfig, load_config
from grpo.learner import Learner
from grpo.losses import token_weights
from grpo.packing import pack
from grpo.prepare import prepare
from grpo.records import PackedBatch, TrainingSample
from model import SequenceLayout
from model.create import build_tokenizer
from model.names import load_unit
from rollout import SamplingParams, build_engine
from tests.weights import unpacked

ROOT = Path(__file__).resolve().parents[2]
TOKENIZER = yaml.safe_load((ROOT / "configs" / "tiny_v3.yaml").read_text())["tokenizer"]
SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,  # large, so that any wrong weight shows
}
KINDS: dict[str, dict[str, Any]] = {
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 8},
    "llama": {},
    "qwen3_moe": {"head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
}
Make = Callable[..., Path]


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """A model directory of a kind, with a character tokenizer: random, biases and norms too."""
    torch.set_num_threads(1)

    def build(kind: str, seed: int = 0, **changes: Any) -> Path:
        tokenizer = build_tokenizer(TOKENIZER)
        ids = {f"{role}_token_id": getattr(tokenizer, f"{role}_token_id") for role in ("bos", "eos", "pad")}
        values = SIZES | {"vocab_size": len(tokenizer)} | ids | KINDS.get(kind, {}) | changes
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **values))
        with torch.no_grad():
            for name, tensor in model.named_parameters():
                if name.endswith("bias") or "norm" in name:
                    tensor += 0.3 * torch.randn(tensor.shape)
        directory = tmp_path_factory.mktemp(kind) / "model"
        model.save_pretrained(directory)
        tokenizer.save_pretrained(directory)
        return directory

    return build


def groups(seed: int = 0) -> list[list[TrainingSample]]:
    """Random samples with shared prompts of many lengths and the weights of one update."""
    rng = np.random.default_rng(seed)
    shapes = [(9, (5, 1, 12)), (4, (7,)), (1, (3, 6)), (6, (2, 4, 2, 8))]
    lengths = np.array([n for _, group in shapes for n in group])
    weights = iter(token_weights(lengths, "dapo", 16, np.ones(len(lengths), dtype=bool)))

    def sample(prompt: tuple[int, ...], n: int) -> TrainingSample:
        ids, rollout = tuple(rng.integers(0, 50, n).tolist()), tuple(rng.uniform(-5, -3, n).tolist())
        return TrainingSample(prompt, ids, float(next(weights)), float(rng.normal()), rollout)

    prompts = [(tuple(rng.integers(0, 50, length).tolist()), group) for length, group in shapes]
    return [[sample(prompt, n) for n in group] for prompt, group in prompts]


def batches(seed: int = 0, max_tokens: int = 40) -> list[PackedBatch]:
    return pack(groups(seed), max_tokens)


def padded_loss(directory: Path, samples: list[TrainingSample]) -> tuple[float, dict[str, torch.Tensor]]:
    """Transformers' own: each sample a padded row with a mask, all logits, the policy gradient by hand."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    rows = [[*s.prompt_ids, *s.completion_ids] for s in samples]
    length = max(map(len, rows))
    ids = torch.tensor([row + [0] * (length - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows])
    logprobs = (model(input_ids=ids, attention_mask=mask).logits / 0.7).log_softmax(-1)
    loss = torch.zeros(())
    for row, s in enumerate(samples):
        at = torch.arange(len(s.prompt_ids) - 1, len(rows[row]) - 1)
        chosen = logprobs[row, at, torch.tensor(s.completion_ids)]
        loss = loss - (s.advantage * s.weight * (chosen - chosen.detach()).exp()).sum()
    loss.backward()
    return loss.item(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_packed_loss_and_gradients_are_the_padded_ones(make: Make, kind: str, checkpointing: bool) -> None:
    directory = make(kind)
    want, grads = padded_loss(directory, [s for group in groups() for s in group])
    learner = Learner(directory, GRPOConfig(max_grad_norm=0.0), temperature=0.7, checkpointing=checkpointing)
    found: dict[str, torch.Tensor] = {}
    learner.optimizer.step = lambda: found.update(  # type: ignore[method-assign]
        {name: m.grad.clone() for name, m in zip(learner.policy.names, learner.policy.master)}
    )
    made = batches()
    assert len(made) > 1 and any((batch.parent >= 0).any() for batch in made)
    passes: list[int] = []
    learner.policy.model.base_model.layers[0].mlp.register_forward_pre_hook(lambda *_: passes.append(1))
    stats = learner.step([made])
    assert stats.metrics["loss"] == pytest.approx(want, abs=1e-5)
    assert not any(name.startswith(("router/", "mtp")) for name in stats.metrics)
    layouts = [SequenceLayout.from_segments(b.cu_seqlens, b.parent) for b in made]
    assert len(passes) == sum(len(layout.buckets) for layout in layouts) * (2 if checkpointing else 1)
    assert found.keys() == grads.keys()
    largest = max(float(grad.abs().max()) for grad in grads.values())
    assert largest > 1e-2
    for name, grad in grads.items():
        assert (found[name] - grad).abs().max() <= 1e-5 * largest, name


@pytest.mark.parametrize("kind", KINDS)
def test_engine_and_learner_agree_before_and_after_a_push(make: Make, kind: str) -> None:
    directory = make(kind)
    learner = Learner(directory, GRPOConfig(learning_rate=1e-2), temperature=0.7)
    engine = build_engine(directory, max_num_seqs=5)
    prompts = [np.random.default_rng(i).integers(3, 50, 1 + i % 4).tolist() for i in range(7)]
    params = [SamplingParams(n=2 + i % 2, temperature=0.7, top_p=0.9, max_tokens=3 + i, seed=i) for i in range(7)]
    for version in (0, 1):
        drawn = engine.generate(prompts, params)
        assert [len(group) for group in drawn] == [p.n for p in params]
        for prompt, p, group in zip(prompts, params, drawn):
            (batch,) = pack([[TrainingSample(tuple(prompt), c.token_ids, 1.0) for c in group]], 1000)
            logprobs = [value for c in group for value in c.logprobs]
            np.testing.assert_allclose(logprobs, learner.logprobs(batch), atol=1e-4)
            assert all(c.policy_version == version and -0.4 < min(c.log_support) <= 0 for c in group)
            assert all(len(c.token_ids) == p.max_tokens or c.finish_reason == "stop" for c in group)
            alone = build_engine(learner.policy.model, exact=True).generate([prompt], p)[0]
            assert [c.token_ids for c in alone] == [c.token_ids for c in group]
        learner.step([batches()])
        engine.load_weights(unpacked(learner.weights()), 1)


def test_sent_and_saved_are_the_published_tensors(make: Make, tmp_path: Path) -> None:
    for kind in KINDS:
        directory = make(kind)
        want = load_file(directory / "model.safetensors")
        learner = Learner(directory, GRPOConfig())
        learner.save(tmp_path / kind)
        sent, saved = dict(unpacked(learner.weights())), load_file(tmp_path / kind / "model.safetensors")
        assert sent.keys() == saved.keys() == want.keys()
        assert all(torch.equal(sent[name], want[name]) and torch.equal(saved[name], want[name]) for name in want)
        assert ("lm_head.weight" in sent) == (kind != "qwen2")  # tied there
        values = json.loads((tmp_path / kind / "config.json").read_text())
        assert (values["model_type"], values["dtype"]) == (kind, "float32")
        AutoModelForCausalLM.from_pretrained(tmp_path / kind)


def test_what_does_not_fit_is_named(make: Make, tmp_path: Path) -> None:
    directory = make("llama")
    tensors = load_file(directory / "model.safetensors")
    engine = build_engine(directory)
    before = engine.generate([[5]], SamplingParams(temperature=0.0))
    name = "model.layers.1.mlp.up_proj.weight"
    for given, message in (
        ([pair for pair in tensors.items() if pair[0] != name], f"{name} missing"),
        ([*tensors.items(), ("model.layers.7.x", torch.zeros(2))], r"model.layers.7.x not part"),
        ([(n, t[:-1] if n == name else t) for n, t in tensors.items()], f"{name}"),
        ([*tensors.items(), (name, tensors[name])], f"{name} was given twice"),
    ):
        with pytest.raises(ValueError, match=message):
            engine.load_weights(given, 1)
    assert engine.generate([[5]], SamplingParams(temperature=0.0)) == before
    save_file({n: t for n, t in tensors.items() if n != name}, directory / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=f"{name} missing from the weights: use a complete checkpoint"):
        Learner(directory, GRPOConfig())
    with pytest.raises(ValueError, match=r"logits of GraniteForCausalLM are not .* model.family auto cannot train it"):
        Learner(make("granite", logits_scaling=4.0), GRPOConfig())
    with pytest.raises(ValueError, match=r"routes of LlamaForCausalLM are not recorded"):
        build_engine(make("llama"), enable_return_routed_experts=True)


def settings(tmp: Path, name: str, directory: Path, **changes: dict[str, Any]) -> dict[str, Any]:
    rows = [{"prompt": f"{a}+{b}=", "answer": str(a + b)} for a in range(10) for b in range(10)]
    (tmp / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    content: dict[str, Any] = {
        "run": {"cluster": "inline", "output_dir": str(tmp / name), "save_steps": 4, "eval_steps": 5},
        "model": {"path": str(directory), "family": "auto"},
        "data": {"path": str(tmp / "sums.jsonl"), "eval_size": 8},
        "rollout": {"max_completion_length": 6},
        "rewards": {"exact_match": 1.0, "length": {"weight": 0.5, "max": 6}},
        "grpo": {"max_steps": 10, "prompts_per_step": 4, "num_generations": 4, "learning_rate": 3e-3},
    }
    return {section: content.get(section, {}) | changes.get(section, {}) for section in {**content, **changes}}


def rows(run_dir: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    parsed = [json.loads(line) for line in (run_dir / name).read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith("time/") and k != "step_time"} for row in parsed]


@pytest.mark.parametrize("lora", [None, {"r": 4, "lora_alpha": 8}])
def test_a_run_and_its_resume(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lora: dict[str, Any] | None
) -> None:
    if lora:
        pytest.importorskip("peft")
    directory, changes = make("qwen2"), {"model": {"lora": lora}, "grpo": {"beta": 0.01}}
    GRPOTrainer(settings(tmp_path, "whole", directory, **changes)).train()
    whole = rows(tmp_path / "whole")
    assert [row["step"] for row in whole] == list(range(11))
    assert max(row["sampling/sampling_logp_difference/max"] for row in whole[1:]) < 1e-4
    assert whole[-1]["kl"] > 1e-4 and whole[-1]["rewards/length/mean"] != whole[1]["rewards/length/mean"]
    sync = Cluster.sync_weights

    def stop(self: Cluster, version: int) -> dict[str, float]:
        if version == 7:
            raise RunFailure("stopped here")
        return sync(self, version)

    with monkeypatch.context() as patch, pytest.raises(RunFailure, match="--resume"):
        patch.setattr(Cluster, "sync_weights", stop)
        GRPOTrainer(settings(tmp_path, "stopped", directory, **changes)).train()
    assert rows(tmp_path / "stopped")[-1]["step"] == 6
    GRPOTrainer(resume=str(tmp_path / "stopped")).train()
    assert rows(tmp_path / "stopped") == whole
    assert rows(tmp_path / "stopped", "samples.jsonl") == rows(tmp_path / "whole", "samples.jsonl")
    last = AutoModelForCausalLM.from_pretrained(tmp_path / "whole" / "checkpoints" / "step_10")
    if lora:  # on the base, the adapter gives the merged weights beside it
        from peft import PeftModel

        base = AutoModelForCausalLM.from_pretrained(directory)
        loaded = PeftModel.from_pretrained(base, str(tmp_path / "whole" / "checkpoints" / "step_10" / "adapter"))
        ids = torch.arange(20)[None]
        want = last(ids).logits
        assert (loaded(ids).logits - want).abs().max() <= 1e-5 * want.abs().max()


def test_only_the_adapter_learns_and_its_targets_are_checked(make: Make) -> None:
    pytest.importorskip("peft")
    directory = make("llama")
    options: dict[str, Any] = {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "gate_proj"]}
    learner = Learner(directory, GRPOConfig(learning_rate=1e-2), lora=options)
    before = load_file(directory / "model.safetensors")
    learner.step([batches()])
    after = dict(unpacked(learner.weights()))
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {
        f"model.layers.{i}.{part}.weight" for i in (0, 1) for part in ("self_attn.q_proj", "mlp.gate_proj")
    }
    assert all(".lora_" in name for name in learner.policy.names)
    with pytest.raises(ValueError, match=r"names model.embed_tokens.weight; adapters can sit on mlp.down_proj"):
        Learner(directory, GRPOConfig(), lora={"r": 2, "target_modules": ["embed_tokens"]})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": {"family": "deepseek_v3"}}, "holds a 'qwen2' model; set model.family to auto"),
        ({"grpo": {"router_policy": "update"}}, "grpo.router_policy is update, but the model is a 'qwen2'"),
        ({"grpo": {"mtp_loss_weight": 0.1}}, "set it to 0.0"),
        ({"rollout": {"replay_routing": True}}, "set it to false"),
    ],
)
def test_settings_of_the_other_family_are_errors(
    make: Make, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    content = settings(tmp_path, "bad", make("qwen2"))
    for section, keys in changes.items():
        content[section] |= keys
    with pytest.raises(ValueError, match=message):
        GRPOTrainer(content).train()
    assert not (tmp_path / "bad").exists()


def test_the_recipe_wants_a_model_and_nothing_else() -> None:
    config = load_config(ROOT / "configs" / "qwen_gsm8k.yaml")
    assert (config.model.family, config.rollout.engine) == ("auto", "vllm")
    with pytest.raises(ValueError, match=r"neither model.path nor model.init is given; name a model directory"):
        prepare(config)


def test_a_warm_start_by_sft(make: Make, tmp_path: Path) -> None:
    sft = {"max_steps": 20, "batch_size": 16, "learning_rate": 1e-2, "stop_accuracy": 0.9, "eval_every": 10}
    content = settings(tmp_path, "run", make("qwen3"), sft=sft)
    content["data"] |= {"completion_column": "answer"}
    content["grpo"] |= {"max_steps": 1}
    content["model"] |= {"gradient_checkpointing": True}
    GRPOTrainer(content).train()
    (stage,) = (tmp_path / ".cache").glob("sft-*")
    losses = [row["loss"] for row in rows(stage)]
    assert losses[-1] < 0.5 * losses[0]
    assert rows(stage)[-1]["sampled_accuracy"] >= 0


def test_an_adapter_travels_as_it_is_once_that_is_settled(make: Make) -> None:
    """First the untouched base under published names and the adapter under PEFT's; then the adapter alone, whole."""
    pytest.importorskip("peft")
    directory = make("qwen2")
    learner = Learner(directory, GRPOConfig(learning_rate=1e-2), lora={"r": 2, "lora_alpha": 4})
    learner.send_adapter()
    base, adapter = load_file(directory / "model.safetensors"), learner.adapter.tensors()  # type: ignore[union-attr]
    learner.step([batches()])
    everything = dict(unpacked(learner.weights()))
    assert everything.keys() == base.keys() | adapter.keys()
    assert all(torch.equal(everything[name], tensor) for name, tensor in (base | adapter).items())
    learner.step([batches()])
    changes = learner.weights(since=1)
    assert {bucket.base for bucket in changes} == {1}
    assert dict(unpacked(changes)).keys() == adapter.keys()
    assert len({load_unit(name) for name in adapter}) == 1
    assert dict(unpacked(learner.weights(since=1))).keys() == everything.keys()  # 2 was sent last
