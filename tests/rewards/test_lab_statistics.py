"""The lab's statistics against numbers worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from rewards.lab import bootstrap, classification, group_signal, ranking
from rewards.lab.answers import final_answer


def array(*values: float) -> np.ndarray:
    return np.array(values, dtype=float)


def flags(text: str) -> np.ndarray:
    return np.array([character == "1" for character in text])


# ---- accept or reject


def test_rates_by_hand() -> None:
    got = classification.rates(6, 1, 2, 3)
    want = {"accuracy": 9 / 12, "fpr": 1 / 4, "fnr": 2 / 8, "precision": 6 / 7, "youden_j": 0.5}
    assert {key: float(got[key]) for key in want} == pytest.approx(want)
    assert float(got["mcc"]) == pytest.approx((6 * 3 - 1 * 2) / math.sqrt(7 * 8 * 4 * 5))
    assert math.isnan(classification.rates(3, 0, 0, 0)["fpr"])  # nothing wrong was there to be paid


def test_outcomes_are_counted_in_the_order_tp_fp_fn_tn() -> None:
    assert classification.outcomes(flags("1100"), flags("1010")).sum(0).tolist() == [1, 1, 1, 1]
    assert classification.outcomes(flags("111"), flags("110")).sum(0).tolist() == [2, 1, 0, 0]


def test_kappa_and_mcnemar_by_hand() -> None:
    # agreement 0.7; chance 0.5 * 0.6 + 0.5 * 0.4 = 0.5
    assert classification.kappa(20, 5, 10, 15) == pytest.approx(0.4)
    assert math.isnan(classification.kappa(9, 0, 0, 0))
    assert classification.mcnemar(1, 5) == pytest.approx(2 * (1 + 6) / 2**6)
    assert classification.mcnemar(0, 0) == 1.0 and classification.mcnemar(3, 3) == 1.0
    assert classification.mcnemar(900, 1100) == pytest.approx(math.erfc(199 / math.sqrt(2000) / math.sqrt(2)))


def test_best_threshold_is_the_lowest_of_the_best() -> None:
    assert classification.best_threshold(array(1, 2, 3, 4), flags("0011")) == 3
    assert classification.best_threshold(array(1, 2, 3), flags("111")) == 1


# ---- ranking


def test_auc_counts_ties_half_and_weights_draws() -> None:
    values, right = array(1, 2, 2, 3), flags("0011")
    assert float(ranking.auc(values, right)) == pytest.approx((2 + 1.5) / 4)
    weights = np.array([[1, 1, 1, 1], [0, 1, 1, 0], [1, 1, 0, 0]], dtype=float)
    drawn = ranking.auc(values, right, weights)
    assert drawn[:2].tolist() == pytest.approx([0.875, 0.5]) and np.isnan(drawn[2])


def test_roc_goes_from_corner_to_corner() -> None:
    assert ranking.roc(array(3, 2, 2, 1), flags("1010")) == [[0, 0], [0, 0.5], [0.5, 1.0], [1.0, 1.0]]
    assert ranking.roc(array(1, 2), flags("11")) == []


def test_pairs_within_groups() -> None:
    #            group 0: labels 1 0 0 | group 1: labels 1 1 (no pair) | group 2: grades 3 2 1
    values = array(0.5, 0.5, 0.1, 1, 0, 9, 5, 7)
    labels = array(1, 0, 0, 1, 1, 3, 2, 1)
    group = np.array([0, 0, 0, 1, 1, 2, 2, 2])
    assert ranking.pair_counts(values, labels, group, 3).tolist() == [[2, 1, 1], [0, 0, 0], [3, 2, 0]]


def test_best_of_n_is_exact() -> None:
    values, labels = array(1, 2, 3), array(0, 1, 0)
    # pairs {1,2} -> label 1, {1,3} -> 0, {2,3} -> 0
    assert ranking.best_of_n(values, labels, 2) == pytest.approx(1 / 3)
    assert ranking.best_of_n(values, labels, 3) == 0.0
    assert ranking.best_of_n(array(5, 5, 1), labels, 3) == pytest.approx(0.5)  # a tie of labels 0 and 1
    assert math.isnan(ranking.best_of_n(values, labels, 4))


def test_isotonic_pools_what_falls() -> None:
    levels, fitted = ranking.isotonic(array(1, 2, 3, 3, 4), array(0, 1, 0, 1, 1))
    assert levels.tolist() == [1, 2, 3, 4]
    assert fitted.tolist() == pytest.approx([0, 2 / 3, 2 / 3, 1])


def test_calibration_uses_other_prompts_only() -> None:
    values, group = np.tile(array(0, 1), 10), np.repeat(np.arange(10), 2)
    right = values > 0
    assert ranking.calibrated(values, right, group).tolist() == values.tolist()
    right[group == 3] = ~right[group == 3]  # its own label does not reach its own prediction
    fitted = ranking.calibrated(values, right, group, folds=10)
    assert fitted[group == 3].tolist() == [0.0, 1.0]
    assert np.isnan(ranking.calibrated(values, right, np.zeros(20, int))).all()


def test_ece_and_brier_by_hand() -> None:
    columns = ranking.calibration_columns(array(0.05, 0.05, 0.95, 1.0), array(0, 1, 1, 1))
    # bin 0: predicted 0.1 of 2, observed 1; bin 9: predicted 1.95 of 2, observed 2
    assert float(ranking.ece_of(*columns[:, :-1].sum(0))) == pytest.approx((0.9 + 0.05) / 4)
    assert columns[:, -1].mean() == pytest.approx((0.05**2 + 0.95**2 + 0.05**2) / 4)


def test_spearman_with_ties() -> None:
    assert ranking.ranks(array(10, 30, 20, 30)).tolist() == [0, 2.5, 1, 2.5]
    rows = ranking.correlation_columns(ranking.ranks(array(1, 2, 3, 4)), ranking.ranks(array(1, 4, 9, 2)))
    # ranks 0 1 2 3 and 0 2 3 1: sum of squared differences 0 + 1 + 1 + 4 = 6
    assert float(ranking.correlation_of(*rows.sum(0))) == pytest.approx(1 - 6 * 6 / (4 * 15))


# ---- groups


def test_zero_variance_over_all_subsets() -> None:
    values, group = array(1, 1, 1, 0, 0, 2, 2), np.array([0, 0, 0, 0, 1, 1, 1])
    # group 0: of 4 subsets of 3 one is equal; group 1: 0 2 2 has none
    assert group_signal.zero_variance(values, group, 2, 3).tolist() == pytest.approx([1 / 4, 0])
    assert group_signal.zero_variance(values, group, 2, 2).tolist() == pytest.approx([3 / 6, 1 / 3])
    four = group_signal.zero_variance(values, group, 3, 4)
    assert four[0] == 0 and np.isnan(four[1:]).all()
    assert group_signal.expected_zero_variance(array(0.5, 1.0), 4).tolist() == [0.125, 1.0]


def test_advantages_of_a_flat_group_are_zero() -> None:
    centred, scaled = group_signal.advantages(array(1, 0, 0.1, 0.1, 0.1), np.array([0, 0, 1, 1, 1]), 2)
    assert centred.tolist() == [0.5, -0.5, 0, 0, 0] and scaled.tolist() == [1, -1, 0, 0, 0]


def test_fidelity_signs_and_signal() -> None:
    labels = array(1, 0, 1, 0, 1, 0)
    values = array(1, 0, 0, 1, 1, 1)  # as the label, against it, silent
    sums = group_signal.fidelity_columns(values, labels, np.array([0, 0, 1, 1, 2, 2]), 3).sum(0)
    assert float(group_signal.fidelity_of(*sums)) == 0.0
    assert float(group_signal.sign_errors_of(*sums)) == pytest.approx(2 / 6)
    assert float(group_signal.no_signal_of(*sums)) == pytest.approx(2 / 6)
    # one group, scores 0 1 2 against labels 0 0 1: centred -1 0 1 and -1/3 -1/3 2/3, R2 = 1 / (2 * 2/3) = 3/4
    sums = group_signal.fidelity_columns(array(0, 1, 2), array(0, 0, 1), np.zeros(3, int), 1).sum(0)
    assert float(group_signal.signal_share_of(*sums)) == pytest.approx(0.75)
    assert float(group_signal.snr_of(*sums)) == pytest.approx(3.0)


def test_gradient_shares_sum_to_one_and_name_what_works_against() -> None:
    group = np.zeros(4, int)
    answer, form = array(2, 0, 2, 0), array(0, 0, 0.5, 0.5)
    shares = group_signal.gradient_shares({"a": answer, "f": form}, answer + form, group, 1)
    # variances 1 and 1/16, uncorrelated
    assert shares == pytest.approx({"a": 16 / 17, "f": 1 / 17})
    shares = group_signal.gradient_shares({"a": answer, "b": -answer / 2}, answer / 2, group, 1)
    assert shares == pytest.approx({"a": 2.0, "b": -1.0})


def test_pass_at_k_and_maj_at_k() -> None:
    assert group_signal.pass_at_k(np.array([4, 4, 1]), np.array([1, 4, 0]), 2).tolist()[:2] == pytest.approx([0.5, 1])
    assert np.isnan(group_signal.pass_at_k(np.array([1]), np.array([0]), 2)).all()
    answers = ["7", "7", "8", None]
    right = array(1, 1, 0, 0)
    assert group_signal.maj_at_k(answers, right, 4) == 1.0
    # pairs: 77 -> 1; 78 twice -> tie 0.5; 7 and none twice -> 1; 8 and none -> 0
    assert group_signal.maj_at_k(answers, right, 2) == pytest.approx((1 + 0.5 * 2 + 2 + 0) / 6)
    assert group_signal.maj_at_k([None, None], array(0, 0), 2) == 0.0
    many = ["1"] * 20 + ["2"] * 10
    drawn = group_signal.maj_at_k(many, array(*[1] * 20, *[0] * 10), 9)
    assert 0.75 < drawn < 0.98 and drawn == group_signal.maj_at_k(many, array(*[1] * 20, *[0] * 10), 9)


# ---- intervals


def test_bootstrap_keeps_prompts_together() -> None:
    """100 prompts of 50 equal samples carry the evidence of 100 samples: an error of 0.05, not of 0.007."""
    rng = np.random.default_rng(0)
    by_prompt = rng.permutation(100) % 2
    group = np.repeat(np.arange(100), 50)
    columns = np.stack([np.repeat(by_prompt, 50), np.ones(5000)], axis=1)
    weights = bootstrap.draw_weights(100)
    assert weights.shape == (1000, 100) and (weights.sum(1) == 100).all()
    value, between = bootstrap.estimate(lambda total, count: total / count, columns, group, weights)
    assert value == 0.5 and between is not None
    assert between == pytest.approx([0.5 - 1.96 * 0.05, 0.5 + 1.96 * 0.05], abs=0.015)


def test_interval_of_what_mostly_cannot_be_said_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    assert bootstrap.interval(array(1, math.nan, math.nan)) is None
    assert bootstrap.interval(array(*range(1001))) == pytest.approx([25, 975])
    monkeypatch.setattr(bootstrap, "CELLS", 40_000)
    assert [len(bootstrap.draw_weights(prompts)) for prompts in (10, 200, 10_000)] == [1000, 200, 100]


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("so 3\nA: 1,234", ("A:", "1234")),
        ("3 * 4 = 12\n#### $12", ("####", "12")),
        (r"thus \boxed{\frac12}.", ("\\boxed", r"\frac12")),
        (r"<think>\boxed{1}</think><answer> \boxed{2} </answer>", ("<answer>", "2")),
        ("The final answer is: 5.", ("answer:", "5")),
        ("first 3, then 4.50", ("number", "4.50")),
        ("no idea", ("none", None)),
        ("A: 3, 4", ("A:", "3, 4")),
    ],
)
def test_final_answer(text: str, want: tuple[str, str | None]) -> None:
    assert final_answer(text) == want
