"""A run with vLLM in Ray actors: the metrics of an embedded run, checked pushes, and an engine that is killed."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from grpo import GRPOTrainer
from grpo.cluster import Cluster, RunFailure
from rollout.vllm_engine import VllmEngine

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.ray,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="`make test-vllm` has vLLM"),
]
ROOT = Path(__file__).parents[2]


def settings(tmp: Path, engine: str, **run: Any) -> dict[str, Any]:
    """Three steps from random weights on sums."""
    data = tmp / "sums.jsonl"
    rows = [{"prompt": f"{a}+{b}=", "answer": str(a + b)} for a in range(10) for b in range(10)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {"engine": engine}
    if engine == "vllm":
        options |= {"engine_options": {"max_model_len": 64, "kv_cache_gb": 0.05}}  # type: ignore[dict-item]
    return {
        "run": {"cluster": "ray", "output_dir": str(tmp / engine), "save_steps": 0, "eval_steps": 0, **run},
        "model": {"init": str(ROOT / "configs" / "tiny_v3.yaml")},
        "data": {"path": str(data), "eval_size": 8},
        "rollout": {"max_completion_length": 6, "num_workers": 1, **options},
        "rewards": {"exact_match": 1.0, "length": {"weight": 0.5, "max": 6}},
        "grpo": {"max_steps": 3, "prompts_per_step": 4, "num_generations": 4, "learning_rate": 1e-3},
    }


def rows(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_a_killed_engine_comes_back_with_the_current_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It dies with a batch under way; the step ends, on policy to 1e-4, and metrics have the embedded run's names."""
    sample, killed = Cluster.sample, []

    def kill_first(self: Cluster, prompts: Any, params: Any) -> Any:
        if not killed and len(prompts) == 4:  # the first training batch
            remote = self.backend
            pid = remote.ray.get(remote.hosts["rollout-0"].pid.remote())  # type: ignore[attr-defined]
            killed.append(pid)
            remote.call("rollout-0", "advance", 0, dict(enumerate(zip(prompts, params))), True)
            os.kill(pid, signal.SIGKILL)
        return sample(self, prompts, params)

    monkeypatch.setattr(Cluster, "sample", kill_first)
    GRPOTrainer(settings(tmp_path, "vllm")).train()
    monkeypatch.undo()
    GRPOTrainer(settings(tmp_path, "embedded", cluster="inline")).train()
    theirs, ours = rows(tmp_path / "vllm"), rows(tmp_path / "embedded")
    assert killed and [row["policy_version"] for row in theirs] == [0, 1, 2, 3]
    assert set(theirs[-1]) == set(ours[-1])
    assert max(row["sampling/sampling_logp_difference/max"] for row in theirs[1:]) < 1e-4
    assert all(0 < row["time/weight_check"] < row["time/sync"] for row in theirs[1:])


def test_a_wrong_engine_stops_the_run_before_a_sample(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rpc = VllmEngine.rpc

    def stale(self: VllmEngine, method: str, *args: Any) -> Any:
        """The engine takes over nothing of the first push after a step."""
        if method == "load" and self.policy_version == 0 and self.loads:
            return 0
        self.loads += method == "load"
        return rpc(self, method, *args)

    monkeypatch.setattr(VllmEngine, "loads", 0, raising=False)
    monkeypatch.setattr(VllmEngine, "rpc", stale)
    with pytest.raises(RunFailure, match=r"weights of version 1 in vLLM: model\.embed_tokens\.weight.*--resume"):
        GRPOTrainer(settings(tmp_path, "vllm", cluster="inline")).train()
    assert [row["step"] for row in rows(tmp_path / "vllm")] == [0]
