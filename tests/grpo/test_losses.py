"""Losses against numbers worked out by hand, and against TRL 1.16's formulas on padded rows."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch

from grpo.losses import LossOptions, kl_divergence, policy_loss, token_weights
from grpo.records import PackedBatch

LOSSES = ("grpo", "dr_grpo", "bnpo", "dapo", "cispo")
CORRECTIONS = ("none", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask")
MAX_LENGTH = 10
# Two samples, of 2 and 3 tokens, with the ratios 1.5 (clipped: advantage 2 > 0), 0.9 and 1.1, 0.5 (not clipped: the
# minimum takes the lower of -0.5 and -0.8, which is the clipped one), 1.
LENGTHS = np.array([2, 3])
OLD = torch.tensor([-1.0, -2.0, -0.5, -1.5, -0.7])
RATIO = torch.tensor([1.5, 0.9, 1.1, 0.5, 1.0])


def rows(loss_type: str, lengths: np.ndarray = LENGTHS, active: Any = None, **fields: Any) -> PackedBatch:
    """What policy_loss reads of a batch; the packed row itself is left empty."""
    active = np.ones(len(lengths), dtype=bool) if active is None else np.array(active)
    weights = token_weights(lengths, loss_type, MAX_LENGTH, active)
    count, nothing = int(lengths.sum()), torch.zeros(0, dtype=torch.int64)
    given: dict[str, Any] = {
        "advantages": torch.tensor([2.0, 2.0, -1.0, -1.0, -1.0]) if count == 5 else torch.zeros(count),
        "old_logprobs": OLD,
        "rollout_logprobs": torch.zeros(count),
        "log_support": torch.zeros(count),
    } | fields
    return PackedBatch(
        *[nothing] * 6,
        sample=torch.from_numpy(np.repeat(np.arange(len(lengths)), lengths)),
        weights=torch.from_numpy(np.repeat(weights, lengths)).float(),
        num_samples=len(lengths),
        **given,
    )


def loss_and_grad(logprobs: torch.Tensor, batch: PackedBatch, **options: Any) -> tuple[float, torch.Tensor, dict]:
    logprobs = logprobs.detach().clone().requires_grad_()
    loss, stats = policy_loss(logprobs, batch, LossOptions(**options))
    loss.backward()
    assert logprobs.grad is not None
    return loss.item(), logprobs.grad, stats


# per token: -min(1.5 * 2, 1.2 * 2), -0.9 * 2, -min(-1.1, -1.1), -min(-0.5, -0.8), 1
BY_HAND = (-2.4, -1.8, 1.1, 0.8, 1.0)
# d loss / d logprob of an unclipped token is -advantage * ratio; 0 where the clipped branch is the minimum
GRAD_BY_HAND = (0.0, -1.8, 1.1, 0.0, 1.0)


@pytest.mark.parametrize(
    ("loss_type", "weights"),
    [
        ("grpo", (1 / 4, 1 / 4, 1 / 6, 1 / 6, 1 / 6)),  # mean over 2 samples of token means
        ("dr_grpo", (1 / 20,) * 5),  # 2 samples times MAX_LENGTH
        ("bnpo", (1 / 5,) * 5),
        ("dapo", (1 / 5,) * 5),
    ],
)
def test_clipped_losses(loss_type: str, weights: tuple[float, ...]) -> None:
    loss, grad, stats = loss_and_grad(OLD + RATIO.log(), rows(loss_type), loss_type=loss_type)
    assert loss == pytest.approx(sum(w * x for w, x in zip(weights, BY_HAND)), abs=1e-6)
    assert grad.tolist() == pytest.approx([w * g for w, g in zip(weights, GRAD_BY_HAND)], abs=1e-6)
    assert [int(stats[f"sum/{key}"]) for key in ("tokens", "rows", "clip_low", "clip_high")] == [5, 5, 1, 1]


def test_cispo() -> None:
    # the cap is epsilon_high itself; the gradient flows through log-probabilities, also of capped tokens
    batch = rows("cispo")
    logprobs = OLD + RATIO.log()
    loss, grad, stats = loss_and_grad(logprobs, batch, loss_type="cispo", epsilon_high=1.05)
    factors = [-1.05 * 2 / 5, -0.9 * 2 / 5, 1.05 / 5, 0.5 / 5, 1.0 / 5]
    assert loss == pytest.approx(sum(f * x for f, x in zip(factors, logprobs.tolist())), abs=1e-6)
    assert grad.tolist() == pytest.approx(factors, abs=1e-6)
    assert [int(stats["sum/clip_low"]), int(stats["sum/clip_high"])] == [0, 1]


def test_gspo() -> None:
    # sequence ratios: sqrt(1.5 * 0.9), clipped at 1.1; cbrt(1.1 * 0.5 * 1) = 0.8193, not clipped below 0.7
    first, second = math.sqrt(1.35), 0.55 ** (1 / 3)
    options = {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": 0.3, "epsilon_high": 0.1}
    loss, grad, stats = loss_and_grad(OLD + RATIO.log(), rows("grpo"), **options)
    assert loss == pytest.approx((-1.1 * 2 + second) / 2, abs=1e-6)
    # every token of the second sample moves the ratio by a third; the first sample is clipped
    assert grad.tolist() == pytest.approx([0, 0, second / 6, second / 6, second / 6], abs=1e-6)
    assert [int(stats["sum/clip_low"]), int(stats["sum/clip_high"])] == [0, 2]
    loss, grad, _ = loss_and_grad(OLD + RATIO.log(), rows("grpo"), **options | {"epsilon_high": 0.2})
    assert loss == pytest.approx((-first * 2 + second) / 2, abs=1e-6)
    assert grad.tolist() == pytest.approx([-first / 2] * 2 + [second / 6] * 3, abs=1e-6)


def test_clip_higher() -> None:
    for epsilon_high, clipped in ((0.28, 1.28), (0.6, 1.5)):
        loss, _, _ = loss_and_grad(OLD + RATIO.log(), rows("dapo"), epsilon_high=epsilon_high)
        assert loss == pytest.approx((-clipped * 2 + sum(BY_HAND[1:])) / 5, abs=1e-6)
    loss, _, _ = loss_and_grad(OLD + RATIO.log(), rows("dapo"), epsilon=0.6)  # the fourth ratio, 0.5, is inside now
    assert loss == pytest.approx((-2.4 - 1.8 + 1.1 + 0.5 + 1.0) / 5, abs=1e-6)


def test_dual_clip_bounds_negative_advantages_only() -> None:
    ratio = torch.tensor([6.0, 0.9, 6.0, 2.0, 1.0])
    loss, grad, _ = loss_and_grad(OLD + ratio.log(), rows("dapo"), delta=4.0)
    assert loss == pytest.approx((-2.4 - 1.8 + 4.0 + 2.0 + 1.0) / 5, abs=1e-6)
    assert grad.tolist() == pytest.approx([0, -0.36, 0, 0.4, 0.2], abs=1e-6)
    without, _, _ = loss_and_grad(OLD + ratio.log(), rows("dapo"))
    assert without == pytest.approx((-2.4 - 1.8 + 6.0 + 2.0 + 1.0) / 5, abs=1e-5)


def test_kl_estimators() -> None:
    logprobs, ref = torch.tensor([-1.0, -2.0]), torch.tensor([-1.5, -1.0])
    assert kl_divergence(logprobs, ref, "k1").tolist() == pytest.approx([0.5, -1.0])
    assert kl_divergence(logprobs, ref, "k2").tolist() == pytest.approx([0.125, 0.5])
    want = [math.exp(-0.5) + 0.5 - 1, math.exp(1.0) - 1.0 - 1]
    assert kl_divergence(logprobs, ref, "k3").tolist() == pytest.approx(want)


def test_kl_term_is_weighted_and_counted() -> None:
    logprobs = OLD + RATIO.log()
    batch = rows("dapo", ref_logprobs=logprobs - 0.5)
    kl = math.exp(-0.5) + 0.5 - 1
    plain, _, _ = loss_and_grad(logprobs, batch)
    loss, grad, stats = loss_and_grad(logprobs, batch, beta=0.04)
    assert loss == pytest.approx(plain + 0.04 * kl, abs=1e-6)
    assert float(stats["sum/kl"]) == pytest.approx(5 * kl, abs=1e-5)
    # d k3 / d logprob = 1 - exp(ref - logprob), no matter whether the token is clipped
    assert grad[0].item() == pytest.approx(0.04 * (1 - math.exp(-0.5)) / 5, abs=1e-7)


@pytest.mark.parametrize(
    ("correction", "factors"),
    [
        ("token_truncate", (2.0, 0.5, 3.0, 0.5, 2.0)),
        ("token_mask", (2.0, 0.5, 0.0, 0.5, 2.0)),
        ("sequence_truncate", (1.0, 1.0, 3.0, 3.0, 3.0)),
        ("sequence_mask", (1.0, 1.0, 0.0, 0.0, 0.0)),
    ],
)
@pytest.mark.parametrize("correct_truncation", [False, True])
def test_corrections(correction: str, factors: tuple[float, ...], correct_truncation: bool) -> None:
    weight = torch.tensor([2.0, 0.5, 4.0, 0.5, 2.0])  # old over rollout; sequences 1 and 4; the cap is 3
    support = torch.tensor([-0.1, -0.2, -0.3, -0.4, -0.5])
    # the probability a token was drawn with is exp(logprob - log_support)
    reported = OLD - weight.log() + (support if correct_truncation else 0)
    batch = rows("dapo", rollout_logprobs=reported, log_support=support)
    options = {"importance_sampling_correction": correction, "correct_truncation": correct_truncation}
    loss, grad, stats = loss_and_grad(OLD + RATIO.log(), batch, **options)
    assert loss == pytest.approx(sum(f * x for f, x in zip(factors, BY_HAND)) / 5, abs=1e-6)
    assert grad.tolist() == pytest.approx([f * g / 5 for f, g in zip(factors, GRAD_BY_HAND)], abs=1e-6)
    assert float(stats["sum/is_ratio"]) == pytest.approx(sum(factors), abs=1e-5)
    difference = (OLD - reported).abs()
    assert float(stats["max/logp_difference"]) == pytest.approx(difference.max().item())
    assert float(stats["sum/logp_difference"]) == pytest.approx(difference.sum().item(), abs=1e-5)


def test_corrections_use_the_current_policy_where_there_are_no_old_logprobs() -> None:
    logprobs = OLD + RATIO.log()
    batch = rows("dapo", old_logprobs=None, rollout_logprobs=logprobs - math.log(2.0))
    _, grad, _ = loss_and_grad(logprobs, batch, importance_sampling_correction="token_truncate")
    # a constant for the gradient: twice that of ratio 1
    assert grad.tolist() == pytest.approx([-0.8, -0.8, 0.4, 0.4, 0.4], abs=1e-6)


def test_masked_samples_weigh_nothing() -> None:
    lengths, active = np.array([2, 4, 3]), np.array([True, False, True])
    want = {
        "grpo": [1 / 6, 0, 1 / 9],  # sample means divide by all three
        "dr_grpo": [1 / 30, 0, 1 / 30],
        "bnpo": [1 / 5, 0, 1 / 5],  # token means by the tokens that take part
        "dapo": [1 / 5, 0, 1 / 5],
        "cispo": [1 / 5, 0, 1 / 5],
    }
    for loss_type, weights in want.items():
        got = token_weights(lengths, loss_type, MAX_LENGTH, active)
        assert got.tolist() == pytest.approx(weights), loss_type
    assert token_weights(lengths, "dapo", MAX_LENGTH, ~np.ones(3, dtype=bool)).tolist() == [0, 0, 0]


@pytest.mark.parametrize("loss_type", LOSSES)
def test_masked_tokens_do_not_matter_even_if_not_finite(loss_type: str) -> None:
    fields: dict[str, Any] = {"rollout_logprobs": OLD, "ref_logprobs": OLD - 0.1}
    for level, correction, bad in itertools.product(
        ("token", "sequence"), CORRECTIONS, (math.nan, math.inf, -math.inf)
    ):
        options: dict[str, Any] = {
            "loss_type": loss_type,
            "importance_sampling_level": level,
            "importance_sampling_correction": correction,
            "beta": 0.1,
        }
        clean = loss_and_grad(OLD + RATIO.log(), rows(loss_type, active=[True, False], **fields), **options)
        for name in ("rollout_logprobs", "ref_logprobs", "old_logprobs", "advantages"):
            batch = rows(loss_type, active=[True, False], **fields)
            spoiled = getattr(batch, name) + torch.tensor([0.0, 0.0, bad, bad, bad])
            loss, grad, stats = loss_and_grad(
                OLD + RATIO.log(), dataclasses.replace(batch, **{name: spoiled}), **options
            )
            assert (loss, grad.tolist()) == (clean[0], clean[1].tolist()), (name, options)
            for key in {"sum/tokens", "sum/clip_low", "sum/clip_high", "sum/kl", "sum/is_ratio"} & set(stats):
                assert stats[key].item() == clean[2][key].item(), (name, key, options)


def padded_trl_loss(
    logps: torch.Tensor, x: dict[str, torch.Tensor], mask: torch.Tensor, o: LossOptions
) -> torch.Tensor:
    """TRL 1.16's GRPOTrainer._compute_loss on [B, L], with its importance_sampling_ratio."""
    advantages = x["advantages"][:, None]
    log_ratio = logps - x["old"]
    if o.importance_sampling_level == "sequence":
        log_ratio = ((log_ratio * mask).sum(-1) / mask.sum(-1).clamp(min=1.0))[:, None]
    coef_1 = log_ratio.exp()
    if o.loss_type == "cispo":
        per_token = -coef_1.clamp(max=o.epsilon_high).detach() * advantages * logps
    else:
        coef_2 = coef_1.clamp(1 - o.epsilon, 1 + o.epsilon_high)
        if o.delta is not None:
            coef_1 = coef_1.clamp(max=o.delta)
        per_token = -torch.min(coef_1 * advantages, coef_2 * advantages)
    if o.importance_sampling_correction != "none":
        difference = (x["old"] - x["rollout"]) * mask
        if o.importance_sampling_correction.startswith("sequence"):
            difference = difference.sum(-1, keepdim=True)
        ratio = difference.exp()
        if o.importance_sampling_correction.endswith("truncate"):
            ratio = ratio.clamp(max=o.importance_sampling_cap)
        else:
            ratio = ratio.masked_fill(ratio > o.importance_sampling_cap, 0.0)
        per_token = per_token * ratio
    if o.beta != 0.0:
        per_token = per_token + o.beta * (torch.exp(x["ref"] - logps) - (x["ref"] - logps) - 1)
    if o.loss_type == "grpo":
        return ((per_token * mask).sum(-1) / mask.sum(-1).clamp(min=1.0)).mean()
    if o.loss_type == "dr_grpo":
        return (per_token * mask).sum() / (len(mask) * MAX_LENGTH)
    return (per_token * mask).sum() / mask.sum().clamp(min=1.0)


