"""Training with model.fp8 emulate: what travels and is saved is plain, engines compute the learner's numbers."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

from grpo import GRPOTrainer, roles
from grpo.cluster import Cluster
from grpo.config import ConfigError, GRPOConfig, load_config
from grpo.evaluate import evaluate_policy
from grpo.learner import Learner
from grpo.packing import pack
from grpo.records import TrainingSample
from grpo.roles import learner_role
from grpo.stages import run_sft
from model import DeepseekV3ForCausalLM
from model.create import create_model
from model.fp8.modules import Fp8Experts, Fp8Layer, kept_in_fp32, to_fp8
from model.names import SCALE_SUFFIX, hf_state, load_hf_state, stored_in_fp8
from rollout import SamplingParams, build_engine
from tests.resume import check_resume
from tests.samples import batches
from tests.weights import unpacked

TINY = Path(__file__).resolve().parents[2] / "configs" / "tiny_v3.yaml"


def state(learner: Learner) -> dict[str, torch.Tensor]:
    """Every tensor of the model, the master weights, and the optimiser's."""
    found = {name: tensor.clone() for name, tensor in learner.policy.model.state_dict().items()}
    for name, master in zip(learner.policy.names, learner.policy.master):
        found[f"{name}|master"] = master.detach().clone()
        found |= {f"{name}|{key}": value.clone() for key, value in learner.optimizer.state[master].items()}
    return found


@pytest.mark.parametrize(
    ("dtype", "moments"), [("float32", "float32"), ("bfloat16", "float32"), ("bfloat16", "bfloat16")]
)
def test_resume_is_bit_equal(tiny: Path, tmp_path: Path, dtype: str, moments: Any) -> None:
    config = GRPOConfig(learning_rate=1e-3, mtp_loss_weight=0.1, adam_moment_dtype=moments, adam_beta2=0.95)
    learner, fresh = (Learner(tiny, config, dtype=dtype, fp8="emulate") for _ in range(2))
    check_resume(learner, fresh, [batches(0), batches(1), batches(2)], state, tmp_path)
    published = load_file(tmp_path / "model.safetensors")
    assert {str(t.dtype).removeprefix("torch.") for n, t in published.items() if not n.endswith("_bias")} == {dtype}
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == dtype


def test_master_weights_have_no_bfloat16_copy(tiny: Path) -> None:
    """What computes in FP8: 4 bytes a weight for parameter and master, one for codes, gradients added up in FP32; it
    moves by less than BF16 can hold. Everything else: BF16 beside an FP32 master."""
    learner = Learner(tiny, GRPOConfig(learning_rate=1e-6), dtype="bfloat16", fp8="emulate")
    policy, grads = learner.policy, dict[str, torch.dtype]()
    in_fp8 = kept_in_fp32(policy.model)
    assert in_fp8 == {
        name for name in policy.names if re.search(r"(self_attn|mlp)\..*_proj(_with_mqa)?(\.weight)?$", name)
    }
    of_masters = [(n, m) for n, m in zip(policy.names, policy.master) if n in in_fp8]
    for name, parameter in zip(policy.names, policy.parameters):
        if name not in in_fp8:
            parameter.register_post_accumulate_grad_hook(
                lambda p, n=name: grads.update({} if p.grad is None else {n: p.grad.dtype})
            )
    learner.optimizer.register_step_pre_hook(  # those of experts are complete after the last backward pass only
        lambda *_: grads.update({n: m.grad.dtype for n, m in of_masters if m.grad is not None})
    )
    before = {name: master.detach().clone() for name, master in zip(policy.names, policy.master)}
    learner.step(batches())
    size = {True: 0, False: 0}  # bytes by whether it computes in FP8
    count = {True: 0, False: 0}
    for name, parameter, master in zip(policy.names, policy.parameters, policy.master):
        fp8 = name in in_fp8
        size[fp8] += sum({t.data_ptr(): t.nbytes for t in (parameter, master)}.values())
        count[fp8] += parameter.numel()
        assert master.dtype == torch.float32 and (parameter is master) == fp8, name
        assert parameter.dtype == (torch.float32 if fp8 else torch.bfloat16), name
        if name == "lm_head.weight":
            assert name not in grads  # added to its sum where it is computed
        else:
            assert name.startswith("mtp") or grads[name] == parameter.dtype, name
    assert size[True] == 4 * count[True] and size[False] == 6 * count[False]
    layers = [module for module in policy.model.modules() if isinstance(module, Fp8Layer)]
    held = {w.codes.data_ptr(): w.codes.nbytes for layer in layers for _, w in layer._codes.values()}
    numbers = {n: p.numel() for n, p in policy.model.named_parameters() if n in in_fp8}
    assert sum(held.values()) == sum(
        n for name, n in numbers.items() if not name.startswith("mtp")
    )  # not computed here
    place = policy.names.index("model.layers.1.mlp.experts.down_proj")
    moved = policy.master[place] - before["model.layers.1.mlp.experts.down_proj"]
    assert 0 < moved.abs().max() < 2e-6 and (moved != 0).float().mean() > 0.5


