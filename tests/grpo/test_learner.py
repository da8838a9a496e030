"""The learner: gradients whatever the cut, old log-probabilities, schedule, resume, master weights."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch

from grpo import learner as learner_module
from grpo import policy as policy_module
from grpo.advantages import group_advantages
from grpo.config import GRPOConfig, StageConfig
from grpo.learner import Learner, nll_loss
from grpo.logprobs import token_logprobs
from grpo.losses import LossOptions, policy_loss, token_weights
from grpo.packing import pack
from grpo.policy import LossFn, Stats
from grpo.records import PackedBatch, TrainingSample
from tests.resume import check_resume

TEMPERATURE = 0.7
# (prompt length, completion lengths) of each group
SHAPES = [(9, (5, 1, 12)), (4, (7,)), (1, (3, 6)), (6, (2, 4, 2, 8))]
Groups = list[list[TrainingSample]]


def make_groups(loss_type: str = "dapo", active: bool = True) -> Groups:
    """Random samples with the weights of one update; the sixth one takes no part unless `active`."""
    rng = np.random.default_rng(0)
    lengths = np.array([n for _, group in SHAPES for n in group])
    part = np.ones(len(lengths), dtype=bool)
    part[5] = active
    weights = iter(token_weights(lengths, loss_type, 16, part))
    groups = []
    for prompt_length, group in SHAPES:
        prompt = tuple(rng.integers(0, 50, prompt_length).tolist())
        samples = []
        for n in group:
            ids, rollout = tuple(rng.integers(0, 50, n).tolist()), tuple(rng.uniform(-5, -3, n).tolist())
            samples.append(TrainingSample(prompt, ids, float(next(weights)), float(rng.normal()), rollout))
        groups.append(samples)
    return groups


def cuts(groups: Groups) -> list[list[PackedBatch]]:
    """The groups as 1, 2 and 4 micro-batches, and as 8 that split groups."""
    one, two = pack(groups, 1000), pack(groups[:2], 1000) + pack(groups[2:], 1000)
    four = [batch for group in groups for batch in pack([group], 1000)]
    split = [batch for group in groups for batch in pack([group], 15)]
    assert [len(x) for x in (one, two, four)] == [1, 2, 4]
    assert len(split) > 5
    return [one, two, four, split]


def rl_loss(options: LossOptions) -> LossFn:
    def loss_fn(hidden: torch.Tensor, head_weight: torch.Tensor, rows: PackedBatch) -> tuple[torch.Tensor, Stats]:
        logprobs, _ = token_logprobs(hidden[rows.source], head_weight, rows.target, TEMPERATURE)
        return policy_loss(logprobs, rows, options)

    return loss_fn


def gradient(learner: Learner, batches: list[PackedBatch], loss_fn: LossFn) -> tuple[float, torch.Tensor]:
    """Loss and gradient of all parameters, end to end [N]; parameters that get none count as 0."""
    for master in learner.policy.master:
        master.grad = None
    loss, _ = learner.policy.forward_backward(batches, loss_fn)
    grads = [m.grad if m.grad is not None else torch.zeros_like(m) for m in learner.policy.master]
    return loss, torch.cat([g.flatten() for g in grads])


def assert_close(got: torch.Tensor, want: torch.Tensor) -> None:
    """To 2e-6 as a whole; single numbers to 5e-6 of the largest, as FP32 sums in another order give."""
    assert want.abs().max() > 1e-4
    assert (got - want).norm() <= 2e-6 * want.norm()
    assert (got - want).abs().max() <= 5e-6 * want.abs().max()


@pytest.fixture(scope="module")
def shared(tiny: Path) -> Learner:
    """For tests that only take gradients."""
    return Learner(tiny, GRPOConfig(), temperature=TEMPERATURE)


@pytest.mark.parametrize(
    "options",
    [
        *(LossOptions(loss_type=name) for name in ("grpo", "dr_grpo", "bnpo", "dapo")),
        LossOptions(loss_type="cispo", epsilon_high=1.2),
        LossOptions(loss_type="grpo", importance_sampling_level="sequence", epsilon=0.05, epsilon_high=0.05),
        LossOptions(loss_type="dapo", importance_sampling_correction="sequence_truncate", beta=0.1, delta=1.3),
    ],
    ids=lambda o: f"{o.loss_type}-{o.importance_sampling_level}-{o.importance_sampling_correction}",
)
def test_gradient_is_the_same_however_a_step_is_cut(shared: Learner, options: LossOptions) -> None:
    groups = make_groups(options.loss_type, active=False)
    want = None
    for batches in cuts(groups):
        noise = 0.3 * torch.randn(2, 50, generator=torch.Generator().manual_seed(0))  # rows keep their order in any cut
        prepared = []
        for batch in batches:
            logprobs = shared.logprobs(batch)
            here, noise = noise[:, : len(logprobs)], noise[:, len(logprobs) :]
            prepared.append(
                dataclasses.replace(batch, old_logprobs=logprobs + here[0], ref_logprobs=logprobs + here[1])
            )
        assert noise.shape == (2, 0)
        loss, grad = gradient(shared, prepared, rl_loss(options))
        want = want or (loss, grad)
        assert loss == pytest.approx(want[0], rel=1e-5, abs=1e-6)
        assert_close(grad, want[1])


def test_supervised_gradient_with_mtp_and_balance_loss_is_the_same_however_cut(tiny: Path) -> None:
    groups = [[dataclasses.replace(s, weight=1 / 50)] for group in make_groups() for s in group]
    learner = Learner(tiny, StageConfig(mtp_loss_weight=0.3, router_aux_loss_coef=0.1, router_bias_update_rate=0.0))
    parts = [[groups], [groups[:4], groups[4:]], [groups[:1], groups[1:5], groups[5:8], groups[8:]]]
    results = [gradient(learner, [b for p in part for b in pack(p, 1000)], nll_loss) for part in parts]
    for loss, grad in results[1:]:
        assert loss == pytest.approx(results[0][0], rel=1e-6)
        assert_close(grad, results[0][1])
    # both terms are there: without them loss and gradient are others
    plain = Learner(tiny, StageConfig(mtp_loss_weight=0.0))
    loss, grad = gradient(plain, pack(groups, 1000), nll_loss)
    assert results[0][0] > loss + 0.3
    assert (grad - results[0][1]).abs().max() > 1e-3


def test_balance_loss_does_not_depend_on_sharing_prompts(tiny: Path) -> None:
    learner = Learner(tiny, GRPOConfig(router_aux_loss_coef=1.0), temperature=TEMPERATURE)
    groups = make_groups()
    alone = pack([[s] for group in groups for s in group], 1000)
    results = [gradient(learner, batches, rl_loss(LossOptions())) for batches in [alone, *cuts(groups)]]
    for loss, grad in results[1:]:
        assert loss == pytest.approx(results[0][0], rel=1e-6)
        assert_close(grad, results[0][1])


def test_gradient_accumulates_in_float32(tiny: Path) -> None:
    """Four bfloat16 micro-batches that cancel but for a little: a bfloat16 sum would lose it."""
    learner = Learner(tiny, GRPOConfig(), dtype="bfloat16", temperature=TEMPERATURE)
    (batch,) = pack(make_groups(), 1000)
    small = dataclasses.replace(batch, advantages=batch.advantages / 4096)
    minus = dataclasses.replace(batch, advantages=-batch.advantages)
    _, want = gradient(learner, [small], rl_loss(LossOptions()))
    _, grad = gradient(learner, [batch, small, minus], rl_loss(LossOptions()))
    assert want.dtype == torch.float32
    assert (grad - want).abs().max() < 1e-3 * want.abs().max()


def test_first_update_has_ratio_one(shared: Learner) -> None:
    (batch,) = pack(make_groups(), 1000)
    explicit = dataclasses.replace(batch, old_logprobs=shared.logprobs(batch))
    for options in (LossOptions(), LossOptions(importance_sampling_level="sequence")):
        loss, grad = gradient(shared, [batch], rl_loss(options))
        _, same = gradient(shared, [explicit], rl_loss(options))
        assert_close(same, grad)
        # ratio 1: the loss is minus the weighted advantages
        assert loss == pytest.approx(-float((batch.weights * batch.advantages).sum()), abs=1e-6)
    _, plain = gradient(shared, [batch], lambda h, w, b: (-(logprobs_of(h, w, b) * b.weights * b.advantages).sum(), {}))
    assert_close(gradient(shared, [batch], rl_loss(LossOptions()))[1], plain)


def logprobs_of(hidden: torch.Tensor, head_weight: torch.Tensor, rows: PackedBatch) -> torch.Tensor:
    return token_logprobs(hidden[rows.source], head_weight, rows.target, TEMPERATURE)[0]


@pytest.mark.parametrize("loss_type", ["grpo", "dr_grpo", "dapo", "cispo"])
def test_equal_rewards_give_no_gradient(shared: Learner, loss_type: Any) -> None:
    groups = make_groups(loss_type)
    advantages = group_advantages(np.full((1, 4), 0.3))[0]
    dull = [dataclasses.replace(s, advantage=float(a)) for s, a in zip(groups[3], advantages)]
    _, grad = gradient(shared, pack([dull], 1000), rl_loss(LossOptions(loss_type=loss_type)))
    assert not grad.any()


def test_old_logprobs_are_from_before_the_first_update(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = GRPOConfig(num_iterations=2, minibatches_per_step=2, prompts_per_step=4, learning_rate=1e-2)
    learner = Learner(tiny, config, temperature=TEMPERATURE)
    groups = make_groups()
    minibatches = [pack(groups[:2], 30), pack(groups[2:], 1000)]
    assert [len(m) for m in minibatches] == [2, 1]
    before = [learner.logprobs(batch) for batches in minibatches for batch in batches]
    calls: list[tuple[torch.Tensor, torch.Tensor]] = []

    def spy(logprobs: torch.Tensor, batch: PackedBatch, options: LossOptions) -> tuple[torch.Tensor, Stats]:
        assert batch.old_logprobs is not None
        calls.append((logprobs.detach(), batch.old_logprobs))
        return policy_loss(logprobs, batch, options)

    monkeypatch.setattr(learner_module, "policy_loss", spy)
    stats = learner.step(minibatches)
    assert len(calls) == 6
    for (now, old), want, update in zip(calls, before * 2, [0, 0, 1, 2, 2, 3]):
        assert torch.equal(old, want)
        assert torch.allclose(now, want, atol=1e-5) == (update == 0)
    assert (learner.updates, learner.policy_version, stats.policy_version) == (4, 1, 1)
    assert stats.metrics["clip_ratio/region_mean"] > 0


def test_the_first_update_takes_no_old_logprobs(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    learner = Learner(tiny, GRPOConfig(minibatches_per_step=2), temperature=TEMPERATURE)
    groups = make_groups()
    second = pack(groups[2:], 1000)
    want = [learner.logprobs(batch) for batch in second]
    original, passes = learner.logprobs, []
    monkeypatch.setattr(learner, "logprobs", lambda *given: (passes.append(given), original(*given))[1])
    old: list[torch.Tensor | None] = []

    def spy(logprobs: torch.Tensor, batch: PackedBatch, options: LossOptions) -> tuple[torch.Tensor, Stats]:
        old.append(batch.old_logprobs)
        return policy_loss(logprobs, batch, options)

    monkeypatch.setattr(learner_module, "policy_loss", spy)
    learner.step([pack(groups[:2], 1000), second])
    assert len(passes) == 1 and old[0] is None and old[1] is not None and torch.equal(old[1], want[0])


def test_a_single_update_takes_no_old_logprobs(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    learner = Learner(tiny, GRPOConfig(), temperature=TEMPERATURE)
    monkeypatch.setattr(learner, "logprobs", lambda *_: pytest.fail("a pass was spent on old log-probabilities"))
    metrics = learner.step([cuts(make_groups())[1]]).metrics
    assert metrics["clip_ratio/region_mean"] == 0
    assert metrics["grad_norm"] > 0


def test_learning_rates(tiny: Path) -> None:
    learner = Learner(tiny, GRPOConfig())

    def rates(updates: list[int], **changes: Any) -> list[float]:
        base: dict[str, Any] = {"max_steps": 10, "learning_rate": 2.0, "warmup_steps": 2}
        learner.config = GRPOConfig(**base | changes)
        return [learner.learning_rate(u) for u in updates]

    assert rates([0, 1, 2, 9, 50]) == [1.0, 2.0, 2.0, 2.0, 2.0]
    linear = rates([0, 2, 4, 6, 10, 50], lr_scheduler_type="linear")
    assert linear == pytest.approx([1.0, 2.0, 2 * (0.1 + 0.9 * 0.75), 2 * (0.1 + 0.9 * 0.5), 0.2, 0.2])
    cosine = rates([2, 4, 6, 10], lr_scheduler_type="cosine", lr_end_ratio=0.0)
    assert cosine == pytest.approx([2.0, 1 + 0.5**0.5, 1.0, 0.0])
    # steps, not updates: with 4 updates a step the warm-up takes 8
    many = {"num_iterations": 2, "minibatches_per_step": 2}
    assert rates([0, 7, 8, 39], **many) == pytest.approx([0.25, 2.0, 2.0, 2.0])
    assert rates([24], lr_scheduler_type="linear", **many) == pytest.approx([2 * (0.1 + 0.9 * 0.5)])
    assert rates([0], warmup_steps=0) == [2.0]


def test_the_schedule_reaches_the_optimizer(tiny: Path) -> None:
    """AdamW's first update moves every weight that has a gradient by the learning rate."""
    config = GRPOConfig(learning_rate=1e-3, warmup_steps=4, max_steps=10)
    learner = Learner(tiny, config, temperature=TEMPERATURE)
    before = learner.policy.model.lm_head.weight.detach().clone()
    metrics = learner.step([pack(make_groups(), 1000)]).metrics
    moved = (learner.policy.model.lm_head.weight - before).abs().median().item()
    assert metrics["learning_rate"] == pytest.approx(2.5e-4)
    assert moved == pytest.approx(2.5e-4, rel=0.01)


