"""Partial rollouts: nothing lost or doubled, the version of each token, ratios of stale tokens, resume, learning."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from grpo import GRPOTrainer
from grpo.cluster import Cluster, RunFailure
from grpo.config import Config, ConfigError, GRPOConfig, load_config
from grpo.data import PromptCursor
from grpo.dispatch import collect
from grpo.losses import LossOptions, policy_loss
from grpo.packing import pack
from grpo.partial import Rollouts
from grpo.records import Prompt, TrainingSample
from grpo.steps import sampling_params
from model.names import hf_state
from rollout import Completion, SamplingParams
from rollout.records import complete
from tests.grpo.test_trainer import kill_at, rows, settings

TINY = Path(__file__).resolve().parents[2] / "configs" / "tiny_v3.yaml"


def partial_settings(tmp: Path, name: str, cluster: str = "inline", **grpo: Any) -> dict[str, Any]:
    content = settings(tmp, name, cluster, **grpo)
    content["rollout"] |= {"over_sampling_batch_size": 9, "max_completion_length": 20}
    content["run"]["log_samples"] = 1000
    return content


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from model.create import create_model

    path = tmp_path_factory.mktemp("tiny") / "model"
    create_model(TINY, path, seed=0)
    return path


def build(directory: Path, **rollout: Any) -> tuple[Cluster, Rollouts]:
    rollout = {"max_completion_length": 30, "over_sampling_batch_size": 10, **rollout}
    config = load_config(
        {
            "run": {"cluster": "inline"},
            "model": {"path": str(directory)},
            "rollout": rollout,
            "rewards": {"exact_match": 1.0},
            "grpo": {"prompts_per_step": 4, "num_generations": 3},
        }
    )
    cluster = Cluster(config, directory, directory)
    prompts = [Prompt(str(i), "", (3 + i % 7, 4, 5 + i % 3)) for i in range(25)]
    return cluster, Rollouts(config, cluster, PromptCursor(prompts, 0))


def new_weights(cluster: Cluster, version: int) -> None:
    """What a learner step does to the engines: every tensor is another one."""
    learner = cluster.backend.roles["learner"]  # type: ignore[attr-defined]
    generator = torch.Generator().manual_seed(version)
    with torch.no_grad():
        for parameter in learner.policy.parameters:
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    learner.policy_version = version
    cluster.sync_weights(version)


@pytest.mark.parametrize("engines", [1, 3])
def test_no_sample_is_lost_or_doubled_and_each_token_has_its_version(directory: Path, engines: int) -> None:
    cluster, rollouts = build(directory, num_workers=engines, replay_routing=True)
    seen: Counter[tuple[str, int]] = Counter()
    stale = 0
    with cluster:
        for step in range(8):
            if step:
                new_weights(cluster, step)
            prompts, groups = rollouts.sample(4)
            assert len(prompts) == len(groups) == 4 and len(rollouts.left) == 6
            seen.update((p.id, p.visit) for p in prompts)
            for group in groups:
                assert len(group) == 3 and complete(group)
                for sample in group:
                    count = len(sample.token_ids)
                    assert len(sample.logprobs) == len(sample.log_support) == count
                    assert sum(n for _, n in sample.policy_versions) == count
                    versions = [version for version, _ in sample.policy_versions]
                    assert versions == sorted(set(versions)) and versions[-1] == sample.policy_version <= step
                    assert sample.routed_experts is not None and len(sample.routed_experts) == 3 + count - 1
                    stale += sample.older_than(step)
        handed_out = {(p.id, p.visit) for p in PromptCursor(rollouts.cursor._prompts, 0).take(4 * 8 + 6)}
        left = {(p.id, p.visit) for p, _ in rollouts.left}
    assert set(seen.values()) == {1} and not set(seen) & left and set(seen) | left == handed_out
    assert stale > 20


def test_the_log_probabilities_are_those_of_the_weights_that_sampled(directory: Path) -> None:
    cluster, rollouts = build(directory)
    engine = cluster.backend.roles["rollout-0"].engine  # type: ignore[attr-defined]
    states, checked = [], 0
    with cluster:
        for step in range(4):
            if step:
                new_weights(cluster, step)
            states.append({name: tensor.clone() for name, tensor in hf_state(engine.model)})
            for prompt, group in zip(*rollouts.sample(4)):
                for sample in (s for s in group if s.older):
                    ids, start = torch.tensor([[*prompt.token_ids, *sample.token_ids]]), 0
                    for version, count in sample.policy_versions:
                        engine.load_weights(states[version].items(), version)
                        with torch.no_grad():
                            logits = engine.model(ids).logits[0, len(prompt.token_ids) - 1 : -1]
                        want = logits.log_softmax(-1).gather(1, ids[0, len(prompt.token_ids) :, None])[:, 0]
                        np.testing.assert_allclose(
                            sample.logprobs[start : start + count], want[start : start + count], atol=1e-5
                        )
                        start, checked = start + count, checked + 1
                    engine.load_weights(states[step].items(), step)
    assert checked > 10


def test_what_is_left_over_is_saved_exactly(directory: Path, tmp_path: Path) -> None:
    cluster, rollouts = build(directory, replay_routing=True)
    with cluster:
        version = 0
        while not any(sample.older for _, group in rollouts.left for sample in group):
            new_weights(cluster, version := version + 1)
            rollouts.sample(4)
        rollouts.save(tmp_path / "unfinished.npz")
        again = Rollouts(rollouts.config, cluster, PromptCursor(rollouts.cursor._prompts, 0))
        again.load(tmp_path / "unfinished.npz")
        assert again.left == [(prompt, tuple(group)) for prompt, group in rollouts.left]
        pairs = [(a, b) for (_, x), (_, y) in zip(again.left, rollouts.left) for a, b in zip(x, y)]
        finished = [(a.routed_experts, b.routed_experts) for a, b in pairs if a.finish_reason != "abort"]
        assert finished and all(np.array_equal(a, b) and a.dtype == b.dtype for a, b in finished)
        again.cursor.load_state(rollouts.cursor.state())
        assert again.sample(4) == rollouts.sample(4)
    with pytest.raises(ValueError, match="unfinished samples of the prompt '99'"):
        again.cursor.prompt("99", 0)


def test_a_plain_step_asks_as_before(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cluster, rollouts = build(directory, over_sampling_batch_size=0)
    monkeypatch.setattr(Cluster, "collect", None)
    with cluster:
        prompts, groups = rollouts.sample(4)
        params = [sampling_params(rollouts.config, prompt) for prompt in prompts]
        assert groups == cluster.sample([p.token_ids for p in prompts], params)
    assert not rollouts.left and rollouts.metrics([]) == {}


def test_engines_share_the_requests_and_the_goal() -> None:
    """Seven requests on three engines, five wanted: the shares of the goal add up to five."""
    requests: list[Any] = [((1, 2), SamplingParams(max_tokens=10)) for _ in range(7)]
    calls: list[tuple[str, list[int], int]] = []

    class Answer:
        def __init__(self, held: Any) -> None:
            self.held = held

        def result(self) -> dict[int, list[Completion]]:
            return {index: [Completion((index,), (0.0,), (0.0,), "stop", 0)] for index in self.held}

    def send(engine: str, held: Any, begun: Any, enough: int) -> Answer:
        assert begun == {index: (index,) for index in held}
        calls.append((engine, list(held), enough))
        return Answer(held)

    begun: Any = [(index,) for index in range(7)]
    got = collect(requests, begun, ["a", "b", "c"], send, 5)
    assert [group[0].token_ids[0] for group in got] == list(range(7))
    assert calls == [("a", [0, 3, 6], 2), ("b", [1, 4], 1), ("c", [2, 5], 2)]
    assert collect([], [], ["a"], send, 0) == []


def packed(stale: int) -> Any:
    sample = TrainingSample((1, 2), (3, 4, 5, 6), 0.25, 1.0, (-1.0, -2.0, -3.0, -4.0), (0.0,) * 4, None, stale)
    other = TrainingSample((1, 2), (7, 8), 0.25, -1.0, (-1.5, -2.5), (0.0,) * 2)
    (batch,) = pack([[sample, other]], 100)
    return batch


def test_stale_tokens_have_the_ratio_to_the_weights_that_sampled_them() -> None:
    """By hand: ratio exp(now - then), clipped at 1.2 for stale tokens; 1 for the others. The alarm sees those alone."""
    now = torch.tensor([-0.9, -1.0, -3.001, -4.0, -1.5, -2.498], requires_grad=True)
    batch = packed(2)
    assert batch.stale.tolist() == [True, True, False, False, False, False]
    assert packed(0).stale is None
    loss, stats = policy_loss(now, batch, LossOptions(epsilon=0.2, epsilon_high=0.2))
    loss.backward()
    assert loss.item() == pytest.approx(-0.25 * (np.exp(0.1) + 1.2 + 1 + 1 - 1 - 1))
    assert now.grad is not None
    assert now.grad.tolist() == pytest.approx([-0.25 * np.exp(0.1), 0.0, -0.25, -0.25, 0.25, 0.25])
    assert stats["max/logp_difference"].item() == pytest.approx(0.002, abs=1e-6)
    assert stats["sum/logp_difference"].item() == pytest.approx(0.003, abs=1e-6)
    assert (int(stats["sum/current"]), int(stats["sum/rows"]), int(stats["sum/clip_high"])) == (4, 6, 1)


def test_a_correction_leads_from_the_older_weights_to_the_current_ones() -> None:
    """By hand: its weight is exp(old - rollout), capped at 2; the ratio starts from `old` for every token alike."""
    now = torch.tensor([-0.9, -1.0, -3.0, -4.0, -1.5, -2.5], requires_grad=True)
    options = LossOptions(importance_sampling_correction="token_truncate", importance_sampling_cap=2.0)
    loss, stats = policy_loss(now, packed(2), options)
    loss.backward()
    assert now.grad is not None
    assert now.grad.tolist() == pytest.approx([-0.25 * np.exp(0.1), -0.5, -0.25, -0.25, 0.25, 0.25])
    assert stats["sum/is_ratio"].item() == pytest.approx(np.exp(0.1) + 2 + 4)
    assert int(stats["sum/clip_high"]) == 0


def test_fewer_prompts_under_way_than_a_step_needs_is_refused() -> None:
    content = {"grpo": {"prompts_per_step": 8}, "rollout": {"over_sampling_batch_size": 6}}
    with pytest.raises(ConfigError, match=r"rollout.over_sampling_batch_size 6 is less than grpo.prompts_per_step 8"):
        load_config(content)
    assert Config(grpo=GRPOConfig(prompts_per_step=8)).rollout.over_sampling_batch_size == 0


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run in one process."""
    tmp = tmp_path_factory.mktemp("runs")
    GRPOTrainer(partial_settings(tmp, "inline")).train()
    return tmp