@pytest.mark.parametrize("recipe", ["blockwise", "mxfp8"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_engine_without_fp8_gets_what_the_codes_stand_for(tiny: Path, dtype: str, recipe: str) -> None:
    """In the model's dtype; canaries are what a plain model makes of that, to rounding. FP8 of an engine's own gets the
    parameters in FP32."""
    config = GRPOConfig(learning_rate=1e-2)
    learner = Learner(tiny, config, dtype=dtype, fp8="emulate", fp8_recipe=recipe, canaries=True)
    learner.step(batches())
    buckets = learner.weights()
    learner.exact_sync = True  # as an engine gets them that makes codes of them
    exact, masters = dict(unpacked(learner.weights())), dict(hf_state(learner.policy.model, exact=True))
    for name, got in unpacked(buckets):
        bias = name.endswith("e_score_correction_bias")
        assert got.dtype == (torch.float32 if bias else getattr(torch, dtype))
        assert torch.equal(exact[name], masters[name])
        error = (got.float() - masters[name].float()).norm() / masters[name].float().norm().clamp(min=1e-30)
        assert 0.01 < error < 0.05 if stored_in_fp8(name) else error == 0, name
    plain = DeepseekV3ForCausalLM.from_pretrained(tiny, dtype=getattr(torch, dtype))
    load_hf_state(plain, unpacked(buckets))
    canary = buckets[0].canary
    assert canary is not None
    ids = torch.tensor(canary.prompts)
    with torch.no_grad():
        logprobs = plain(ids).logits[:, :-1].float().log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]
        assert (logprobs - torch.tensor(canary.logprobs)).abs().max() < (1e-4 if dtype == "float32" else 5e-2)
        to_fp8(plain, "emulate", recipe)
        fp8 = plain(ids).logits[:, :-1].float().log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]
    assert (fp8 - torch.tensor(canary.logprobs)).abs().mean() > 5e-3


@pytest.mark.parametrize("recipe", ["blockwise_ue8m0", "mxfp8"])
@pytest.mark.parametrize("exact", [False, True])
def test_the_engine_computes_the_learners_numbers(tiny: Path, recipe: str, exact: bool) -> None:
    """To FP32's rounding, but where that decides a code or an expert."""
    engine = build_engine(tiny, fp8="emulate", fp8_recipe=recipe, exact=exact)
    learner = Learner(tiny, GRPOConfig(learning_rate=1e-2), fp8="emulate", fp8_recipe=recipe)
    learner.step(batches())
    engine.load_weights(unpacked(learner.weights()), 1)
    prompts = [list(range(3, 8 + i)) for i in range(8)]
    params = SamplingParams(max_tokens=8, seed=0, ignore_eos=True)
    errors = []
    for prompt, (completion,) in zip(prompts, engine.generate(prompts, params), strict=True):
        sample = TrainingSample(tuple(prompt), completion.token_ids, 1.0)
        (batch,) = pack([[sample]], 1000)
        errors += (learner.logprobs(batch) - torch.tensor(completion.logprobs)).abs().tolist()
    assert np.median(errors) < 1e-5 and np.mean(errors) < 1e-2


