"""What a group says about itself: scores from comparisons, and votes on the answer."""

from __future__ import annotations

import math

import pytest

from rewards import RewardInput, Status, build_rewards
from rewards.pairwise import bradley_terry, schedule, win_share
from rewards.self_voting import voted_answer


def test_bradley_terry_of_two_by_hand():
    """0 beat 1, and each drew with strength 1: the strengths p and 1/p expect 1.5 and 0.5 wins of two."""
    values = bradley_terry([0, 1], {(0, 1): 1.0})
    p, q = (value / (1 - value) for value in (values[0], values[1]))
    assert p * q == pytest.approx(1.0)
    assert pytest.approx(p / (p + q) + p / (p + 1)) == 1.5  # wins are what the strengths expect
    assert 0.5 < values[0] < 1.0


def test_bradley_terry_ranks_by_whom_one_beat():
    """0 and 3 both won one of two; 0's win was over the strong 1, 3's over the weak 4."""
    points = {(0, 1): 1.0, (0, 2): 0.0, (1, 2): 1.0, (1, 3): 1.0, (3, 4): 1.0, (2, 4): 1.0, (1, 4): 1.0}
    values = bradley_terry(range(5), points)
    assert win_share(range(5), points)[0] == win_share(range(5), points)[3] == 0.5
    assert values[0] > values[3] > values[4]
    for one in range(5):
        odds = {place: value / (1 - value) for place, value in values.items()}
        met = [pair[1 - pair.index(one)] for pair in points if one in pair]
        expected = sum(odds[one] / (odds[one] + odds[other]) for other in met) + odds[one] / (odds[one] + 1)
        won = 0.5 + sum(value if pair[0] == one else 1 - value for pair, value in points.items() if one in pair)
        assert expected == pytest.approx(won, abs=1e-6)


def test_who_meets_whom():
    assert schedule(3, 0) == [(0, 1), (0, 2), (1, 2)]
    for size, opponents in ((5, 2), (8, 4), (7, 6), (4, 8)):
        pairs = schedule(size, opponents)
        assert len({frozenset(pair) for pair in pairs}) == len(pairs) == size * min(opponents, size - 1) // 2
        assert {sum(place in pair for pair in pairs) for place in range(size)} == {min(opponents, size - 1)}


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"so \boxed{4,200}", "4200"),
        (r"\boxed{4200.0}", "4200"),
        ("<answer>4200</answer>", "4200"),
        (r"<think>\boxed{7}</think> <answer>\boxed{-0.50}</answer>", "-0.5"),
        ("It costs 42.\n#### 42\n", "42"),
        (r"\boxed{\text{B}}", "B"),
        (r"\boxed{(B)}", "B"),
        (r"\boxed{1} and \boxed{2}", "1, 2"),
        (r"\boxed{-0}", "0"),
        (r"\boxed{12345678901234567890123456789012}", "12345678901234567890123456789012"),
        ("<think>#### 42</think> I do not know.", None),
        (r"\boxed{}", None),
        ("42", None),
    ],
)
def test_the_answer_voted_for(text, answer):
    assert voted_answer(text) == answer


def vote(*answers, options=None, **others):
    inputs = [RewardInput("q", f"\\boxed{{{answer}}}" if answer else "no idea", group="g") for answer in answers]
    inputs += [RewardInput("q", f"\\boxed{{{a}}}", group=group) for group, more in others.items() for a in more]
    with build_rewards({"self_voting": options or {}}) as rewards:
        return rewards.score(inputs)


def test_the_majority_of_a_group_is_right():
    scores = vote("1/2", "2", "2.0", "", "3", h=["3", "3", "2"])
    assert [score.value for score in scores] == [0.0, 1.0, 1.0, 0.0, 0.0, 1.0, 1.0, 0.0]
    assert scores[1].info["self_voting"]["share"] == pytest.approx(0.4)
    shares = vote("2", "2", "3", "", options={"score": "share"})
    assert [score.value for score in shares] == [0.5, 0.5, 0.25, 0.0]


@pytest.mark.parametrize(
    ("answers", "options", "words"),
    [
        (["1", "2", "1", "2", "3"], {}, "tie"),
        (["", "", ""], {}, "no sample"),
        (["1"], {}, "alone"),
        (["1", "1", "2", ""], {"minimum_share": 0.6}, "less than minimum_share 0.6"),
    ],
)
def test_a_group_without_a_winner_has_no_score(answers, options, words):
    scores = vote(*answers, options=options)
    assert {score.status for score in scores} == {Status.NOT_APPLICABLE}
    assert all(words in score.info["self_voting"]["reason"] for score in scores)


def test_a_tie_has_shares():
    assert [score.value for score in vote("1", "2", options={"score": "share"})] == [0.5, 0.5]


@pytest.mark.parametrize("options", [{"score": "most"}, {"minimum_share": 2}, {"minimum_share": math.nan}])
def test_bad_options_are_named(options):
    with pytest.raises(ValueError, match=f"rewards.self_voting.{next(iter(options))} is "):
        build_rewards({"self_voting": options})
