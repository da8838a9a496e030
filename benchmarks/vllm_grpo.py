"""Claim: learner and vLLM engine share one GPU: GRPO steps on a Moonlight-shaped model (16B, an adapter on all its
matrices), with routes replayed, all weights pushed and proved after each step, and the engine asleep while it learns.

    python -m benchmarks.vllm_grpo [--layers 27] [--steps 3] [--engines bfloat16,fp8,fp8_learner] [--out DIR]
    python -m benchmarks.vllm_grpo --tiny            # the same on a CPU with a tiny model, without sleep

Random weights, drawn where the learner computes; the engine gets its own by the first push. Each engine runs in a
process of its own, which writes what it has measured after every stage to DIR. fp8: an engine in FP8, which gets codes
and scales that the BF16 learner casts once; fp8_learner: the same with a learner in FP8 (model.fp8 on), whose bytes
those are, and which trains all weights of a model of 4 layers at most.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import yaml

from benchmarks.common import ROOT, machine, versions, write_result
from benchmarks.vllm_sync import MOONLIGHT
from grpo.alarms import Alarms
from grpo.cluster import Cluster
from grpo.config import Config, load_config
from grpo.data import PromptCursor
from grpo.log import RunLog, load_metrics
from grpo.loop import Run, run_loop
from grpo.partial import Rollouts
from grpo.placement import used_gib
from grpo.prepare import prepare
from grpo.progress import Progress
from grpo.records import PackedBatch, StepStats
from model import DeepseekV3Config, DeepseekV3ForCausalLM
from model.create import build_tokenizer
from rollout import WeightFault

TINY = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 256,
}
KEPT = (
    "step_time", "time/rollout", "time/learner", "time/sync", "time/weight_check", "sync/bytes",
    "sync/fp8_bytes", "num_tokens",
    "sampling/sampling_logp_difference/mean", "sampling/sampling_logp_difference/max", "sampling/routes_differ",
    "memory/rollout_gib", "memory/released_gib", "memory/learner_gib", "reward", "grad_norm", "loss",
)  # fmt: skip


def write_model(folder: Path, layers: int, tiny: bool) -> None:
    """config.json and a tokenizer; no weights."""
    tokenizer = build_tokenizer(yaml.safe_load((ROOT / "configs" / "tiny_v3.yaml").read_text())["tokenizer"])
    tokenizer.save_pretrained(folder)
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    content = MOONLIGHT | {"num_hidden_layers": layers} | ids | (TINY if tiny else {})
    (folder / "config.json").write_text(json.dumps(content | ({"torch_dtype": "float32"} if tiny else {})))
    sums = [(a, b) for a in range(40) for b in range(9)]
    rows = [{"prompt": f"what is {a} * {b} + {a + b}?" * 4, "answer": str(a * b + a + b)} for a, b in sums]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def drawn(directory: str | Path, dtype: torch.dtype, device: torch.device) -> DeepseekV3ForCausalLM:
    """In place of load_model: the model of a directory that has no weights, with random ones."""
    with torch.device("meta"):
        model = DeepseekV3ForCausalLM(DeepseekV3Config.from_pretrained(directory))
    model = model.to(dtype).to_empty(device=device)
    torch.manual_seed(1)
    model.init_weights()
    return model


def configuration(folder: Path, engine: str, steps: int, length: int, tiny: bool) -> Config:
    options: dict[str, Any] = {"load_format": "dummy", "enforce_eager": True, "max_model_len": 256 if tiny else 1024}
    options |= {"kv_cache_gb": 0.05} if tiny else {"kv_cache_gb": 8.0, "gpu_memory_utilization": 0.5}
    if not tiny:
        options["hf_overrides"] = {"moe_router_dtype": "float32"}  # as the learner's; no fewer routes differ by it
    if engine.startswith("fp8"):
        options["quantization"] = "fp8_per_block"
    lora = {"r": 8, "lora_alpha": 16}
    trained = {"fp8": "on"} if engine == "fp8_learner" else {"gradient_checkpointing": True, "lora": lora}
    content = {
        "run": {"cluster": "inline", "output_dir": str(folder / engine), "threads": 1, "alarms": {}},
        "model": {
            "path": str(folder),
            "dtype": "float32" if tiny else "bfloat16",
            **trained,
        },
        "data": {"path": str(folder / "prompts.jsonl"), "holdout": 0.0},
        "rollout": {
            "engine": "vllm",
            "engine_options": options,
            "max_completion_length": 16 if tiny else length,
            "replay_routing": True,
            "lora": "merged",
            "sleep_level": 0 if tiny else 2,
        },
        "rewards": {"even": {"function": f"{ROOT}/benchmarks/even_tokens.py:even_tokens", "style": "trl"}},
        "grpo": {
            "max_steps": steps,
            "prompts_per_step": 4 if tiny else 32,
            "num_generations": 4 if tiny else 8,
            "learning_rate": 1e-3 if "lora" in trained else 1e-6,
            "adam_moment_dtype": "float32" if "lora" in trained else "bfloat16",
            "max_tokens_per_microbatch": 512 if tiny else 16384,
        },
    }
    return load_config(content)


class Measured(Cluster):
    """Notes what the loop does not: routes as they came, and the learner's log-probabilities without replaying them."""

    gaps: list[dict[str, Any]]

    def sample(self, prompts: Sequence[Sequence[int]], params: Sequence[Any]) -> Any:
        groups = super().sample(prompts, params)
        routes = groups[0][0].routed_experts
        assert routes is not None, "the engine returned no routes"
        self.gaps.append({"routes": f"{routes.dtype} {list(routes.shape)}"})
        return groups

    def learn(self, minibatches: Sequence[Sequence[PackedBatch]], rollout_counts: Any = None) -> StepStats:
        learner = self.backend.roles["learner"]  # type: ignore[attr-defined]
        start = time.perf_counter()
        for replay in (True, False):
            gaps = [gap(learner, batch, replay) for batches in minibatches for batch in batches]
            gaps_of = np.concatenate(gaps)
            name = "with_replay" if replay else "without_replay"
            self.gaps[-1][name] = {"mean": float(gaps_of.mean()), "max": float(gaps_of.max()), "tokens": len(gaps_of)}
        self.gaps[-1]["seconds"] = time.perf_counter() - start
        return super().learn(minibatches, rollout_counts)


