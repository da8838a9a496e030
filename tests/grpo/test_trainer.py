"""Whole runs: the same numbers in one process and on Ray, after any kill and any resume."""

from __future__ import annotations

import json
import os
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from grpo import GRPOTrainer
from grpo.cluster import Cluster, Remote, RunFailure
from grpo.config import load_config

ROOT = Path(__file__).parents[2]


def settings(tmp: Path, name: str, cluster: str, **grpo: Any) -> dict[str, Any]:
    """Six steps from random weights on sums; rewards that differ within a group from the start."""
    data = tmp / "sums.jsonl"
    if not data.exists():
        rows = [{"prompt": f"{a}+{b}=", "answer": str(a + b)} for a in range(10) for b in range(10)]
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "run": {"cluster": cluster, "output_dir": str(tmp / name), "save_steps": 2, "eval_steps": 3},
        "model": {"init": str(ROOT / "configs" / "tiny_v3.yaml")},
        "data": {"path": str(data), "eval_size": 8},
        "rollout": {"max_completion_length": 6, "num_workers": 2},
        "rewards": {"exact_match": 1.0, "length": {"weight": 0.5, "max": 6}},
        "grpo": {"max_steps": 6, "prompts_per_step": 4, "num_generations": 4, "learning_rate": 1e-3, **grpo},
    }


def rows(run_dir: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    parsed = [json.loads(line) for line in (run_dir / name).read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith("time/") and k != "step_time"} for row in parsed]


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run in one process."""
    tmp = tmp_path_factory.mktemp("runs")
    GRPOTrainer(settings(tmp, "inline", "inline")).train()
    assert [row["step"] for row in rows(tmp / "inline")] == list(range(7))
    return tmp


def test_metrics_have_every_promised_name(reference: Path) -> None:
    row = rows(reference / "inline")[3]
    promised = [
        *("step", "reward", "reward_std", "rewards/exact_match/mean", "rewards/length/mean", "loss", "grad_norm"),
        *("learning_rate", "entropy", "completions/mean_length", "frac_reward_zero_std", "policy_version"),
        *("sampling/sampling_logp_difference/mean", "sampling/sampling_logp_difference/max", "eval/accuracy"),
    ]
    assert set(promised) <= set(row)
    assert row["sampling/sampling_logp_difference/max"] < 1e-4
    times = json.loads((reference / "inline" / "metrics.jsonl").read_text().splitlines()[3])
    assert {"time/rollout", "time/rewards", "time/learner", "time/sync", "step_time"} <= set(times)
    final = reference / "inline" / "checkpoints" / "step_6"
    assert {"config.json", "model.safetensors", "tokenizer.json", "train_state"} <= {p.name for p in final.iterdir()}
    assert [s["policy_version"] for s in rows(reference / "inline", "samples.jsonl")][:1] == [0]


def test_resume_goes_on_as_if_never_stopped(reference: Path) -> None:
    name = "stopped"
    trainer = GRPOTrainer(settings(reference, name, "inline"), ["--grpo.max_steps=6"])

    def stop(self: Cluster, version: int) -> dict[str, float]:
        if version == 5:
            raise RunFailure("stopped here")
        return sync(self, version)

    sync, Cluster.sync_weights = Cluster.sync_weights, stop  # type: ignore[method-assign]
    try:
        with pytest.raises(RunFailure, match="--resume"):
            trainer.train()
    finally:
        Cluster.sync_weights = sync  # type: ignore[method-assign]
    assert rows(reference / name)[-1]["step"] == 4
    GRPOTrainer(resume=str(reference / name)).train()
    assert rows(reference / name) == rows(reference / "inline")
    assert rows(reference / name, "samples.jsonl") == rows(reference / "inline", "samples.jsonl")


def kill(cluster: Cluster, role: str) -> None:
    """kill -9 of the process that hosts the role."""
    backend = cluster.backend
    assert isinstance(backend, Remote)
    os.kill(backend.ray.get(backend.hosts[role].pid.remote()), signal.SIGKILL)


def kill_at(monkeypatch: pytest.MonkeyPatch, verb: str, role: str, nth: int, after: bool) -> None:
    """The role's process dies at the nth call of a verb of the cluster, before it or while it is under way."""
    original = getattr(Cluster, verb)
    seen = {"calls": 0}

    def wrapped(self: Cluster, *args: Any) -> Any:
        seen["calls"] += 1
        if seen["calls"] == nth and not after:
            kill(self, role)
        if seen["calls"] == nth and after:
            backend = self.backend
            assert isinstance(backend, Remote)
            call = backend.call

            def call_and_kill(called: str, method: str, *inner: Any) -> Any:
                pid = backend.ray.get(backend.hosts[role].pid.remote())
                pending = call(called, method, *inner)
                os.kill(pid, signal.SIGKILL)
                backend.call = call  # type: ignore[method-assign]
                return pending

            backend.call = call_and_kill  # type: ignore[method-assign]
        return original(self, *args)

    monkeypatch.setattr(Cluster, verb, wrapped)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.usefixtures("shared_ray")
