"""The arrows of the loop, with an engine at one end and the learner at the other: both see the same numbers."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from grpo.config import Config, GRPOConfig, RolloutConfig
from grpo.learner import Learner
from grpo.prepare import load_tokenizer
from grpo.records import Group, PackedBatch, Prompt, Sample
from grpo.steps import (
    informative,
    make_groups,
    pack_step,
    reward_inputs,
    reward_matrix,
    sample_rows,
    sampling_params,
    step_metrics,
    with_advantages,
)
from model.create import create_model, encode
from model.moe import TopkRouter
from rewards import Score, Status
from rollout import Completion
from rollout.embedded import EmbeddedEngine

TINY = Path(__file__).resolve().parents[2] / "configs" / "tiny_v3.yaml"
UNSCORED = Score(None, Status.TIMEOUT)


@pytest.fixture(scope="module")
def spec() -> dict[str, Any]:
    torch.set_num_threads(1)
    spec = yaml.safe_load(TINY.read_text())
    spec["config"]["initializer_range"] = 0.1  # attention and experts that do something
    return spec


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory, spec: dict[str, Any]) -> Path:
    directory = tmp_path_factory.mktemp("tiny")
    create_model(spec, directory, seed=0)
    return directory


@pytest.fixture(scope="module")
def tokenizer(tiny: Path) -> Any:
    return load_tokenizer(tiny)


def config(rollout: dict[str, Any] | None = None, **grpo: Any) -> Config:
    settings: dict[str, Any] = {"num_generations": 3, "prompts_per_step": 2} | grpo
    sampling: dict[str, Any] = {"max_completion_length": 10} | (rollout or {})
    return Config(grpo=GRPOConfig(**settings), rollout=RolloutConfig(**sampling))


def make(
    scores: list[list[float | None]], lengths: list[list[int]], stops: list[list[str]] | None = None
) -> list[Group]:
    """Groups with these rewards and completion lengths; prompt p has the token ids (p, p + 1, p + 2)."""
    groups = []
    for p, (values, sizes) in enumerate(zip(scores, lengths)):
        prompt = Prompt(f"p{p}", f"text {p}", (p, p + 1, p + 2))
        samples = []
        for i, (value, size) in enumerate(zip(values, sizes)):
            reason: Any = "stop" if stops is None else stops[p][i]
            ids = tuple(range(10 * i + 10, 10 * i + 10 + size))
            completion = Completion(ids, (-0.5 - i,) * size, (-0.1 * i,) * size, reason, policy_version=4)
            score = UNSCORED if value is None else Score(value, parts={"right": value, "form": 0.5 if i else None})
            samples.append(Sample(prompt, i, completion, f"c{p}{i}", score))
        groups.append(Group(prompt, tuple(samples)))
    return groups


def test_sampling_params() -> None:
    settings = config({"temperature": 0.7, "top_p": 0.9, "top_k": 5, "min_p": 0.01, "max_completion_length": 33})
    prompt = Prompt("a", "", (1,))
    params = sampling_params(settings, prompt)
    assert (params.n, params.temperature, params.top_p, params.top_k) == (3, 0.7, 0.9, 5)
    assert (params.min_p, params.max_tokens) == (0.01, 33)
    assert sampling_params(settings, Prompt("a", "other text", (2,))).seed == params.seed
    others = [Prompt("b", "", (1,)), Prompt("a", "", (1,), visit=1), Prompt("a", "", (1,), visit=2)]
    assert len({params.seed, *(sampling_params(settings, p).seed for p in others)}) == 4
    reseeded = settings.model_copy(update={"run": settings.run.model_copy(update={"seed": 1})})
    assert sampling_params(reseeded, prompt).seed != params.seed


def test_reward_inputs_and_groups(tokenizer: Any) -> None:
    prompts = [Prompt("p0", "1+1=", (1, 2), {"answer": "2"}), Prompt("p1", "2+2=", (3,), {"answer": "4"})]
    end = tokenizer.eos_token_id
    texts = [["<answer>2</answer>", "23"], ["4", ""]]
    ids: list[list[tuple[int, ...]]] = [[(*encode(tokenizer, text), end) for text in group] for group in texts]
    ids[0][1] = ids[0][1][:-1]
    completions = [
        [Completion(t, (0.0,) * len(t), (0.0,) * len(t), "stop" if t[-1] == end else "length", 0) for t in group]
        for group in ids
    ]
    inputs = reward_inputs(prompts, completions, tokenizer)
    assert [given.completion for given in inputs] == ["<answer>2</answer>", "23", "4", ""]
    assert [given.truncated for given in inputs] == [False, True, False, False]
    assert [(given.prompt, given.group) for given in inputs] == [("1+1=", "p0")] * 2 + [("2+2=", "p1")] * 2
    assert [given.fields["answer"] for given in inputs] == ["2", "2", "4", "4"]
    assert inputs[0].completion_ids == ids[0][0]
    scores = [Score(1.0), Score(0.0), UNSCORED, Score(0.5)]
    groups = make_groups(prompts, completions, inputs, scores)
    assert [[(s.index, s.text) for s in group.samples] for group in groups] == [
        [(0, "<answer>2</answer>"), (1, "23")],
        [(0, "4"), (1, "")],
    ]
    np.testing.assert_array_equal(reward_matrix(groups), [[1.0, 0.0], [math.nan, 0.5]])
    with pytest.raises(ValueError):
        make_groups(prompts, completions, inputs, scores[:-1])


def test_informative_and_advantages() -> None:
    scores: list[list[float | None]] = [[1.0, 0.0, None], [0.5, 0.5, None], [None, 1.0, None], [2.0, 2.0, 5.0]]
    groups = make(scores, [[1, 1, 1]] * 4)
    assert [g.prompt.id for g in informative(groups, config())] == ["p0", "p3"]
    assert informative([], config()) == []
    done = with_advantages(groups, config(scale_rewards="none"))
    assert [[s.advantage for s in g.samples] for g in done] == [
        [0.5, -0.5, None],
        [0.0, 0.0, None],
        [None, 0.0, None],
        [-1.0, -1.0, 2.0],
    ]
    rloo = with_advantages(groups, config(scale_rewards="none", advantage_estimator="rloo"))
    assert [s.advantage for s in rloo[3].samples] == [-1.5, -1.5, 3.0]


def weights(minibatch: list[PackedBatch]) -> list[float]:
    """Weight of a token of each sample, in order."""
    found = []
    for batch in minibatch:
        found += [batch.weights[batch.sample == i][0].item() for i in range(batch.num_samples)]
    return found


def test_pack_step() -> None:
    scores: list[list[float | None]] = [[1.0, 0.0, None], [0.0, 1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]]
    lengths = [[2, 3, 4], [1, 1, 5], [6, 2, 2], [3, 3, 3]]
    stops = [["stop", "length", "stop"]] + [["stop"] * 3] * 3
    settings = config(prompts_per_step=4, minibatches_per_step=2, max_tokens_per_microbatch=14, scale_rewards="none")
    groups = with_advantages(make(scores, lengths, stops), settings)
    first, second = pack_step(groups, settings)
    # a mini-batch's normaliser counts its own scored tokens: 2 + 3 + 1 + 1 + 5 and 10 + 9
    assert weights(first) == pytest.approx([1 / 12] * 2 + [0] + [1 / 12] * 3)
    assert weights(second) == pytest.approx([1 / 19] * 6)
    assert [[b.num_samples for b in m] for m in (first, second)] == [[3, 3], [3, 3]]
    batch = first[0]
    assert batch.target.tolist() == [10, 11, 20, 21, 22, 30, 31, 32, 33]
    assert batch.rollout_logprobs.tolist() == [-0.5] * 2 + [-1.5] * 3 + [-2.5] * 4
    assert batch.log_support.tolist() == pytest.approx([0.0] * 2 + [-0.1] * 3 + [-0.2] * 4)
    assert batch.advantages.tolist() == [0.5] * 2 + [-0.5] * 3 + [0.0] * 4
    assert batch.input_ids[:2].tolist() == [0, 1]

    masked = config(prompts_per_step=4, mask_truncated_completions=True, loss_type="grpo")
    (whole,) = pack_step(groups, masked)
    # 12 samples of which two weigh nothing: one truncated, one unscored
    want = [1 / (12 * n) for row in lengths for n in row]
    want[1] = want[2] = 0
    assert weights(whole) == pytest.approx(want)
    (dr,) = pack_step(groups, config(prompts_per_step=4, loss_type="dr_grpo"))
    assert weights(dr) == pytest.approx([1 / 120] * 2 + [0] + [1 / 120] * 9)
    # fewer groups than mini-batches (dynamic sampling came back short): one group in each
    assert len(pack_step(groups[:1], settings)) == 1


def test_step_metrics() -> None:
    sampled = make(
        [[1.0, 0.0, None], [0.5, 0.5, 0.5]], [[2, 3, 4], [1, 1, 5]], [["stop", "length", "stop"], ["stop"] * 3]
    )
    metrics = step_metrics(sampled[:1], sampled)
    assert metrics == pytest.approx(
        {
            "reward": 0.5,
            "reward_std": math.sqrt(0.5),
            "frac_reward_zero_std": 0.5,
            "completions/mean_length": 3.0,
            "completions/min_length": 2.0,
            "completions/max_length": 4.0,
            "completions/clipped_ratio": 1 / 3,
            "rewards/unscored_share": 1 / 3,
            "num_tokens": 9.0,
            "rewards/right/mean": 0.5,
            "rewards/right/std": math.sqrt(0.5),
            "rewards/form/mean": 0.5,
            "rewards/form/std": 0.0,
        }
    )
    rows = sample_rows(6, with_advantages(sampled, config()), 4)
    assert [(r["prompt_id"], r["sample"], r["completion"]) for r in rows] == [
        ("p0", 0, "c00"),
        ("p0", 1, "c01"),
        ("p0", 2, "c02"),
        ("p1", 0, "c10"),
    ]
    assert (rows[2]["reward"], rows[2]["advantage"], rows[2]["status"]) == (None, None, "timeout")
    assert (rows[1]["finish_reason"], rows[1]["length"], rows[1]["policy_version"], rows[1]["step"]) == (
        "length",
        3,
        4,
        6,
    )


def rolled_out(learner: Learner, settings: Config, replay: bool = False) -> tuple[list[Group], list[PackedBatch]]:
    """Groups sampled from the learner's model by an engine, and the micro-batches that a step makes of them."""
    rng = np.random.default_rng(0)
    prompts = [Prompt(f"p{i}", "", tuple(rng.integers(3, 50, n).tolist())) for i, n in enumerate((17, 1, 6, 30))]
    engine = EmbeddedEngine(learner.policy.model, enable_return_routed_experts=replay)
    completions = engine.generate([p.token_ids for p in prompts], [sampling_params(settings, p) for p in prompts])
    learner.policy.model.train()
    groups = [
        Group(p, tuple(Sample(p, i, c, "", Score(float(rng.integers(2)))) for i, c in enumerate(group)))
        for p, group in zip(prompts, completions)
    ]
    (minibatch,) = pack_step(with_advantages(groups, settings), settings)
    return groups, minibatch