def gap(learner: Any, batch: PackedBatch, replay: bool) -> np.ndarray:
    """[R] |learner's log-probability - engine's|."""
    given = batch if replay else dataclasses.replace(batch, routed_experts=None)
    return (learner.logprobs(given).cpu() - batch.rollout_logprobs).abs().numpy()


def canary_gaps(learner: Any, engine: Any) -> dict[str, Any]:
    """Of each canary prompt: mean and largest difference of log-probabilities, as the routers choose and with the
    engine's choice of experts."""
    canary = learner.canary()
    got, routes = engine.read_prompts(canary.prompts)
    found = {}
    for name, want in (("without_replay", canary), ("with_replay", learner.canary(routes) if routes else canary)):
        gaps = [np.abs(np.subtract(a, b)) for a, b in zip(got, want.logprobs, strict=True)]
        found[name] = {"mean": [float(g.mean()) for g in gaps], "max": [float(g.max()) for g in gaps]}
    return found


def run_engine(folder: Path, engine: str, steps: int, length: int, tiny: bool, file: Path) -> None:
    config = configuration(folder, engine, steps, length, tiny)
    found: dict[str, Any] = {"engine": engine, "completion_tokens": length}

    def note(**values: Any) -> None:
        found.update(values)
        file.write_text(json.dumps(found, indent=1))
        print(engine, json.dumps(values), flush=True)

    def timed_push(cluster: Cluster, version: int) -> dict[str, float]:
        start = time.perf_counter()
        pushed = cluster.sync_weights(version)
        seconds = time.perf_counter() - start
        return {"seconds": seconds, **pushed, "gigabytes_per_second": pushed["sync/bytes"] / seconds / 1e9}

    prepared, start = prepare(config), time.perf_counter()
    with mock.patch("grpo.learner.load_model", drawn):
        cluster = Measured(config, folder, folder)
    with cluster:
        cluster.gaps = []
        roles = cluster.backend.roles  # type: ignore[attr-defined]
        model = roles["learner"].policy.model
        note(
            start_seconds=time.perf_counter() - start,
            frozen_parameters=sum(p.numel() for p in model.parameters() if not p.requires_grad),
            trained_parameters=sum(p.numel() for p in model.parameters() if p.requires_grad),
            matrices_in_fp8=len(roles["rollout-0"].fp8_names()),
            memory_after_start_gib=used_gib(),
            learner_device=str(roles["learner"].policy.device),
        )
        try:
            note(first_push=timed_push(cluster, 0), canaries="within their cap")
        except WeightFault as fault:  # noted, and the rest is measured without them
            note(canaries=str(fault))
            roles["learner"].canaries, cluster.synced = False, None
            note(first_push=timed_push(cluster, 0))
        cluster.synced = None  # everything again
        note(second_push=timed_push(cluster, 0))
        note(canary_gaps=canary_gaps(roles["learner"], roles["rollout-0"].engine))
        cursor = PromptCursor(prepared.prompts, config.run.seed)
        run_dir = Path(config.run.output_dir)
        with RunLog(run_dir) as log, Progress(steps) as progress:
            for step in range(1, steps + 1):
                part = config.model_copy(update={"grpo": config.grpo.model_copy(update={"max_steps": step})})
                run = Run(
                    part,
                    cluster,
                    Rollouts(part, cluster, cursor),
                    [],
                    prepared.tokenizer,
                    log,
                    progress,
                    Alarms({}),
                    lambda _: None,
                )
                run_loop(run, first_step=step)
                rows = [{key: row.get(key) for key in KEPT} for row in load_metrics(run_dir)]
                note(steps=rows, gaps=cluster.gaps, memory_after_step_gib=used_gib())
    note(summary=summary(rows, cluster.gaps))


