"""Router policies: which tokens are counted, when the bias moves and how far, and the metrics that watch."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from grpo.alarms import Alarms
from grpo.config import Config, GRPOConfig, RolloutConfig, StageConfig
from grpo.learner import Learner, nll_loss
from grpo.packing import pack
from grpo.records import Group, PackedBatch, Prompt, Sample, TrainingSample
from grpo.router import rollout_counts, router_metrics, trained_tokens
from grpo.steps import pack_step, sampling_params, with_advantages
from model import DeepseekV3ForCausalLM, SequenceLayout
from model.create import create_model
from model.moe import TopkRouter
from model.names import hf_state
from rewards import Score
from rollout import Completion
from rollout.embedded import EmbeddedEngine

TINY = Path(__file__).resolve().parents[2] / "configs" / "tiny_v3.yaml"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    spec = yaml.safe_load(TINY.read_text())
    spec["config"]["initializer_range"] = 0.1  # experts that differ
    directory = tmp_path_factory.mktemp("tiny")
    create_model(spec, directory, seed=0)
    return directory


def make_groups(left_out: int = -1) -> list[list[TrainingSample]]:
    """Prompts of 9, 4 and 6 tokens with 3, 1 and 4 samples; sample `left_out` has weight 0."""
    rng = np.random.default_rng(0)
    groups, number = [], 0
    for length, completions in ((9, (5, 1, 12)), (4, (7,)), (6, (2, 4, 2, 8))):
        prompt = tuple(rng.integers(0, 50, length).tolist())
        samples = []
        for n in completions:
            ids = tuple(rng.integers(0, 50, n).tolist())
            weight = 0.0 if number == left_out else 1 / 41
            samples.append(TrainingSample(prompt, ids, weight, float(rng.normal()), (-4.0,) * n, (0.0,) * n))
            number += 1
        groups.append(samples)
    return groups


def biases(learner: Learner) -> list[torch.Tensor]:
    return [m.e_score_correction_bias.clone() for m in learner.policy.model.modules() if isinstance(m, TopkRouter)]


def counts_of(learner: Learner, batch: PackedBatch, mask: torch.Tensor) -> torch.Tensor:
    """[L, E] by hand: the model's routing of the packed tokens that `mask` keeps."""
    layout = SequenceLayout.from_segments(batch.cu_seqlens, batch.parent, batch.position_ids)
    with torch.no_grad():
        experts = learner.policy.model.forward_packed(batch.input_ids, layout, output_routing=True).routed_experts
    assert experts is not None
    return torch.stack([layer.flatten().bincount(minlength=8) for layer in experts[mask].unbind(1)])


def moved(counts: torch.Tensor, rate: float) -> torch.Tensor:
    return rate * torch.sign(counts.float().mean(1, keepdim=True) - counts)


def test_tokens_of_samples_without_weight_are_not_counted() -> None:
    def kept(left_out: int) -> list[int]:
        (batch,) = pack(make_groups(left_out), 1000)
        lengths = batch.cu_seqlens.diff()
        mask = trained_tokens(batch)
        return [int(part.sum()) for part in mask.split(lengths.tolist())]

    every = [8, 5, 1, 12, 4 + 6, 5, 2, 4, 2, 8]  # prompts without their last token, which samples begin with
    assert kept(-1) == every
    assert kept(1) == [8, 5, 0, *every[3:]]
    assert kept(3) == [*every[:4], 0, *every[5:]]  # a prompt without any other sample goes too


def test_frozen_is_the_default(tiny: Path) -> None:
    learner = Learner(tiny, GRPOConfig(learning_rate=1e-3))
    metrics = learner.step([pack(make_groups(), 1000)]).metrics
    assert not torch.stack(biases(learner)).any()
    assert 0 < metrics["router/max_violation"] < 3 and metrics["router/drift"] == 0


def test_update_moves_the_bias_once_an_update_by_what_it_trained_on(tiny: Path) -> None:
    groups = make_groups(left_out=3)
    learner = Learner(tiny, GRPOConfig(learning_rate=1e-9, router_policy="update", router_bias_update_rate=0.01))
    (whole,) = pack(groups, 1000)
    mask = torch.ones_like(whole.input_ids, dtype=torch.bool)
    mask[26:36] = False  # the sample without weight, alone with its prompt
    counts = counts_of(learner, whole, mask)
    assert counts.sum().item() == 2 * 2 * (len(whole.input_ids) - 10)
    learner.step([[*pack(groups[:1], 1000), *pack(groups[1:], 1000)]])  # two micro-batches are one update
    main, mtp = biases(learner)[:2], biases(learner)[2]
    torch.testing.assert_close(torch.stack(main), moved(counts, 0.01))
    assert not mtp.any()  # not trained
    learner.step([pack(groups[:1], 1000), pack(groups[1:], 1000)])  # two updates
    change = torch.stack(biases(learner)[:2]) - torch.stack(main)
    assert set((change / 0.01).round().int().flatten().tolist()) <= {-2, -1, 0, 1, 2}
    assert change.abs().max().item() == pytest.approx(0.02)


