"""An engine of vLLM's in FP8 takes the learner's bytes: real vLLM, on a GPU with its kernels, on a CPU with emulated
ones (tests/rollout/emulated_fp8.py). Every planted fault is named, by the bytes and by probes alone.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from grpo.config import GRPOConfig
from grpo.learner import Learner
from model.fp8.modules import Fp8Layer
from model.fp8.quantize import quantize_blocks, scale_shape
from model.names import SCALE_SUFFIX, hf_state, stored_in_fp8
from rollout import SamplingParams, WeightFault, build_engine, vllm_proof
from tests.rollout import emulated_fp8
from tests.samples import batches
from tests.weights import unpacked

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="`make test-vllm` has vLLM"),
]
ON_GPU = torch.cuda.is_available()
SIZES: dict[str, Any] = {  # blocks of 128, and the latents of MLA that kernels on a GPU take
    "vocab_size": 128,
    "hidden_size": 256,
    "intermediate_size": 384,
    "moe_intermediate_size": 128,
    "num_attention_heads": 16 if ON_GPU else 4,
    "num_key_value_heads": 16 if ON_GPU else 4,
    "q_lora_rank": 128,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "n_group": 1,
    "topk_group": 1,
    "initializer_range": 0.05,
}
OPTIONS: dict[str, Any] = {"dtype": "bfloat16", "max_num_seqs": 16, "kv_cache_gb": 0.2, "enforce_eager": True}
OPTIONS["quantization"] = "fp8_per_block"
Pairs = list[tuple[str, torch.Tensor]]


@pytest.fixture(scope="module", autouse=True)
def kernels() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        if not ON_GPU:
            emulated_fp8.install(patch)
        yield


@pytest.fixture(scope="module")
def directory(vllm_tiny: Any) -> Path:
    """Blocks are up to 4 times as large as others: exchanged scales show in a product."""
    path = vllm_tiny(**SIZES)
    tensors, generator = load_file(path / "model.safetensors"), torch.Generator().manual_seed(1)
    for name, tensor in tensors.items():
        if stored_in_fp8(name):
            sizes = 2 ** (2 * torch.rand(scale_shape(tensor.shape), generator=generator) - 1)
            tensor *= sizes.repeat_interleave(128, 0).repeat_interleave(128, 1)[: len(tensor), : tensor.shape[1]]
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    return path


@pytest.fixture(scope="module")
def engine(directory: Path, kernels: None) -> Any:
    return build_engine(directory, "vllm", enable_return_routed_experts=True, **OPTIONS)


def build_learner(directory: Path, fp8: bool = True, **options: Any) -> Learner:
    mode: Any = "emulate" if fp8 else "off"
    device = "cuda" if ON_GPU else "cpu"
    config = GRPOConfig(learning_rate=1e-3)
    return Learner(directory, config, dtype="bfloat16", fp8=mode, device=device, canaries=True, **options)


@pytest.fixture(scope="module")
def learner(directory: Path, engine: Any) -> Learner:
    learner = build_learner(directory)
    learner.step(batches(0))
    learner.send_fp8(engine.fp8_names)
    return learner


@pytest.fixture(scope="module")
def weights(learner: Learner) -> Pairs:
    return [(name, tensor.clone()) for name, tensor in unpacked(learner.weights())]


def live(engine: Any, name: str) -> torch.Tensor:
    return engine.llm.apply_model(lambda model: model.get_parameter(name))[0]


def test_the_engine_has_in_fp8_what_the_learner_has(engine: Any) -> None:
    """All that released checkpoints have so, but for MTP layers, which an engine that does not draft has not at all."""
    both = {name for name in engine.published if stored_in_fp8(name) and not name.startswith("model.layers.3.")}
    assert engine.fp8_names == both and len(both) == 3 * 5 + 3 + 2 * 27


def test_a_push_brings_the_learners_very_bytes(engine: Any, learner: Learner, weights: Pairs) -> None:
    engine.load_weights(weights, 1)
    engine.check_weights(weights)
    model, held = learner.policy.model, dict(weights)
    experts: Any = model.model.layers[1].mlp.experts
    codes, scales = (getattr(experts._codes["gate_up"][1], part) for part in ("codes", "scales"))
    name = "model.layers.1.mlp.experts.routed_experts.w13_weight"
    assert torch.equal(live(engine, name).view(torch.uint8), codes.view(torch.uint8))
    assert torch.equal(live(engine, f"{name}{SCALE_SUFFIX}"), scales)
    shared: Any = model.model.layers[2].mlp.shared_experts
    gate_up = live(engine, "model.layers.2.mlp.shared_experts.gate_up_proj.weight")
    assert torch.equal(gate_up.view(torch.uint8), shared._codes["gate_up"][1].codes[0].view(torch.uint8))
    layers = [layer for layer in model.model.modules() if isinstance(layer, Fp8Layer)]
    numbers = sum(w.codes.numel() for layer in layers for _, w in layer._codes.values())
    assert numbers == sum(t.numel() for n, t in held.items() if n in engine.fp8_names)
    size = {name: tensor.nbytes for name, tensor in held.items()}
    in_fp8 = sum(v for n, v in size.items() if n.removesuffix(SCALE_SUFFIX) in engine.fp8_names)
    assert in_fp8 < 0.501 * sum(2 * held[name].numel() for name in engine.fp8_names)
    mtp = "model.layers.3.mlp.experts.0.up_proj.weight"  # in FP8 here alone
    assert held[mtp].dtype == torch.bfloat16


def test_canaries_of_an_fp8_learner(engine: Any, learner: Learner, weights: Pairs) -> None:
    engine.load_weights(weights, 1)
    canary = learner.canary()
    rerouted = engine.check_canary(canary.prompts, canary.logprobs)
    got, routes = engine.read_prompts(canary.prompts)
    for want in (canary, learner.canary(routes)):
        errors = [np.abs(np.subtract(a, b)) for a, b in zip(got, want.logprobs, strict=True)]
        print("canaries:", [(float(e.mean()), float(e.max())) for e in errors])
    assert np.mean([e.mean() for e in errors]) < 0.05
    assert rerouted is None or learner.check_rerouted(rerouted) is None


def test_weights_that_nobody_has_cast_are_cast_once(engine: Any, directory: Path) -> None:
    """By the learner, so that they are known; an engine starts with the same bytes of its directory."""
    plain = build_learner(directory, fp8=False)
    plain.send_fp8(engine.fp8_names)
    weights = unpacked(plain.weights())
    held = dict(weights)
    for name, tensor in hf_state(plain.policy.model):
        if name in engine.fp8_names:
            codes, scales = quantize_blocks(tensor.cpu())
            assert torch.equal(held[name].cpu().view(torch.uint8), codes.view(torch.uint8))
            assert torch.equal(held[name + SCALE_SUFFIX].cpu(), scales)
        else:
            assert torch.equal(held[name].cpu(), tensor.cpu())
    engine.load_weights(weights, 2)
    engine.check_weights(weights)
    params = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
    prompts = [[5, 6, 7 + i] for i in range(6)]
    drawn = [c.token_ids for group in engine.generate(prompts, params) for c in group]
    fresh: Any = build_engine(directory, "vllm", **OPTIONS)
    fresh.check_weights(weights)
    assert [c.token_ids for group in fresh.generate(prompts, params) for c in group] == drawn


def changed(suffix: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Pairs], Pairs]:
    """Pairs in which one tensor, or some, are others."""
    return lambda weights: [(n, change(t.clone()) if n.endswith(suffix) else t) for n, t in weights]


def two_rows(t: torch.Tensor) -> torch.Tensor:
    return t.view(torch.uint8)[[1, 0, *range(2, len(t))]].view(t.dtype) if t.dtype.itemsize == 1 else t.flip(0)


def two_scales(t: torch.Tensor) -> torch.Tensor:
    flat = t.flatten()
    low, high = int(flat.argmin()), int(flat.argmax())
    flat[low], flat[high] = flat[high].clone(), flat[low].clone()
    return flat.view(t.shape)


def one_code(t: torch.Tensor) -> torch.Tensor:
    """The smallest number of a row becomes the largest there is."""
    t[3, int(t[3].float().abs().argmin())] = 448.0
    return t


def exchanged(weights: Pairs) -> Pairs:
    """Gate and up of one expert, with their scales."""
    held, stem = dict(weights), "model.layers.2.mlp.experts.3."
    for leaf in ("weight", "weight_scale_inv"):
        gate, up = f"{stem}gate_proj.{leaf}", f"{stem}up_proj.{leaf}"
        held[gate], held[up] = held[up], held[gate]
    return list(held.items())


def other_half(weights: Pairs) -> Pairs:
    """The q_a_proj of a layer is not taken over: as where it came without kv_a_proj_with_mqa."""
    return changed("layers.0.self_attn.q_a_proj.weight", lambda t: torch.zeros_like(t))(weights)


FAULTS = {
    "rows of an expert": (changed("layers.1.mlp.experts.5.gate_proj.weight", two_rows), r"layers\.1\.mlp\.experts\.5"),
    "rows of an expert's down_proj": (
        changed("layers.2.mlp.experts.0.down_proj.weight", two_rows),
        r"layers\.2\.mlp\.experts\.0",
    ),
    "scales of two blocks of an expert": (
        changed("layers.1.mlp.experts.6.down_proj.weight_scale_inv", two_scales),
        r"layers\.1\.mlp\.experts\.6",
    ),
    "scales of two blocks": (
        changed("layers.1.self_attn.o_proj.weight_scale_inv", two_scales),
        r"layers\.1\.self_attn\.o_proj\.weight",
    ),
    "one code": (changed("layers.0.mlp.up_proj.weight", one_code), r"layers\.0\.mlp\.up_proj\.weight"),
    "one code of kv_b_proj": (changed("layers.1.self_attn.kv_b_proj.weight", one_code), r"self_attn\.kv_b_proj"),
    "one code of an expert": (
        changed("layers.1.mlp.experts.2.down_proj.weight", one_code),
        r"layers\.1\.mlp\.experts\.2",
    ),
    "gate and up": (exchanged, r"layers\.2\.mlp\.experts\.3"),
    "q_a without kv_a": (other_half, r"layers\.0\.self_attn\.q_a_proj\.weight"),
}


def is_linear(module: torch.nn.Module) -> bool:
    return hasattr(getattr(module, "quant_method", None), "fp8_linear")


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_named(engine: Any, weights: Pairs, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is loaded differs from what is said to have been; without bytes the probes find it by themselves."""
    plant, message = FAULTS[fault]
    engine.load_weights(plant(weights), 3)
    with pytest.raises(WeightFault, match=message) as err:
        engine.check_weights(weights)
    assert err.match("differs from what was pushed")
    monkeypatch.setattr(vllm_proof, "PLAIN", ())
    [kernels] = engine.llm.apply_model(
        lambda model: {type(m.quant_method.fp8_linear).__name__ for m in model.modules() if is_linear(m)}
    )
    monkeypatch.setattr(vllm_proof, "REPACKED", tuple(kernels))
    with pytest.raises(WeightFault, match=message) as err:
        engine.check_weights(weights)
    assert err.match("computes something else|absorbed products")


def test_after_all_faults_a_push_is_whole_again(engine: Any, weights: Pairs) -> None:
    engine.load_weights(weights, 4)
    engine.check_weights(weights)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (changed("layers.1.self_attn.o_proj.weight", lambda t: t.bfloat16()), "o_proj.weight came as torch.bfloat16"),
        (changed("layers.1.mlp.gate.weight", lambda t: t.to(torch.float8_e4m3fn)), "gate.weight came as torch.float8"),
        (lambda w: [p for p in w if "layers.0.self_attn.o_proj.weight_scale_inv" not in p[0]], "scale_inv is missing"),
        (
            lambda w: [p for p in w if "layers.0.self_attn.kv_a_proj" not in p[0]],
            "kv_a_proj_with_mqa.weight is missing",
        ),
        (changed("layers.1.self_attn.o_proj.weight_scale_inv", lambda t: t[:1]), "scale_inv has the shape"),
    ],
)
def test_a_push_in_another_form_loads_nothing(engine: Any, weights: Pairs, wrong: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        engine.load_weights(wrong(weights), 5)