def summary(rows: Sequence[dict[str, Any]], gaps: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Means over the steps but the first, which warms up."""
    rows, gaps = list(rows[1:]) or list(rows), list(gaps[1:]) or list(gaps)

    def mean(key: str) -> float | None:
        values = [row[key] for row in rows if row.get(key) is not None]
        return float(np.mean(values)) if values else None

    own = [row["step_time"] - g["seconds"] for row, g in zip(rows, gaps)]  # without what only this benchmark does
    return {
        "step_seconds": float(np.mean(own)),
        "proof_share_of_step": float(np.mean([row["time/weight_check"] / s for row, s in zip(rows, own)])),
        "learner_seconds": float(np.mean([row["time/learner"] - g["seconds"] for row, g in zip(rows, gaps)])),
        "rollout_seconds": mean("time/rollout"),
        "sync_seconds": mean("time/sync"),
        "proof_seconds": mean("time/weight_check"),
        "sync_bytes": mean("sync/bytes"),
        "sync_fp8_bytes": mean("sync/fp8_bytes"),
        "gigabytes_per_second": float(np.mean([row["sync/bytes"] / row["time/sync"] / 1e9 for row in rows])),
        "rollout_tokens_per_second": float(np.mean([row["num_tokens"] / row["time/rollout"] for row in rows])),
        "routes_differ": mean("sampling/routes_differ"),
        "logp_gap_with_replay": {k: float(np.mean([g["with_replay"][k] for g in gaps])) for k in ("mean", "max")},
        "logp_gap_without_replay": {k: float(np.mean([g["without_replay"][k] for g in gaps])) for k in ("mean", "max")},
        "memory_before_sleep_gib": mean("memory/rollout_gib"),
        "memory_released_by_sleep_gib": mean("memory/released_gib"),
        "memory_of_learner_step_gib": mean("memory/learner_gib"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=27)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--length", type=int, default=256, help="tokens of a completion")
    parser.add_argument("--engines", default="bfloat16,fp8,fp8_learner")
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds an engine's process may take")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--out", default="")
    parser.add_argument("--one", default="", help="an engine, in this process: what the others call")
    args = parser.parse_args()
    if args.one:
        out = Path(args.out)
        folder = out / f"{args.one}_model"
        folder.mkdir(exist_ok=True)
        write_model(folder, min(args.layers, 4) if args.one == "fp8_learner" else args.layers, args.tiny)
        run_engine(folder, args.one, args.steps, args.length, args.tiny, out / f"{args.one}.json")
        return
    before, engines = machine(), ["bfloat16"] if args.tiny else args.engines.split(",")
    with tempfile.TemporaryDirectory() as made:
        out = Path(args.out or made)
        out.mkdir(parents=True, exist_ok=True)
        results: dict[str, Any] = {"layers": args.layers, "versions": versions("vllm", "torch", "triton", "peft")}
        for engine in engines:
            command = [sys.executable, "-m", "benchmarks.vllm_grpo", "--one", engine, "--out", str(out)]
            command += ["--layers", str(args.layers)]
            command += ["--steps", str(args.steps), "--length", str(args.length), *(["--tiny"] if args.tiny else [])]
            try:
                done = subprocess.run(command, cwd=ROOT, timeout=args.timeout).returncode
            except subprocess.TimeoutExpired:
                done = -1
            file = out / f"{engine}.json"
            results[engine] = json.loads(file.read_text()) if file.exists() else {}
            results[engine]["exit_code"] = done
            if args.tiny:
                print(json.dumps(results, indent=1))
            else:
                print(write_result("vllm_grpo", __doc__ or "", before, results))


if __name__ == "__main__":
    main()