def everything(learner: Learner) -> dict[str, torch.Tensor]:
    state = {f"model {name}": tensor.clone() for name, tensor in learner.policy.model.state_dict().items()}
    for name, master in zip(learner.policy.names, learner.policy.master):
        state[f"master {name}"] = master.detach().clone()
        state |= {f"{key} {name}": value.clone() for key, value in learner.optimizer.state.get(master, {}).items()}
    return state


@pytest.mark.parametrize(("dtype", "moments"), [("float32", "float32"), ("bfloat16", "float32"), ("bfloat16",) * 2])
def test_resume_is_bit_equal(tiny: Path, tmp_path: Path, dtype: str, moments: Literal["float32", "bfloat16"]) -> None:
    config = GRPOConfig(
        learning_rate=1e-3,
        adam_moment_dtype=moments,
        warmup_steps=5,
        weight_decay=0.1,
        num_iterations=2,
        router_policy="update",
        router_bias_update_rate=0.01,
        mtp_loss_weight=0.1,
    )
    learner = Learner(tiny, config, dtype=dtype, temperature=TEMPERATURE)
    steps = [[batches] for batches in cuts(make_groups())[:3]]
    fresh = Learner(tiny, config, dtype=dtype, temperature=TEMPERATURE)
    want = check_resume(learner, fresh, steps, everything, tmp_path)
    assert learner.updates == 6
    assert {str(v.dtype) for name, v in want.items() if name.startswith("exp_avg_sq")} == {f"torch.{moments}"}