def test_supervised_stages_move_it_and_that_of_trained_mtp_layers(tiny: Path) -> None:
    batches = pack([[s] for group in make_groups() for s in group], 1000)
    learner = Learner(tiny, StageConfig(router_bias_update_rate=0.01))
    _, _, _, stats = learner.update(batches, nll_loss)
    assert stats["sum/expert_counts"].shape == (3, 8)
    torch.testing.assert_close(torch.stack(biases(learner)), moved(stats["sum/expert_counts"], 0.01))
    assert biases(learner)[2].any()
    frozen = Learner(tiny, StageConfig(router_bias_update_rate=0.0))
    frozen.update(batches, nll_loss)
    assert not torch.stack(biases(frozen)).any()


def test_recomputation_counts_once(tiny: Path) -> None:
    config = GRPOConfig(router_policy="update")
    learners = [Learner(tiny, config, checkpointing=flag) for flag in (False, True)]
    results, calls = [], []
    for learner in learners:
        seen: list[int] = []
        gate = learner.policy.model.model.layers[1].mlp.gate
        gate.register_forward_hook(lambda *_, seen=seen: seen.append(1))  # type: ignore[misc]
        batches = [pack([group], 1000)[0] for group in make_groups()]
        _, _, _, stats = learner.update(batches, nll_loss)
        results.append((stats["sum/expert_counts"], torch.stack(biases(learner))))
        calls.append(len(seen))
    assert calls == [3, 6]
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])
    # nor does the cut matter, where it splits no group
    whole = Learner(tiny, config)
    _, _, _, stats = whole.update(pack(make_groups(), 1000), nll_loss)
    assert torch.equal(stats["sum/expert_counts"], results[0][0])


def test_the_bias_of_a_bfloat16_model_moves_past_a_quarter(tiny: Path, tmp_path: Path) -> None:
    """700 steps of 0.001; in bfloat16 they would end at 0.5, where the next number is 0.004 away."""
    learner = Learner(tiny, GRPOConfig(router_policy="update"), dtype="bfloat16")
    counts = torch.tensor([[0, 0, 0, 0, 9, 9, 9, 9]] * 2)
    want, low = torch.tensor([0.001] * 4 + [-0.001] * 4), torch.zeros(8, dtype=torch.bfloat16)
    for _ in range(700):
        learner.policy.balance(counts, 0.001)
        low = (low + want).bfloat16()
    assert low.abs().max() == 0.5
    learner.save(tmp_path)
    loaded = DeepseekV3ForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    engine = EmbeddedEngine(DeepseekV3ForCausalLM.from_pretrained(tiny, dtype=torch.bfloat16))
    engine.load_weights(hf_state(learner.policy.model), 1)
    for model in (learner.policy.model, loaded, engine.model):
        for layer in (1, 2):
            bias = model.model.layers[layer].mlp.gate.e_score_correction_bias
            assert bias.dtype == torch.float32
            torch.testing.assert_close(bias, 700 * want, rtol=1e-4, atol=0)


def test_rollout_counts_by_hand() -> None:
    def sample(index: int, experts: list[list[int]]) -> Sample:
        routed = np.array(experts, dtype=np.uint8)[:, None]  # [tokens, L 1, K]
        completion = Completion((1,) * (len(experts) - 1), (), (), "stop", 0, routed)
        return Sample(prompt, index, completion, "", Score(1.0))

    prompt = Prompt("p", "", (1, 2))
    # two prompt tokens, then completion tokens but for the last one
    group = Group(prompt, (sample(0, [[0, 1], [0, 2], [5, 2]]), sample(1, [[0, 1], [0, 2], [3, 4], [3, 2]])))
    assert rollout_counts([group]).tolist() == [[2, 1, 3, 2, 1, 1]]
    assert rollout_counts([group, group]).tolist() == [[4, 2, 6, 4, 2, 2]]


def rolled_out(learner: Learner, config: Config) -> list[Group]:
    prompts = [Prompt(f"p{i}", "", tuple(range(3 + i, 8 + 3 * i))) for i in range(3)]
    engine = EmbeddedEngine(learner.policy.model, enable_return_routed_experts=True)
    completions = engine.generate([p.token_ids for p in prompts], [sampling_params(config, p) for p in prompts])
    learner.policy.model.train()
    rng = np.random.default_rng(0)
    groups = [
        Group(p, tuple(Sample(p, i, c, "", Score(float(rng.random()))) for i, c in enumerate(group)))
        for p, group in zip(prompts, completions)
    ]
    return with_advantages(groups, config)