@pytest.mark.parametrize("loss_type", LOSSES)
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_equals_trl_on_padded_rows(loss_type: Any, level: Any) -> None:
    generator = torch.Generator().manual_seed(3)
    lengths = np.array([4, 7, 1, 3, 5, 2])
    real = torch.arange(7) < torch.from_numpy(lengths)[:, None]  # [B, L]
    for correction, delta, beta, truncated in itertools.product(CORRECTIONS, (None, 1.5), (0.0, 0.1), (False, True)):
        active = np.array([True, True, True, not truncated, True, True])
        mask = real.float() * torch.from_numpy(active)[:, None]  # TRL masks truncated completions here
        old = -3 * torch.rand(6, 7, generator=generator)
        noise = {
            k: s * torch.randn(6, 7, generator=generator) for k, s in {"now": 0.5, "ref": 0.5, "rollout": 1}.items()
        }
        padded = {"old": old, "ref": old + noise["ref"], "rollout": old + noise["rollout"]}
        padded["advantages"] = torch.randn(6, generator=generator)
        options = LossOptions(
            loss_type=loss_type,
            epsilon_high=0.28,
            delta=delta,
            beta=beta,
            importance_sampling_level=level,
            importance_sampling_correction=correction,
            importance_sampling_cap=2.0,
        )
        want_logps = (old + noise["now"]).requires_grad_()
        want = padded_trl_loss(want_logps, padded, mask, options)
        (want_grad,) = torch.autograd.grad(want, want_logps)
        batch = rows(
            loss_type,
            lengths,
            active,
            advantages=padded["advantages"].repeat_interleave(torch.from_numpy(lengths)),
            old_logprobs=old[real],
            ref_logprobs=padded["ref"][real],
            rollout_logprobs=padded["rollout"][real],
        )
        logprobs = (old + noise["now"])[real].requires_grad_()
        loss, _ = policy_loss(logprobs, batch, options)
        (grad,) = torch.autograd.grad(loss, logprobs)
        torch.testing.assert_close(loss, want, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(grad, want_grad[real], rtol=1e-5, atol=1e-6)
        assert grad.abs().max() > 0
