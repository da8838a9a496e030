"""Advantages against numbers worked out by hand."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
import pytest

from grpo.advantages import group_advantages, group_std, normalized_then_summed, zero_variance

NAN = float("nan")
Estimator = Literal["grpo", "rloo"]
Scale = Literal["group", "batch", "none"]


def test_mean_and_unbiased_deviation() -> None:
    # group 0: mean 0.25, deviations -0.25 (3x), 0.75; sum of squares 0.75, / 3 = 0.25, std 0.5
    # group 1: mean 2.5, deviations -1.5, -0.5, 0.5, 1.5; sum of squares 5, / 3, std sqrt(5 / 3)
    rewards = np.array([[0.0, 0.0, 0.0, 1.0], [1.0, 2.0, 3.0, 4.0]])
    first, second = 0.5 + 1e-4, math.sqrt(5 / 3) + 1e-4
    want = [
        [-0.25 / first, -0.25 / first, -0.25 / first, 0.75 / first],
        [-1.5 / second, -0.5 / second, 0.5 / second, 1.5 / second],
    ]
    np.testing.assert_allclose(group_advantages(rewards), want, rtol=1e-12)
    np.testing.assert_allclose(group_std(rewards), [0.5, math.sqrt(5 / 3)], rtol=1e-12)


def test_rloo_is_the_reward_minus_the_mean_of_the_others() -> None:
    rewards = np.array([[1.0, 2.0, 6.0, 3.0]])
    want = [[1 - 11 / 3, 2 - 10 / 3, 6 - 6 / 3, 3 - 9 / 3]]
    np.testing.assert_allclose(group_advantages(rewards, "rloo", "none"), want, rtol=1e-12)
    # the deviation is that of the rewards: mean 3, deviations -2, -1, 3, 0; 14 / 3
    scaled = np.array(want) / (math.sqrt(14 / 3) + 1e-4)
    np.testing.assert_allclose(group_advantages(rewards, "rloo", "group"), scaled, rtol=1e-12)


def test_scales() -> None:
    rewards = np.array([[0.0, 2.0], [4.0, 6.0]])
    np.testing.assert_allclose(group_advantages(rewards, scale="none"), [[-1, 1], [-1, 1]], rtol=1e-12)
    group = 1 / (math.sqrt(2) + 1e-4)
    np.testing.assert_allclose(group_advantages(rewards, scale="group"), [[-group, group]] * 2, rtol=1e-12)
    # all four: mean 3, deviations -3, -1, 1, 3; 20 / 3
    batch = 1 / (math.sqrt(20 / 3) + 1e-4)
    np.testing.assert_allclose(group_advantages(rewards, scale="batch"), [[-batch, batch]] * 2, rtol=1e-12)


@pytest.mark.parametrize("estimator", ["grpo", "rloo"])
@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_unscored_samples_are_as_if_absent(estimator: Estimator, scale: Scale) -> None:
    rewards = np.array([[NAN, 1.0, 3.0, NAN, 8.0], [2.0, NAN, 2.5, 0.5, NAN]])
    got = group_advantages(rewards, estimator, scale)
    without = group_advantages(np.array([[1.0, 3.0, 8.0], [2.0, 2.5, 0.5]]), estimator, scale)
    assert np.isnan(got).tolist() == np.isnan(rewards).tolist()
    np.testing.assert_allclose(got[~np.isnan(rewards)].reshape(2, 3), without, rtol=1e-12)


def test_unscored_sample_by_hand() -> None:
    got = group_advantages(np.array([[1.0, NAN, 3.0]]), scale="none")
    np.testing.assert_array_equal(got, [[-1.0, NAN, 1.0]])


@pytest.mark.parametrize("estimator", ["grpo", "rloo"])
@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_equal_rewards_give_exactly_zero(estimator: Estimator, scale: Scale) -> None:
    # 0.1 summed seven times and divided is not 0.1 again
    rewards = np.array([[0.1] * 7, [0.1, NAN, 0.1, 0.1, 0.1, 0.1, 0.1], [0.7] * 7])
    got = group_advantages(rewards, estimator, scale)
    np.testing.assert_array_equal(got, np.where(np.isnan(rewards), NAN, 0.0))
    assert zero_variance(rewards).tolist() == [True, True, True]


@pytest.mark.parametrize("estimator", ["grpo", "rloo"])
@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_one_scored_sample_has_nothing_to_compare_with(estimator: Estimator, scale: Scale) -> None:
    rewards = np.array([[NAN, 5.0, NAN], [NAN, NAN, NAN]])
    with np.errstate(all="raise"):
        got = group_advantages(rewards, estimator, scale)
    np.testing.assert_array_equal(got, [[NAN, 0.0, NAN], [NAN, NAN, NAN]])
    assert zero_variance(rewards).tolist() == [True, True]
    assert group_std(rewards).tolist() == [0.0, 0.0]


def test_zero_variance_looks_at_scored_rewards_only() -> None:
    rewards = np.array([[1.0, 1.0, NAN], [1.0, 0.0, NAN], [0.0, 1.0, 1.0]])
    assert zero_variance(rewards).tolist() == [True, False, False]


def test_normalising_each_reward_first_keeps_its_say() -> None:
    # in the sum, the length penalty of -100 .. 0 drowns correctness; normalised first, the two weigh 1 : 0.5
    right = np.array([[1.0, 0.0], [0.0, 0.0]])
    length = np.array([[-100.0, 0.0], [-50.0, NAN]])
    first = 0.5 / (math.sqrt(0.5) + 1e-4) - 0.5 * 50 / (50 * math.sqrt(2) + 1e-4)  # right, but longer
    raw = np.array([[first, -first], [0.0, 0.0]])
    expected = raw / (raw.std(ddof=1) + 1e-4)
    got = normalized_then_summed([right, length], [1.0, 0.5])
    np.testing.assert_allclose(got, expected, rtol=1e-6)
    assert got[0, 0] > 0 > group_advantages(right + 0.5 * np.nan_to_num(length))[0, 0]


def test_a_sample_that_no_reward_applies_to_stays_out() -> None:
    got = normalized_then_summed([np.array([[1.0, 0.0, NAN]]), np.array([[NAN, 2.0, NAN]])], [1.0, 1.0])
    assert math.isnan(got[0, 2]) and got[0, 0] == -got[0, 1] > 0