def test_rollout_moves_the_bias_once_a_step_by_what_the_engine_counted(tiny: Path) -> None:
    settings: dict[str, Any] = {"num_generations": 4, "prompts_per_step": 3, "minibatches_per_step": 3}
    config = Config(
        rollout=RolloutConfig(max_completion_length=10),
        grpo=GRPOConfig(**settings, router_policy="rollout", router_bias_update_rate=0.01, learning_rate=1e-9),
    )
    learner = Learner(tiny, config.grpo)
    groups = rolled_out(learner, config)
    counts = rollout_counts(groups)
    # The learner sends the same tokens to the same experts; only its samples each begin with the prompt's last token.
    (batch,) = pack_step(
        groups, config.model_copy(update={"grpo": GRPOConfig(**settings | {"minibatches_per_step": 1})})
    )[0]
    again = torch.zeros(len(batch.input_ids), dtype=torch.bool)
    again[[int(batch.source[batch.sample == s][0]) for s in range(12) if s % 4]] = True
    want = counts_of(learner, batch, ~again)
    assert torch.equal(torch.nn.functional.pad(counts, (0, 8 - counts.shape[1])), want)
    with pytest.raises(AssertionError, match="without the rollout's counts"):
        learner.step(pack_step(groups, config))
    learner = Learner(tiny, config.grpo)
    learner.step(pack_step(groups, config), counts)
    torch.testing.assert_close(torch.stack(biases(learner)[:2]), moved(want, 0.01))
    fewer = Learner(tiny, config.grpo)
    fewer.step(pack_step(groups, config), torch.tensor([[4, 0], [0, 4]]))  # experts that are not named got nothing
    assert (torch.stack(biases(fewer)[:2]) / 0.01).round().int().tolist() == [[-1, *[1] * 7], [1, -1, *[1] * 6]]


def test_balance_loss_is_alpha_at_perfect_balance(tiny: Path) -> None:
    """Routers of weight 0 give every expert the same share of the scores: alpha for each layer, whatever is chosen."""
    losses = []
    for alpha in (0.0, 0.125):
        learner = Learner(tiny, GRPOConfig(router_aux_loss_coef=alpha))
        for module in learner.policy.model.modules():
            if isinstance(module, TopkRouter):
                torch.nn.init.zeros_(module.weight)
        losses.append(learner.policy.forward_backward(pack(make_groups(), 1000), nll_loss)[0])
    assert losses[1] - losses[0] == pytest.approx(2 * 0.125, abs=1e-5)


def test_metrics_by_hand() -> None:
    start = torch.tensor([[4, 4, 4, 4], [8, 0, 4, 4]])
    now = torch.tensor([[2, 2, 2, 2], [0, 0, 4, 12]])
    assert router_metrics(now, start) == {
        "router/max_violation": 2.0,
        "router/dead_experts": 0.25,
        "router/drift": pytest.approx((0 + (0.5 + 0.5) / 2) / 2),
    }
    assert router_metrics(start, start)["router/drift"] == 0
    assert router_metrics(torch.zeros_like(start), start) == {} == router_metrics(start[:0], start[:0])


def test_drift_is_measured_from_the_first_step_of_the_run(tiny: Path, tmp_path: Path) -> None:
    learner = Learner(tiny, GRPOConfig(learning_rate=1e-9, router_policy="update", router_bias_update_rate=0.2))
    batches = [pack(make_groups(), 1000)]
    assert learner.step(batches).metrics["router/drift"] == 0
    learner.save(tmp_path)
    want = learner.step(batches).metrics["router/drift"]
    resumed = Learner(tiny, learner.config)
    resumed.load(tmp_path)
    assert resumed.step(batches).metrics["router/drift"] == want > 0.1
    silent = [dataclasses.replace(batches[0][0], weights=torch.zeros_like(batches[0][0].weights))]
    assert not [name for name in resumed.step([silent]).metrics if name.startswith("router/")]


def test_an_alarm_is_raised_once() -> None:
    alarms = Alarms({"router/dead_experts": 0.25, "kl": 1.0})
    rows = [{"step": 1, "router/dead_experts": 0.25}, {"step": 2, "router/dead_experts": 0.5, "kl": None}]
    rows += [{"step": 3, "router/dead_experts": 0.9}, {"step": 4, "kl": 2.0}]
    lines = [alarms.check(row) for row in rows]
    assert [len(found) for found in lines] == [0, 1, 0, 1]
    assert lines[1][0].startswith("router/dead_experts is 0.5 at step 2, above 0.25: experts get no tokens")
    assert lines[3] == ["kl is 2 at step 4, above 1"]
