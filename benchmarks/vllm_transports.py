"""Claim: weights go from a learner to vLLM engines in processes of their own, by every transport, proved on arrival.

    python -m benchmarks.vllm_transports [--layers 4] [--engines 1] [--transports broadcast,ipc,object_store,disk]
    python -m benchmarks.vllm_transports --tiny      # the same on a CPU with a tiny model (gloo, shared memory)

GRPO steps on Ray for each transport, a process of its own: all weights of a Moonlight-shaped model with random weights,
every tensor pushed and proved after each step. Learner and engines have a GPU each; with ipc they share one. Needs Ray
and vLLM, and two GPUs of 80 GB for broadcast.
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
from grpo.alarms import Alarms
from grpo.cluster import Cluster, check_gpus
from grpo.config import load_config
from grpo.data import PromptCursor
from grpo.log import RunLog, load_metrics
from grpo.loop import Run, run_loop
from grpo.partial import Rollouts
from grpo.prepare import prepare
from grpo.progress import Progress

KINDS = ("broadcast", "ipc", "object_store", "disk")


def configuration(folder: Path, transport: str, engines: int, steps: int, tiny: bool) -> dict[str, Any]:
    shared = transport == "ipc" and not tiny
    options: dict[str, Any] = {"enforce_eager": True, "max_model_len": 256 if tiny else 1024}
    options |= {"kv_cache_gb": 0.05} if tiny else {"kv_cache_gb": 4.0, "gpu_memory_utilization": 0.2}
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


def run_transport(folder: Path, transport: str, engines: int, steps: int, tiny: bool, file: Path) -> None:
    """GRPO steps, and what they say of the sync, to `file`. Without the checkpoint that a run ends with."""
    config = load_config(configuration(folder, transport, engines, steps, tiny))
    check_gpus(config)
    prepared, run_dir = prepare(config), Path(config.run.output_dir)
    start = time.perf_counter()
    with Cluster(config, folder, folder) as cluster:
        started = time.perf_counter() - start
        cluster.sync_weights(0)
        cursor = PromptCursor(prepared.prompts, config.run.seed)
        with RunLog(run_dir) as log, Progress(steps) as progress:
            rollouts = Rollouts(config, cluster, cursor)
            run = Run(config, cluster, rollouts, [], prepared.tokenizer, log, progress, Alarms({}), lambda _: None)
            run_loop(run, first_step=1)
    rows = load_metrics(run_dir)
    sync, proof = ([row[key] for row in rows] for key in ("time/sync", "time/weight_check"))
    size = rows[-1]["sync/bytes"]
    found = {
        "engines": config.rollout.num_workers,
        "start_seconds": started,
        "bytes": size,
        "sync_seconds": quartiles(sync[1:]),
        "first_sync_seconds": sync[0],
        "proof_seconds": quartiles(proof[1:]),
        "gigabytes_per_second": size / quartiles(sync[1:])["median"] / 1e9,
        "sampling_logp_difference": [row["sampling/sampling_logp_difference/mean"] for row in rows],
        "policy_versions": [row["policy_version"] for row in rows],
    }
    file.write_text(json.dumps(found))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--engines", type=int, default=1)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--transports", default=",".join(KINDS))
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds that one run may take")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--one", default="", help="a transport, in this process: what the others call")
    parser.add_argument("--folder", default="", help="of --one: the model's")
    args = parser.parse_args()
    if args.one:
        folder = Path(args.folder)
        run_transport(folder, args.one, args.engines, args.steps, args.tiny, folder / f"{args.one}.json")
        return
    chosen = args.transports.split(",")
    if unknown := set(chosen) - set(KINDS):
        parser.error(f"--transports {sorted(unknown)} are unknown; choose from {', '.join(KINDS)}")
    if not args.tiny and not torch.cuda.is_available():
        parser.error("there is no GPU here; --tiny runs on a CPU")
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
            file = folder / f"{transport}.json"
            command = [sys.executable, "-m", "benchmarks.vllm_transports", "--one", transport, "--folder", made]
            command += ["--steps", str(args.steps), "--engines", str(args.engines), *(["--tiny"] if args.tiny else [])]
            try:
                done = subprocess.run(command, cwd=ROOT, timeout=args.timeout).returncode
            except subprocess.TimeoutExpired:
                done = -1
            results[transport] = {"exit_code": done} | (json.loads(file.read_text()) if file.exists() else {})
            print(transport, json.dumps(results[transport], indent=1), flush=True)
            if not args.tiny:
                write_result("vllm_transports", __doc__ or "", before, results)


if __name__ == "__main__":
    main()
