"""What every benchmark shares: timing statistics, the peers' processes, and results that say where they come from.

Both sides of a comparison import this, so it needs nothing but the standard library, numpy and torch.
"""

from __future__ import annotations

import itertools
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
CACHE = ROOT / "runs" / ".cache"  # models and prompts that both sides read
PEERS_PYTHON = ROOT / ".venv-peers" / "bin" / "python"
IDLE_LOAD = 0.5

# What a peer may choose the best of. batched_mm experts, a static cache and gradient checkpointing always lose.
DECODE_GRID = {"threads": (1, 2), "experts": ("grouped_mm", "eager")}
STEP_GRID = DECODE_GRID | {"microbatch": (128, 32)}
# Case -> (kind of benchmarks/make_model.py, settings of the peer). Our side takes the same kind, prompts and counts.
STEP_CASES = {
    "smoke": ("smoke", {"max_completion_length": 12, "steps": 20, "warmup": 4}),
    "uneven": ("uneven", {"max_completion_length": 128, "steps": 10, "warmup": 2}),
}
DECODE_CASES = {
    "fixed": ("uneven", {"max_tokens": 64, "ignore_eos": True, "repeats": 12}),
    "uneven": ("uneven", {"max_tokens": 128, "ignore_eos": False, "repeats": 12}),
}


def quartiles(values: Sequence[float]) -> dict[str, float]:
    """Median, first and third quartile, and how many values there are."""
    assert len(values) > 0, "nothing was measured"
    low, middle, high = np.percentile(np.asarray(values, dtype=np.float64), [25, 50, 75])
    return {"median": float(middle), "q1": float(low), "q3": float(high), "n": len(values)}


def timed(action: Callable[[], Any], repeats: int, warmup: int = 1) -> list[float]:
    """Seconds of each of `repeats` calls, after `warmup` calls that do not count."""
    for _ in range(warmup):
        action()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        action()
        seconds.append(time.perf_counter() - start)
    return seconds


def alternate(sides: Mapping[str, Callable[[], dict[str, Any]]], rounds: int = 3) -> dict[str, list[dict[str, Any]]]:
    """Calls the sides in turn, `rounds` times, so that a slow minute of the machine meets all of them."""
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, measure in sides.items():
            results[name].append(measure())
    return results


Measure = Callable[[str, str | Path, str | Path, Mapping[str, Any]], dict[str, Any]]  # run_ours or run_peer


def run_peer(peer: str, model: str | Path, prompts: str | Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Runs benchmarks/peers/PEER.py in .venv-peers and returns the JSON object that it prints last.

    `settings` are the fields of the peer's Settings; `threads` is also set in the environment, before torch starts.
    """
    if not PEERS_PYTHON.exists():
        raise SystemExit("error: .venv-peers is missing; run `make bench-peers`")
    return _run(PEERS_PYTHON, f"benchmarks.peers.{peer}", model, prompts, settings)


def run_ours(side: str, model: str | Path, prompts: str | Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The same for benchmarks/ours/SIDE.py, with this interpreter."""
    return _run(sys.executable, f"benchmarks.ours.{side}", model, prompts, settings)


def _run(
    python: str | Path, module: str, model: str | Path, prompts: str | Path, settings: Mapping[str, Any]
) -> dict[str, Any]:
    threads = str(settings.get("threads", 1))
    done = subprocess.run(
        [python, "-m", module, model, prompts, json.dumps(dict(settings))],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )
    if done.returncode:
        raise RuntimeError(f"{module} with {dict(settings)} ended with {done.returncode}:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def sweep(
    measure: Measure,
    name: str,
    model: str | Path,
    prompts: str | Path,
    settings: Mapping[str, Any],
    grid: Mapping[str, Sequence[Any]],
) -> list[dict[str, Any]]:
    """`measure` (run_ours or run_peer) at each point of the grid, best median tokens a second first."""
    points = [dict(zip(grid, values)) for values in itertools.product(*grid.values())]
    runs = [measure(name, model, prompts, {**settings, **point}) for point in points]
    return sorted(runs, key=speed, reverse=True)


def speed(run: Mapping[str, Any]) -> float:
    """Median tokens a second of a run."""
    return run["tokens_per_second"]["median"]


def middle(runs: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Of several rounds of one side: the median of their median tokens a second and of their median seconds."""
    return {
        "tokens_per_second": quartiles([speed(run) for run in runs])["median"],
        "seconds": quartiles([run["seconds"]["median"] for run in runs])["median"],
        "mean_length": quartiles([run["mean_length"] for run in runs])["median"],
    }


def points(runs: Sequence[Mapping[str, Any]], grid: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A sweep in short: where, and how fast."""
    return [{**{key: run["settings"][key] for key in grid}, "tokens_per_second": speed(run)} for run in runs]


def versions(*packages: str) -> dict[str, str]:
    """Python's version and those of the packages that are installed here."""
    found = {"python": platform.python_version()}
    for name in packages:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def commit() -> str:
    """Commit of the working tree, with `-dirty` where tracked files differ from it."""
    command = ["git", "describe", "--always", "--abbrev=12", "--dirty", "--exclude=*"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip() or "unknown"


def machine() -> dict[str, Any]:
    """CPU, cores, memory, and the load before the benchmark: `idle` says whether a figure can be trusted."""
    cpu, memory = platform.processor() or platform.machine(), 0
    if sys.platform == "linux":
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), cpu)
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    load = os.getloadavg()[0]
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "memory_gib": round(memory / 2**30, 1),
        "system": f"{platform.system()} {platform.machine()}",
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "load_before": round(load, 2),
        "idle": load < IDLE_LOAD,
    }


def write_result(name: str, claim: str, before: Mapping[str, Any], results: Mapping[str, Any]) -> Path:
    """Writes benchmarks/results/NAME.json. `before` is `machine()` as it was before the first measurement."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    content = {
        "name": name,
        "claim": claim,
        "commit": commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": dict(before),
        "versions": versions("torch", "transformers", "numpy"),
        "results": dict(results),
    }
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(content, indent=1) + "\n")
    return path