@pytest.mark.parametrize("moments", ["float32", "bfloat16"])
def test_a_resume_may_change_the_dtype_of_moments(
    tiny: Path, tmp_path: Path, moments: Literal["float32", "bfloat16"]
) -> None:
    config = GRPOConfig(learning_rate=1e-3, adam_moment_dtype="float32" if moments == "bfloat16" else "bfloat16")
    first, second, *_ = cuts(make_groups())
    learner = Learner(tiny, config, temperature=TEMPERATURE)
    learner.step([first])
    learner.save(tmp_path)
    resumed = Learner(tiny, config.model_copy(update={"adam_moment_dtype": moments}), temperature=TEMPERATURE)
    resumed.load(tmp_path)
    for one in (learner, resumed):
        one.step([second])
    states = [next(iter(one.optimizer.state.values()))["exp_avg_sq"] for one in (learner, resumed)]
    assert states[1].dtype == getattr(torch, moments)
    torch.testing.assert_close(states[1].float(), states[0].float(), rtol=2**-6, atol=1e-30)


def test_load_refuses_a_plain_model(tiny: Path) -> None:
    with pytest.raises(ValueError, match="no training checkpoint"):
        Learner(tiny, GRPOConfig()).load(tiny)


def test_master_weights_move_where_bfloat16_would_not(tiny: Path) -> None:
    learner = Learner(tiny, GRPOConfig(learning_rate=1e-5), dtype="bfloat16", temperature=TEMPERATURE)
    assert {m.dtype for m in learner.policy.master} == {torch.float32}
    assert {p.dtype for p in learner.policy.parameters} == {torch.bfloat16}
    norm = learner.policy.names.index("model.norm.weight")  # 1: in bfloat16 the next number is 1 - 1 / 256
    for step in range(1, 4):
        learner.step([pack(make_groups(), 1000)])
        master = learner.policy.master[norm]
        assert (master - 1).abs().median().item() == pytest.approx(step * 1e-5, rel=0.3)
        assert torch.equal(learner.policy.parameters[norm], torch.ones(128, dtype=torch.bfloat16))
    for master, parameter in zip(learner.policy.master, learner.policy.parameters):
        assert torch.equal(parameter, master.bfloat16())