@pytest.mark.parametrize(
    "rollout",
    [{}, {"temperature": 0.7}, {"top_p": 0.9}, {"temperature": 0.7, "top_p": 0.9}],
    ids=["plain", "temperature", "top_p", "both"],
)
def test_engine_and_learner_agree(tiny: Path, rollout: dict[str, Any]) -> None:
    settings = config({"max_completion_length": 24} | rollout, prompts_per_step=4, max_tokens_per_microbatch=120)
    temperature = settings.rollout.temperature
    learner = Learner(tiny, settings.grpo, temperature=temperature)
    groups, batches = rolled_out(learner, settings)
    assert len(batches) > 1
    engine = [x for g in groups for s in g.samples for x in s.completion.logprobs]
    ours = torch.cat([learner.logprobs(batch) for batch in batches])
    assert len(engine) > 150
    torch.testing.assert_close(ours, torch.tensor(engine), rtol=0, atol=1e-4)
    support = torch.cat([batch.log_support for batch in batches])
    if "top_p" in rollout:
        # the kept mass is at least 0.9, and what was drawn lies in it
        assert support.min() < -0.01
        assert support.min() >= math.log(0.9) - 1e-5
        assert support.max() <= 0
    else:
        assert not support.any()
    if temperature != 1:
        other = Learner(tiny, settings.grpo)
        assert (torch.cat([other.logprobs(b) for b in batches]) - ours).abs().max() > 0.1
    metrics = learner.step([batches]).metrics
    assert metrics["sampling/sampling_logp_difference/max"] < 1e-4


def test_replayed_routing(tiny: Path) -> None:
    settings = config({"max_completion_length": 24, "replay_routing": True}, prompts_per_step=4)
    learner = Learner(tiny, settings.grpo)
    groups, (batch,) = rolled_out(learner, settings, replay=True)
    engine = torch.tensor([x for g in groups for s in g.samples for x in s.completion.logprobs])
    assert batch.routed_experts is not None
    free = dataclasses.replace(batch, routed_experts=None)
    torch.testing.assert_close(learner.logprobs(batch), learner.logprobs(free), rtol=0, atol=1e-5)
    # biases only select: with others the learner routes differently, unless it replays what the engine did
    generator = torch.Generator().manual_seed(0)
    for module in learner.policy.model.modules():
        if isinstance(module, TopkRouter):
            module.e_score_correction_bias.uniform_(-1, 1, generator=generator)
    torch.testing.assert_close(learner.logprobs(batch), engine, rtol=0, atol=1e-4)
    assert (learner.logprobs(free) - engine).abs().max() > 0.01
    without = config({"max_completion_length": 24}, prompts_per_step=4)
    assert rolled_out(learner, without, replay=True)[1][0].routed_experts is None
