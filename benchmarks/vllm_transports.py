"""Claim: weights go from a learner to vLLM engines in processes of their own, by every transport, proved on arrival.

    python -m benchmarks.vllm_transports [--layers 4] [--engines 1] [--transports broadcast,ipc,object_store,disk]
    python -m benchmarks.vllm_transports --tiny      # the same on a CPU with a tiny model (gloo, shared memory)

A real run on Ray for each transport: GRPO steps of all weights of a Moonlight-shaped model with random weights, every
tensor pushed and proved after each step. Learner and engines have a GPU each; with ipc they share one. Needs Ray and
vLLM, and two GPUs of 80 GB for broadcast.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import ROOT, machine, quartiles, versions, write_result
from benchmarks.vllm_grpo import drawn, write_model
from grpo.log import load_metrics

KINDS = ("broadcast", "ipc", "object_store", "disk")


def configuration(folder: Path, transport: str, engines: int, steps: int, tiny: bool) -> dict[str, Any]:
    shared = transport == "ipc" and not tiny
    options: dict[str, Any] = {"enforce_eager": True, "max_model_len": 256 if tiny else 1024}
    options |= {"kv_cache_gb": 0.05} if tiny else {"kv_cache_gb": 4.0, "gpu_memory_utilization": 0.3}
    return {
        "run": {
            "cluster": "ray",
            "output_dir": str(folder / transport),
            "save_steps": 0,
            "eval_steps": 0,
            "alarms": {},
            **({"learner_gpus": 0.5} if shared else {}),
        },
        "model": {
            "path": str(folder),
            "dtype": "float32" if tiny else "bfloat16",
            "device": "cpu" if tiny else "cuda",
            "gradient_checkpointing": True,
        },
        "data": {"path": str(folder / "prompts.jsonl"), "holdout": 0.0},
        "rollout": {
            "engine": "vllm",
            "engine_options": options,
            "num_workers": 1 if shared else engines,
            "max_completion_length": 16 if tiny else 64,
            "replay_routing": True,
            "weight_transport": transport,
            "delta_sync": False,  # every tensor, at each push
            **({"gpus_per_worker": 0.5} if shared else {}),
        },
        "rewards": {"even": {"function": f"{ROOT}/benchmarks/even_tokens.py:even_tokens", "style": "trl"}},
        "grpo": {"max_steps": steps, "prompts_per_step": 4, "num_generations": 4, "learning_rate": 1e-5},
    }


def run_transport(file: Path, timeout: float) -> dict[str, Any]:
    """Trains by the configuration of a file, in a process of its own -> what its steps say of the sync."""
    config = json.loads(file.read_text())
    start = time.perf_counter()
    command = [sys.executable, "-m", "grpo.cli", "train", str(file)]
    with (file.parent / f"{file.stem}.log").open("w") as log:
        try:
            code = subprocess.run(command, cwd=ROOT, timeout=timeout, stdout=log, stderr=subprocess.STDOUT).returncode
        except subprocess.TimeoutExpired:
            code = -1
    found: dict[str, Any] = {"exit_code": code, "seconds": time.perf_counter() - start}
    if code:
        return found | {"output": (file.parent / f"{file.stem}.log").read_text()[-3000:]}
    rows = [row for row in load_metrics(config["run"]["output_dir"]) if row["step"] > 0]
    sync, proof = ([row[key] for row in rows] for key in ("time/sync", "time/weight_check"))
    return (
        found
        | {
            "engines": config["rollout"]["num_workers"],
            "bytes": rows[-1]["sync/bytes"],
            "sync_seconds": quartiles(sync[1:]),  # the first meets cold caches and, by NCCL, builds the group
            "first_sync_seconds": sync[0],
            "proof_seconds": quartiles(proof[1:]),
            "gigabytes_per_second": rows[-1]["sync/bytes"] / quartiles(sync[1:])["median"] / 1e9,
            "sampling_logp_difference": [row["sampling/sampling_logp_difference/mean"] for row in rows],
            "policy_versions": [row["policy_version"] for row in rows],
        }
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--engines", type=int, default=1)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--transports", default=",".join(KINDS))
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds that one run may take")
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    chosen = args.transports.split(",")
    if unknown := set(chosen) - set(KINDS):
        parser.error(f"--transports {sorted(unknown)} are unknown; choose from {', '.join(KINDS)}")
    before, results = machine(), {"layers": args.layers, "versions": versions("vllm", "torch", "ray")}
    results["gpus"] = torch.cuda.device_count()
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        write_model(folder, args.layers, args.tiny)
        dtype, device = (torch.float32, "cpu") if args.tiny else (torch.bfloat16, "cuda")
        drawn(folder, dtype, torch.device(device)).save_pretrained(folder)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        for transport in chosen:
            file = folder / f"{transport}.yaml"
            file.write_text(json.dumps(configuration(folder, transport, args.engines, args.steps, args.tiny)))
            results[transport] = run_transport(file, args.timeout)
            print(transport, json.dumps(results[transport], indent=1), flush=True)
            if not args.tiny:
                write_result("vllm_transports", __doc__ or "", before, results)


if __name__ == "__main__":
    main()