def test_an_engine_makes_the_learners_codes(tiny: Path) -> None:
    """In BF16, of its masters: the very bytes, and log-probabilities no further apart than casts of BF16 numbers make
    them (0.09 in the mean). Of what the codes stand for, rounded to BF16: the same codes, scales 2^-8 off at most."""
    learner = Learner(tiny, GRPOConfig(learning_rate=1e-3), dtype="bfloat16", fp8="emulate")
    for seed in range(3):
        learner.step(batches(seed))
    prompts = [list(range(3, 8 + i)) for i in range(8)]
    params = SamplingParams(max_tokens=8, seed=0, ignore_eos=True)
    for exact in (True, False):
        engine: Any = build_engine(tiny, dtype=torch.bfloat16, fp8="emulate")
        learner.exact_sync = exact
        engine.load_weights(unpacked(learner.weights()), 3)
        errors = []
        for prompt, (completion,) in zip(prompts, engine.generate(prompts, params), strict=True):
            (batch,) = pack([[TrainingSample(tuple(prompt), completion.token_ids, 1.0)]], 1000)
            errors += (learner.logprobs(batch) - torch.tensor(completion.logprobs)).abs().tolist()
        compared = 0
        for ours, theirs in zip(learner.policy.model.model.modules(), engine.model.model.modules(), strict=True):
            if isinstance(ours, Fp8Layer):
                for name, (_, weight) in ours._codes.items():
                    other = theirs._codes[name][1]
                    assert torch.equal(weight.codes.view(torch.uint8), other.codes.view(torch.uint8))
                    torch.testing.assert_close(other.scales, weight.scales, rtol=0 if exact else 2**-8, atol=0)
                    compared += weight.codes.numel()
        assert compared > 10_000 and np.mean(errors) < 0.13


def settings(tmp: Path, **model: Any) -> dict[str, Any]:
    rows = [{"prompt": f"{a}+{b}=", "answer": str(a + b)} for a in range(10) for b in range(10)]
    (tmp / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "run": {"cluster": "inline", "output_dir": str(tmp / "run"), "save_steps": 2},
        "model": {"init": str(TINY), "fp8": "emulate", **model},
        "data": {"path": str(tmp / "sums.jsonl"), "eval_size": 8, "completion_template": "{answer}"},
        "rollout": {"max_completion_length": 6},
        "rewards": {"length": {"weight": 0.5, "max": 6}, "exact_match": 1.0},
        "sft": {"max_steps": 3, "learning_rate": 1e-3},
        "grpo": {"max_steps": 3, "prompts_per_step": 4, "num_generations": 4, "learning_rate": 1e-3, "beta": 0.01},
    }


@pytest.mark.parametrize(("engine", "exact"), [("embedded", True), ("vllm", False)])
def test_what_a_run_sends_its_engine(tiny: Path, tmp_path: Path, engine: str, exact: bool) -> None:
    config = load_config(settings(tmp_path, init=None, path=str(tiny), dtype="bfloat16"))
    config = config.model_copy(update={"rollout": config.rollout.model_copy(update={"engine": engine})})
    learner = learner_role(config, str(tiny), str(tiny), "")
    sent = {entry.name: entry.dtype for bucket in learner.weights() for entry in bucket.entries}
    assert sent["model.layers.1.mlp.experts.0.up_proj.weight"] == ("float32" if exact else "bfloat16")
    assert sent["lm_head.weight"] == "bfloat16"


def test_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """GRPO with its warm start, a KL reference in FP8 as well, and the evaluation of its last checkpoint."""
    monkeypatch.chdir(tmp_path)  # where the warm start is kept
    calls, forward = 0, Fp8Experts.forward

    def counted(self: Fp8Experts, *args: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return forward(self, *args)

    monkeypatch.setattr(Fp8Experts, "forward", counted)
    GRPOTrainer(settings(tmp_path)).train()
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()][1:]
    assert max(row["sampling/sampling_logp_difference/mean"] for row in rows) < 1e-3
    assert rows[0]["kl"] == pytest.approx(0, abs=1e-6) and calls > 50
    last = tmp_path / "run" / "checkpoints" / "step_3"
    assert "quantization_config" not in json.loads((last / "config.json").read_text())
    assert evaluate_policy(str(tmp_path / "run"), [], n=2, ks=[1])["greedy_accuracy"] == rows[-1]["eval/accuracy"]