def test_kl_to_the_reference(tiny: Path) -> None:
    config = GRPOConfig(beta=0.1, learning_rate=1e-2)
    learner = Learner(tiny, config, temperature=TEMPERATURE)
    (batch,) = pack(make_groups(), 1000)
    start = learner.logprobs(batch)
    assert learner.step([[batch]]).metrics["kl"] == 0
    assert learner.reference is not None
    assert torch.equal(learner.logprobs(batch, learner.reference), start)
    difference = start - learner.logprobs(batch)
    want = (difference.exp() - difference - 1).mean().item()
    assert learner.step([[batch]]).metrics["kl"] == pytest.approx(want, rel=1e-4)
    assert want > 1e-3


def test_a_gradient_that_is_not_finite_never_reaches_the_weights(tiny: Path) -> None:
    learner = Learner(tiny, GRPOConfig(learning_rate=1e-3, router_policy="update"))
    before = everything(learner)

    def broken(hidden: torch.Tensor, head_weight: torch.Tensor, rows: PackedBatch) -> tuple[torch.Tensor, Stats]:
        return (hidden.sum() * head_weight.sum()) * float("nan"), {}

    with pytest.raises(ValueError, match="gradient norm of update 0 is nan"):
        learner.update(pack(make_groups(), 1000), broken)
    assert all(torch.equal(before[name], value) for name, value in everything(learner).items())
    assert all(master.grad is None for master in learner.policy.master)