def test_dead_rollout_and_reward_actors_are_replaced(reference: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three deaths at three places of one run."""
    kill_at(monkeypatch, "sync_weights", "rollout-0", 3, True)  # while weights arrive
    kill_at(monkeypatch, "score", "rewards", 4, True)  # while it scores
    kill_at(monkeypatch, "sample", "rollout-1", 6, True)  # while it samples
    revived: list[str] = []
    revive = Remote.revive
    monkeypatch.setattr(Remote, "revive", lambda self, role: (revived.append(role), revive(self, role))[1])
    content = settings(reference, "killed", "ray")
    content["run"]["max_restarts"] = 3
    GRPOTrainer(content).train()
    assert sorted(revived) == ["rewards", "rollout-0", "rollout-1"]
    assert rows(reference / "killed") == rows(reference / "inline")
    assert rows(reference / "killed", "samples.jsonl") == rows(reference / "inline", "samples.jsonl")


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.usefixtures("shared_ray")
@pytest.mark.parametrize(
    ("transport", "pushed"),
    [("ipc", [0, 0, 0]), ("broadcast", [0, 0, 1])],  # a broadcast breaks off, and everything is sent anew
)
def test_an_engine_that_dies_while_weights_arrive_on_another_way(
    reference: Path, monkeypatch: pytest.MonkeyPatch, transport: str, pushed: list[int]
) -> None:
    kill_at(monkeypatch, "sync_weights", "rollout-0", 3, True)
    content = settings(reference, transport, "ray")
    content["rollout"] |= {"weight_transport": transport, "broadcast_timeout": 5}
    GRPOTrainer(content).train()
    got, want = rows(reference / transport), rows(reference / "inline")
    sent = [row.pop("sync/bytes", 0) for row in got], [row.pop("sync/bytes", 0) for row in want]
    assert got == want
    assert [int(a > b) for a, b in zip(*sent)][1:4] == pushed


@pytest.mark.parametrize("transport", ["object_store", "disk"])
def test_in_one_process_weights_may_be_copied_all_the_same(reference: Path, transport: str) -> None:
    content = settings(reference, transport, "inline")
    content["rollout"]["weight_transport"] = transport
    GRPOTrainer(content).train()
    assert rows(reference / transport) == rows(reference / "inline")
    assert not list((reference / transport).glob("weights/*"))


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.usefixtures("shared_ray")
@pytest.mark.parametrize(
    ("verb", "nth", "after"),
    [("learn", 4, True), ("sync_weights", 3, False), ("save", 2, True)],  # in, after the step; while saving
)
def test_a_dead_learner_stops_the_run_and_resume_is_bit_equal(
    reference: Path, monkeypatch: pytest.MonkeyPatch, verb: str, nth: int, after: bool
) -> None:
    kill_at(monkeypatch, verb, "learner", nth, after)
    name = f"killed-{verb}-learner"
    with pytest.raises(RunFailure, match=r"learner process died.*--resume"):
        GRPOTrainer(settings(reference, name, "ray")).train()
    monkeypatch.undo()
    assert 2 <= rows(reference / name)[-1]["step"] < 6
    GRPOTrainer(resume=str(reference / name), overrides=["--run.cluster=inline"]).train()
    assert rows(reference / name) == rows(reference / "inline")
    assert not list((reference / name / "checkpoints").glob(".partial*"))


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.usefixtures("shared_ray")
def test_an_engine_that_dies_in_a_refill_is_replaced(reference: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"dynamic_sampling": True, "max_steps": 3}
    with monkeypatch.context() as patch:  # only correct answers pay: nearly every group is dropped and refilled
        calls: list[int] = []
        sample = Cluster.sample
        patch.setattr(Cluster, "sample", lambda self, p, q: (calls.append(len(p)), sample(self, p, q))[1])
        content = settings(reference, "refill", "inline", **options) | {"rewards": {"exact_match": 1.0}}
        GRPOTrainer(content).train()
        assert len(calls) > 3 + 2, "no refill took place"
    kill_at(monkeypatch, "sample", "rollout-0", 3, True)  # evaluation, first rollout, then its refill
    content = settings(reference, "refill-killed", "ray", **options) | {"rewards": {"exact_match": 1.0}}
    GRPOTrainer(content).train()
    assert rows(reference / "refill-killed") == rows(reference / "refill")


@pytest.fixture(scope="module")
def twenty_steps(reference: Path) -> Path:
    """A run in one process, long enough for a difference in the last bit to grow."""
    GRPOTrainer(settings(reference, "twenty", "inline", max_steps=20)).train()
    return reference / "twenty"


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.usefixtures("shared_ray")
@pytest.mark.parametrize(
    ("placement", "expected"),
    [
        ("separate", {"LearnerActor": 1, "RolloutActor": 2, "RewardActor": 1}),
        ("colocated", {"ColocatedActor": 1}),
    ],
)
def test_the_run_goes_through_ray(
    twenty_steps: Path, monkeypatch: pytest.MonkeyPatch, placement: str, expected: dict[str, int]
) -> None:
    """Ray's own state API sees the actors of the run, and the numbers are those of one process."""
    from ray.util.state import list_actors

    seen: list[dict[str, int]] = []
    learn = Cluster.learn

    def look(self: Cluster, *batches: Any) -> Any:
        if not seen:
            here = self.backend.ray.get_runtime_context()  # type: ignore[attr-defined]
            # of this run, on this cluster: 100 are listed, and other tests' dead ones would count
            mine = [("state", "=", "ALIVE"), ("job_id", "=", here.get_job_id())]
            seen.append(dict(Counter(actor.class_name for actor in list_actors(here.gcs_address, filters=mine))))
        return learn(self, *batches)

    monkeypatch.setattr(Cluster, "learn", look)
    content = settings(twenty_steps.parent, placement, "ray", max_steps=20)
    content["run"]["placement"] = placement
    GRPOTrainer(content).train()
    assert seen == [expected]
    assert len(rows(twenty_steps)) == 21
    assert rows(twenty_steps.parent / placement) == rows(twenty_steps)


def test_trainer_takes_a_config_object(tmp_path: Path) -> None:
    config = load_config(settings(tmp_path, "object", "inline"), ["--grpo.max_steps=1", "--rollout.num_workers=1"])
    result = GRPOTrainer(config).train()
    assert result.report.is_file() and result.accuracy_before is not None


def test_a_run_whose_rollout_moves_the_routers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = settings(tmp_path, "rollout", "inline", max_steps=3, router_policy="rollout", mtp_loss_weight=0.1)
    content["run"]["alarms"] = {"router/max_violation": 0.01}
    result = GRPOTrainer(content).train()
    biases = load_file(result.run_dir / "checkpoints" / "step_3" / "model.safetensors")
    moved = [round(1000 * float(b)) for n, v in biases.items() if n.endswith("correction_bias") for b in v]
    assert any(moved[:16]) and all(abs(n) <= 3 for n in moved[:16])  # three steps of 0.001 at most, in two layers
    assert not any(moved[16:])  # the rollout does not run the MTP layer
    names = {"router/max_violation", "router/dead_experts", "router/drift", "mtp_loss", "mtp/agreement"}
    assert all(names <= set(row) for row in rows(result.run_dir)[1:])
    line = "router/max_violation is "
    assert capsys.readouterr().out.count(f"warning: {line}") == 1
    assert f'<p class="alarm">{line}' in result.report.read_text()
