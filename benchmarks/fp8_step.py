"""Claim: a whole GRPO learner step of a Moonlight-shaped model is faster in FP8 than in BF16, in less memory.

    python -m benchmarks.fp8_step [--layers N] [--steps 5] [--rounds 2]     # one Hopper GPU
    python -m benchmarks.fp8_step --tiny                                     # a tiny model on a CPU, FP8 emulated

Both sides are `Learner.step` on the same random weights and the same packed rows: forward, GRPO loss, backward,
clipping, AdamW with BF16 moments over FP32 masters, new BF16 weights or FP8 codes. As many of the 27 layers as fit.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from benchmarks.common import machine, quartiles, write_result
from benchmarks.step_profile import IN_FP8, occupied, profiled
from benchmarks.vllm_sync import MOONLIGHT
from grpo.config import GRPOConfig
from grpo.learner import Learner
from grpo.packing import pack
from grpo.records import PackedBatch, TrainingSample
from model import DeepseekV3Config, DeepseekV3ForCausalLM
from model.fp8.modules import to_fp8
from model.info import tally

PEAK = 989e12  # FLOP/s of an H100 or H200 in BF16, dense
GROUP, PROMPT = 8, 256  # samples of a prompt, and its tokens
# Bytes a parameter: FP32 master, gradient, AdamW's BF16 moments, and the BF16 copy or the FP8 codes of two directions
STATE_BYTES = 4 + 4 + 4 + 2
# Bytes a token of a row: kept for the backward pass in each layer in BF16, and the head's chunk and what is left over
LAYER_BYTES, RESERVE = 240_000, 4 << 30
TINY = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 32, "num_attention_heads": 4,
    "num_key_value_heads": 4, "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 16,
    "n_routed_experts": 8, "num_experts_per_tok": 2, "max_position_embeddings": 256,
}  # fmt: skip


def configuration(layers: int, tiny: bool) -> DeepseekV3Config:
    return DeepseekV3Config.from_dict(MOONLIGHT | (TINY if tiny else {}) | {"num_hidden_layers": layers})


def layers_that_fit(room: int, row: int) -> int:
    """Of 27, in `room` bytes: all state of the parameters, and the activations of a row."""
    layers = 27
    while layers > 2 and _bytes(layers, row) > room:
        layers -= 1
    return layers


def _bytes(layers: int, row: int) -> int:
    return STATE_BYTES * tally(configuration(layers, False)).main.parameters + row * layers * LAYER_BYTES + RESERVE


def rows_of(config: DeepseekV3Config, rows: int, row: int, seed: int) -> list[PackedBatch]:
    """Micro-batches of exactly `row` packed tokens: a prompt and GROUP completions of uneven lengths."""
    rng = np.random.default_rng(seed)
    prompt = min(PROMPT, row // 4)
    groups = []
    for _ in range(rows):
        share = rng.lognormal(0, 0.6, GROUP)
        lengths = np.maximum((share / share.sum() * (row - prompt + 1)).astype(int), 1)
        lengths[0] += row - prompt + 1 - lengths.sum()
        advantages = rng.normal(size=GROUP)
        ids = tuple(rng.integers(0, config.vocab_size, prompt).tolist())
        groups.append([
            TrainingSample(
                ids, tuple(rng.integers(0, config.vocab_size, n).tolist()), 0.0, float(advantage),
                tuple(rng.normal(-np.log(config.vocab_size), 0.1, n).tolist()),
            )
            for n, advantage in zip(lengths, (advantages - advantages.mean()) / advantages.std())
        ])  # fmt: skip
    total = sum(len(s.completion_ids) for group in groups for s in group)
    weighed = [[TrainingSample(s.prompt_ids, s.completion_ids, 1 / total, s.advantage, s.rollout_logprobs)
                for s in group] for group in groups]  # fmt: skip
    batches = pack(weighed, row)
    assert [len(b.input_ids) for b in batches] == [row] * rows
    return batches


def model_flops(config: DeepseekV3Config, batches: Sequence[PackedBatch]) -> float:
    """Of a step, forward and twice that backward: products with activated weights, causal attention over what a token
    sees, the head on the rows of the loss. Nothing that is computed again."""
    counted = tally(config)
    body = counted.main_activated.parameters - 2 * counted.embedding.parameters
    per_pair = 2 * config.num_attention_heads * (config.qk_head_dim + config.v_head_dim)
    total = 0.0
    for b in batches:
        pairs = int((b.position_ids + 1).sum())  # tokens that each token sees, itself included
        total += 2 * body * len(b.input_ids) + per_pair * pairs * config.num_hidden_layers
        total += 2 * config.vocab_size * config.hidden_size * len(b.target)
    return 3 * total


def build(config: DeepseekV3Config, side: str, tiny: bool, checkpointing: bool) -> Learner:
    device = torch.device("cpu") if tiny else torch.device("cuda", torch.cuda.current_device())
    with torch.device("meta"):
        model = DeepseekV3ForCausalLM(config)
    model = model.to(torch.bfloat16).to_empty(device=device)
    torch.manual_seed(0)
    model.init_weights()
    to_fp8(model, "off" if side == "bf16" else "emulate" if tiny else "on")
    options = GRPOConfig(learning_rate=1e-5, adam_moment_dtype="bfloat16", adam_beta2=0.95, max_steps=1000)
    return Learner("", options, model=model, device=device, checkpointing=checkpointing)


def measure(
    side: str, config: DeepseekV3Config, batches: list[PackedBatch], args: argparse.Namespace
) -> dict[str, Any]:
    cuda = not args.tiny
    gc.collect()  # the other side's learner
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    learner = build(config, side, args.tiny, args.checkpointing)
    print(f"{side}: built in {time.perf_counter() - start:.1f} s", flush=True)
    seconds, metrics = [], []
    for step in range(args.warmup + args.steps):
        if cuda:
            torch.cuda.synchronize()
        start = time.perf_counter()
        stats = learner.step([batches])
        if cuda:
            torch.cuda.synchronize()
        took = time.perf_counter() - start
        kept = {k: stats.metrics[k] for k in ("loss", "grad_norm", "entropy", "sampling/sampling_logp_difference/mean")}
        print(f"{side}: step {step} {took:.3f} s {kept}", flush=True)
        metrics.append(kept)
        if step >= args.warmup:
            seconds.append(took)
    result: dict[str, Any] = {"seconds": quartiles(seconds), "all_seconds": seconds, "metrics": metrics}
    result["mfu"] = model_flops(config, batches) / result["seconds"]["median"] / PEAK
    if cuda:
        result["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
        result["reserved_gib"] = torch.cuda.max_memory_reserved() / 2**30
        result["alloc_retries"] = torch.cuda.memory_stats()["num_alloc_retries"]
    shown = {key: result.get(key) for key in ("mfu", "peak_gib", "reserved_gib", "alloc_retries")}
    print(f"{side}: {result['seconds']} {shown}", flush=True)
    if args.profile:
        result["profile"] = profiled(learner, [batches])
        show(side, result["profile"])
        if cuda:
            result["device"] = occupied(learner, [batches])
            print(f"{side}: {result['device']}", flush=True)
    with torch.no_grad():
        result["nll"] = float(-torch.cat([learner.logprobs(b) for b in batches]).mean())
    print(f"{side}: nll {result['nll']:.4f}", flush=True)
    return result


def show(side: str, found: dict[str, Any]) -> None:
    total = sum(sum(kinds.values()) for kinds in found["parts"].values())
    print(f"{side}: {total:.1f} ms in {found['launches']} kernels")
    for part, kinds in found["parts"].items():
        print(f"  {part:28s} {sum(kinds.values()):9.2f} ms {sum(kinds.values()) / total:6.1%}", end="   ")
        print(*(f"{kind} {ms:.2f}" for kind, ms in kinds.items() if ms), sep=", ", flush=True)


def bounds(found: dict[str, Any]) -> dict[str, float]:
    """Amdahl: a BF16 step over one in which the products that FP8 computes take half their time, or none."""
    total = sum(sum(kinds.values()) for kinds in found["parts"].values())
    products = sum(found["parts"][part]["product"] for part in IN_FP8 if part in found["parts"])
    return {
        "products_share": products / total,
        "at_twice_the_speed": total / (total - products / 2),
        "at_no_cost": total / (total - products),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=0, help="0: as many as fit")
    parser.add_argument("--row", type=int, default=8192, help="packed tokens of a micro-batch")
    parser.add_argument("--rows", type=int, default=8, help="micro-batches of a step")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=1, help="how often both sides are measured, in turn")
    parser.add_argument("--sides", default="bf16,fp8")
    parser.add_argument("--checkpointing", action="store_true", help="recompute each layer in the backward pass")
    parser.add_argument("--profile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    before = machine()
    if not args.tiny and before["gpu"] is None:
        raise SystemExit("error: there is no GPU here; --tiny runs on a CPU")
    if args.tiny:
        args.row, args.rows, args.layers = min(args.row, 64), min(args.rows, 2), args.layers or 2
    if not args.layers:
        room = torch.cuda.mem_get_info()[0]
        args.layers = layers_that_fit(room, args.row)
        count = tally(configuration(args.layers, False)).main.parameters
        print(
            f"{args.layers} of 27 layers: {STATE_BYTES} bytes x {count:,} parameters "
            f"+ {args.row} tokens x {args.layers} x {LAYER_BYTES:,} bytes + {RESERVE / 2**30:g} GiB = "
            f"{_bytes(args.layers, args.row) / 2**30:.1f} of {room / 2**30:.1f} GiB",
            flush=True,
        )
    config = configuration(args.layers, args.tiny)
    batches = rows_of(config, args.rows, args.row, 0)
    runs: dict[str, list[dict[str, Any]]] = {side: [] for side in args.sides.split(",")}
    for _ in range(args.rounds):
        for side, found in runs.items():
            found.append(measure(side, config, batches, args))
    results: dict[str, Any] = {
        "layers": args.layers, "row": args.row, "rows": args.rows, "tokens": args.row * args.rows,
        "parameters": tally(config).main.parameters, "flops": model_flops(config, batches), "runs": runs,
    }  # fmt: skip
    print(json.dumps({k: v for k, v in results.items() if k != "runs"}))
    if all("profile" in found[0] for found in runs.values()) and "bf16" in runs:
        results["amdahl"] = bounds(runs["bf16"][0]["profile"])
        print("Amdahl bound:", results["amdahl"])
    if {"bf16", "fp8"} <= runs.keys():
        median = {
            side: float(np.median([s for run in found for s in run["all_seconds"]])) for side, found in runs.items()
        }
        results["fp8_over_bf16"] = median["bf16"] / median["fp8"]
        print(f"FP8 is {results['fp8_over_bf16']:.3f} times as fast as BF16", flush=True)
    claim = "A GRPO learner step of a Moonlight-shaped model is faster in FP8 than in BF16, in less memory."
    if not args.tiny:
        write_result("fp8_step" if args.row == 8192 else f"fp8_step_{args.row}", claim, before, results)


if __name__ == "__main__":
    main()