def test_a_run_says_how_stale_its_tokens_are(reference: Path) -> None:
    found, samples = rows(reference / "inline")[1:], rows(reference / "inline", "samples.jsonl")
    assert found[0]["sampling/stale_tokens"] == found[0]["sampling/max_staleness"] == 0
    assert all(row["rollout/unfinished_groups"] == 5 for row in found)
    assert all(row["sampling/sampling_logp_difference/max"] < 1e-4 for row in found)
    assert max(row["sampling/stale_tokens"] for row in found) > 0.05
    for row in found:
        runs = [run for s in samples if s["step"] == row["step"] for run in s["policy_versions"]]
        stale = sum(count for version, count in runs if version < row["step"] - 1)
        assert row["sampling/stale_tokens"] == stale / sum(count for _, count in runs)
        assert row["sampling/max_staleness"] == max(row["step"] - 1 - version for version, _ in runs)
    assert len({(s["prompt_id"], s["sample"]) for s in samples}) == len(samples) == 6 * 16


def test_resume_goes_on_with_the_unfinished_samples(reference: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sync = Cluster.sync_weights

    def stop(self: Cluster, version: int) -> dict[str, float]:
        if version == 5:
            raise RunFailure("stopped here")
        return sync(self, version)

    monkeypatch.setattr(Cluster, "sync_weights", stop)
    with pytest.raises(RunFailure, match="--resume"):
        GRPOTrainer(partial_settings(reference, "stopped")).train()
    monkeypatch.undo()
    assert (reference / "stopped" / "checkpoints" / "step_4" / "train_state" / "unfinished.npz").is_file()
    GRPOTrainer(resume=str(reference / "stopped")).train()
    for name in ("metrics.jsonl", "samples.jsonl"):
        assert rows(reference / "stopped", name) == rows(reference / "inline", name)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.usefixtures("shared_ray")
def test_an_engine_that_dies_changes_nothing(reference: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kill_at(monkeypatch, "collect", "rollout-1", 3, True)
    GRPOTrainer(partial_settings(reference, "killed", "ray")).train()
    for name in ("metrics.jsonl", "samples.jsonl"):
        assert rows(reference / "killed", name) == rows(reference / "inline", name)


def test_dynamic_sampling_takes_every_prompt_once(tmp_path: Path) -> None:
    result = GRPOTrainer(partial_settings(tmp_path, "dynamic", dynamic_sampling=True, max_steps=3)).train()
    samples = rows(result.run_dir, "samples.jsonl")
    assert len({(s["prompt_id"], s["sample"]) for s in samples}) == len(samples) >= 3 * 4
    assert max(row["sampling/stale_tokens"] for row in rows(result.run_dir)[1:]) > 0


def test_a_short_run_learns(tmp_path: Path) -> None:
    """Answers shorter than the limit pay: the reward rises although most steps have stale tokens."""
    content = partial_settings(tmp_path, "learns", max_steps=25, learning_rate=3e-3)
    content["rewards"] = {"length": {"weight": 1.0, "max": 20}}
    content["run"] |= {"save_steps": 0, "eval_steps": 0}
    found = rows(GRPOTrainer(content).train().run_dir)[1:]
    assert np.mean([row["sampling/stale_tokens"] > 0 for row in found]) > 0.5
    first, last = (np.mean([row["reward"] for row in part]) for part in (found[:5], found[-5:]))
    assert last > first + 0.1, (first, last)


def test_records_say_which_weights_sampled() -> None:
    start = Completion((1, 2), (-1.0, -2.0), (0.0, 0.0), "abort", 3)
    twice = start.extended((3,), (-3.0,), (0.0,), "abort", 3).extended((4, 5), (-4.0, -5.0), (0.0, 0.0), "abort", 5)
    done = twice.extended((6,), (-6.0,), (0.0,), "stop", 6)
    assert done.token_ids == (1, 2, 3, 4, 5, 6) and done.logprobs == (-1.0, -2.0, -3.0, -4.0, -5.0, -6.0)
    assert done.policy_versions == ((3, 3), (5, 2), (6, 1)) and done.older == ((3, 3), (5, 2))
    assert [done.older_than(version) for version in (3, 4, 5, 6, 7)] == [0, 3, 3, 5, 6]
    assert twice.extended((), (), (), "abort", 9) is twice
    assert dataclasses.replace(done, older=()).policy_versions == ((6, 6),)