def test_gradients_in_bfloat16_do_not_pile_up(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each goes to its FP32 master as soon as it is there, and masters get the sum of the micro-batches' gradients."""
    learner = Learner(tiny, GRPOConfig(), dtype="bfloat16", temperature=TEMPERATURE)
    policy, batches, loss_fn = learner.policy, pack(make_groups(), 40), rl_loss(LossOptions())
    want = [torch.zeros_like(master) for master in policy.master]
    for batch in batches:
        loss, _ = policy._loss(batch, loss_fn, 1, 1)
        for total, grad in zip(want, torch.autograd.grad(loss, policy.parameters, allow_unused=True)):
            if grad is not None:
                total += grad.float()
    held, collect = [], policy_module._collect

    def counted(master: torch.Tensor, parameter: torch.Tensor) -> None:
        held.append(sum(p.grad is not None for p in policy.parameters))
        collect(master, parameter)

    monkeypatch.setattr(policy_module, "_collect", counted)
    policy.forward_backward(batches, loss_fn)
    # none of what was added where it was computed
    assert set(held) == {0, 1} and len(held) > len(policy.parameters) and len(batches) > 1
    assert all(parameter.grad is None for parameter in policy.parameters)
    for name, master, total in zip(policy.names, policy.master, want):
        assert torch.equal(total, torch.zeros_like(total) if master.grad is None else master.grad), name