def test_supervised_stage(tmp_path: Path) -> None:
    create_model(yaml.safe_load(TINY.read_text()), tmp_path / "model", seed=0)
    losses = []
    for fp8 in ("off", "emulate"):
        config = load_config(settings(tmp_path, init=None, path=str(tmp_path / "model"), fp8=fp8))
        run_sft(config, tmp_path / "model", tmp_path / fp8)
        lines = (tmp_path / fp8 / "metrics.jsonl").read_text().splitlines()
        losses.append([json.loads(line)["loss"] for line in lines])
    assert 0 < max(abs(a - b) for a, b in zip(*losses, strict=True)) < 0.02 * losses[0][0]


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"fp8": "yes"}, "model.fp8"),
        ({"lora": {"r": 4}}, "model.fp8 emulate trains all weights, model.lora an adapter"),
        ({"family": "auto"}, "model.fp8 emulate needs model.family deepseek_v3"),
        ({"fp8": "on", "fp8_recipe": "mxfp8"}, "mxfp8 is emulated only"),
    ],
)
def test_bad_settings(tmp_path: Path, model: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as err:
        load_config(settings(tmp_path, **model))
    assert message in str(err.value) and "\n" not in str(err.value)


class Fp8Engine:
    """Keeps what it is sent; has some matrices in FP8."""

    policy_version = 0

    def __init__(self, fp8_names: frozenset[str]) -> None:
        self.fp8_names, self.held = fp8_names, dict[str, torch.Tensor]()

    def load_weights(self, weights: Any, version: int, base: int | None = None) -> None:
        self.held |= {name: tensor.clone() for name, tensor in weights}
        self.policy_version = version


@pytest.mark.parametrize("transport", ["in_process", "object_store", "disk"])
def test_an_engine_in_fp8_is_sent_codes(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, transport: str
) -> None:
    """Half the bytes, whatever takes them there, and of a later version only the codes that moved."""
    learner = Learner(tiny, GRPOConfig(), dtype="bfloat16", fp8="emulate")
    experts = {n for n, _ in hf_state(learner.policy.model) if re.search(r"layers\.[12]\.mlp\.experts\.\d.down", n)}
    engine = Fp8Engine(frozenset(experts))
    monkeypatch.setattr(roles, "build_engine", lambda *_, **__: engine)
    content = settings(tmp_path, init=None, path=str(tiny), dtype="bfloat16")
    content["rollout"] |= {"engine": "vllm", "weight_check": "off"}
    config = load_config(content)
    made = config.rollout.model_copy(update={"weight_transport": transport})
    with Cluster(config.model_copy(update={"rollout": made}), tiny, tiny) as cluster:
        metrics = cluster.sync_weights(0)
        assert metrics["sync/fp8_bytes"] == sum(engine.held[name].numel() for name in experts) > 0
        assert metrics["sync/bytes"] == sum(tensor.nbytes for tensor in engine.held.values())
        policy: Any = cluster.backend.roles["learner"].policy  # type: ignore[attr-defined]
        weight = policy.model.model.layers[1].mlp.experts
        codes = weight.codes("down", weight.down_proj)
        for e in range(len(codes.codes)):
            name = f"model.layers.1.mlp.experts.{e}.down_proj.weight"
            assert torch.equal(engine.held[name].view(torch.uint8), codes.codes[e].view(torch.uint8))
            assert torch.equal(engine.held[name + SCALE_SUFFIX], codes.scales[e])
        with torch.no_grad():  # too little for any code, but for the scale of the block that it is the largest of
            weight.down_proj.view(-1)[weight.down_proj.abs().argmax()].mul_(1 + 1e-5)
        assert cluster.sync_weights(0)["sync/fp8_bytes"] == codes.codes.numel()  # the experts of one layer
