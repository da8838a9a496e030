"""Claim: on one GPU, a push of all parameters of a Moonlight-shaped model to vLLM with every tensor proved takes at
most 1.15 times the bare `reload_weights` of the same run.

    python -m benchmarks.vllm_sync [--layers 27] [--fp8] [--rounds 5]

Random weights, colocated: the pushed tensors lie on the same GPU. Needs vLLM (0.26 with torch 2.11) and 100 GB of GPU
memory for all 27 layers. --fp8: the engine has FP8 in blocks (quantization fp8_per_block) and gets codes and scales; a
push of BF16 weights then begins with their cast, whose time is counted, and one of a learner in FP8 does not.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import machine, quartiles, write_result
from model import DeepseekV3Config, DeepseekV3ForCausalLM
from model.fp8.published import in_blocks
from model.names import hf_state
from rollout import SamplingParams, WeightFault
from rollout.vllm_engine import VllmEngine

MOONLIGHT: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "vocab_size": 163840,
    "hidden_size": 2048,
    "intermediate_size": 11264,
    "moe_intermediate_size": 1408,
    "first_k_dense_replace": 1,
    "num_nextn_predict_layers": 0,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "q_lora_rank": None,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "num_experts_per_tok": 6,
    "n_group": 1,
    "topk_group": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.446,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "rms_norm_eps": 1e-5,
    "rope_theta": 50000.0,
    "max_position_embeddings": 8192,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "attention_bias": False,
    "torch_dtype": "bfloat16",
    "bos_token_id": 163584,
    "eos_token_id": 163585,
}


def weights_of(config: DeepseekV3Config, seed: int) -> list[tuple[str, torch.Tensor]]:
    """Random published tensors on the GPU: BF16, the router's bias FP32."""
    with torch.device("meta"):
        model = DeepseekV3ForCausalLM(config)
    torch.cuda.manual_seed(seed)
    made = []
    for name, like in hf_state(model):
        dtype = torch.float32 if name.endswith("e_score_correction_bias") else torch.bfloat16
        tensor = torch.empty(like.shape, device="cuda", dtype=dtype)
        made.append((name, tensor.fill_(1.0) if "norm" in name else tensor.normal_(0, 0.02)))
    return made


def seconds(action: Callable[[], Any], rounds: int) -> dict[str, float]:
    times = []
    for _ in range(rounds):
        torch.cuda.synchronize()
        start = time.perf_counter()
        action()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return quartiles(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=27)
    parser.add_argument("--fp8", action="store_true")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    before = machine()
    os.environ.setdefault("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")
    with tempfile.TemporaryDirectory() as folder:
        content = MOONLIGHT | {"num_hidden_layers": args.layers}
        (Path(folder) / "config.json").write_text(json.dumps(content))
        options: dict[str, Any] = {"load_format": "dummy", "gpu_memory_utilization": 0.42, "enforce_eager": True}
        if args.fp8:
            options |= {"quantization": "fp8_per_block", "kv_cache_gb": 1.0}
        start = time.perf_counter()
        engine = VllmEngine(folder, dtype="bfloat16", max_num_seqs=64, max_model_len=2048, **options)
        started = time.perf_counter() - start
        drawn = weights_of(DeepseekV3Config.from_pretrained(folder), seed=1)
    pushed = list(in_blocks(drawn, engine.fp8_names))
    size = sum(tensor.numel() * tensor.element_size() for _, tensor in pushed)

    def bare() -> None:
        engine.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(pushed)})

    def proved() -> None:
        engine.load_weights(pushed, 1)
        engine.check_weights(pushed)

    def cast() -> None:
        for _ in in_blocks(drawn, engine.fp8_names):
            pass

    bare()
    proved()
    rounds = [(seconds(bare, 1)["median"], seconds(proved, 1)["median"]) for _ in range(args.rounds)]
    plain, checked = (quartiles([pair[side] for pair in rounds]) for side in (0, 1))
    ratio = quartiles([with_proof / without for without, with_proof in rounds])
    prompts = [[7 * i + j for j in range(64)] for i in range(16)]
    sampled = engine.generate(prompts, SamplingParams(max_tokens=32, seed=0, ignore_eos=True))
    planted = _planted(engine, pushed)
    results = {
        "layers": args.layers,
        "engine": "fp8_per_block" if args.fp8 else "bfloat16",
        "parameters": sum(tensor.numel() for _, tensor in drawn),
        "bytes": size,
        "bytes_in_bfloat16": sum(tensor.numel() * tensor.element_size() for _, tensor in drawn),
        "cast_seconds": seconds(cast, args.rounds) if args.fp8 else None,
        "start_seconds": started,
        "bare_reload_seconds": plain,
        "push_and_proof_seconds": checked,
        "ratio": ratio,
        "gigabytes_per_second": size / checked["median"] / 1e9,
        "proof_alone_seconds": seconds(lambda: engine.check_weights(pushed), args.rounds),
        "planted_faults_found": planted,
        "tokens_drawn_after": sum(len(c.token_ids) for group in sampled for c in group),
        "gpu": torch.cuda.get_device_name(),
    }
    print(json.dumps(results, indent=1))
    print(write_result(f"vllm_sync{'_fp8' if args.fp8 else ''}", __doc__ or "", before, results))


def _planted(engine: VllmEngine, pushed: list[tuple[str, torch.Tensor]]) -> dict[str, str]:
    """The proof against tensors of which two rows were swapped, one at a time: what it says for each."""
    found = {}
    for name in (
        "model.layers.1.mlp.experts.63.down_proj.weight",
        "model.layers.1.self_attn.kv_b_proj.weight",
        "model.layers.0.mlp.up_proj.weight",
        "lm_head.weight",
    ):
        other = [(n, _swapped(t) if n == name else t) for n, t in pushed]
        try:
            engine.check_weights(other)
            found[name] = "not found"
        except WeightFault as fault:
            found[name] = str(fault)
        engine.whole = True
    return found


def _swapped(tensor: torch.Tensor) -> torch.Tensor:
    rows = torch.tensor([1, 0, *range(2, len(tensor))], device=tensor.device)
    return tensor.view(torch.uint8)[rows].view(tensor.dtype) if tensor.dtype.itemsize == 1 else tensor[rows]


if __name__ == "__main__":
    main()
