"""cosine_length, group_length and repetition against hand-computed numbers, and what bad options say."""

import math

import pytest

from rewards import RewardInput, Status, build_rewards


def scores(mapping, rows):
    """rows: (completion, tokens or None[, group])."""
    with build_rewards(mapping) as rewards:
        return rewards.score(
            [
                RewardInput(
                    "q",
                    text,
                    {"answer": "#### 42"},
                    completion_ids=None if tokens is None else [0] * tokens,
                    group=group[0] if group else "",
                )
                for text, tokens, *group in rows
            ]
        )


COSINE = {"cosine_length": {"max_len": 100, "correct": "gsm8k_answer"}}


@pytest.mark.parametrize(
    ("text", "tokens", "expected"),
    [
        ("#### 42", 0, 1.0),
        ("#### 42", 50, 0.75),
        ("#### 42", 100, 0.5),
        ("#### 42", 200, 0.5),  # does not rise again beyond max_len
        ("#### 42", 25, 0.5 + 0.25 * (1 + math.cos(math.pi / 4))),
        ("#### 41", 0, -1.0),
        ("#### 41", 50, -0.75),
        ("#### 41", 100, -0.5),
        ("", 0, -1.0),
    ],
)
def test_cosine_length(text, tokens, expected):
    [score] = scores(COSINE, [(text, tokens)])
    assert score.value == pytest.approx(expected)


def test_cosine_length_values_bounds_and_checker():
    options = {"min_value_wrong": -10.0, "max_value_wrong": 0.0, "min_value_correct": 1.0, "max_value_correct": 2.0}
    mapping = {"cosine_length": COSINE["cosine_length"] | options}
    assert [s.value for s in scores(mapping, [("#### 42", 0), ("#### 41", 0), ("#### 41", 100)])] == [2.0, -10.0, 0.0]
    rule = build_rewards(mapping).parts["cosine_length"].rule
    assert (rule.bounds, rule.needs, rule.runs) == ((-10.0, 2.0), {"answer"}, "inline")


def test_correctness_may_be_mathematics():
    pytest.importorskip("math_verify", reason="math_answer needs math-verify")
    mapping = {"cosine_length": {"max_len": 100}, "group_length": 0.0}
    got = scores(mapping, [(r"\boxed{84/2}", 0), (r"\boxed{41}", 0)])
    assert [score.value for score in got] == [1.0, -1.0]


def test_a_checker_without_a_verdict_leaves_none():
    with build_rewards(COSINE | {"group_length": {"correct": "gsm8k_answer"}}) as rewards:
        [score] = rewards.score([RewardInput("q", "#### 42", {"answer": "no number"}, completion_ids=[0])])
    assert (score.value, score.status) == (None, Status.UNPARSEABLE_GOLD)
    assert scores(COSINE, [("#### 42", None)])[0].status is Status.NOT_APPLICABLE


def test_group_length():
    """Kimi k1.5: 0.5 - (n - 10) / (30 - 10) for right answers, at most 0 for wrong ones; each group by itself."""
    rows = [
        ("#### 42", 10, "a"),
        ("#### 42", 15, "a"),
        ("#### 7", 10, "a"),
        ("#### 7", 30, "a"),
        ("#### 42", 30, "a"),
        ("#### 42", 99, "b"),
        ("#### 7", 99, "b"),
        ("#### 42", None, "b"),
    ]
    got = scores({"group_length": {"correct": "gsm8k_answer"}}, rows)
    assert [score.value for score in got] == [0.5, 0.25, 0.0, -0.5, -0.5, 0.0, 0.0, None]
    assert build_rewards({"group_length": 1.0}).parts["group_length"].rule.grouped


def repetition(text="", ids=None, **options):
    [score] = build_rewards({"repetition": options}).score([RewardInput("q", text, completion_ids=ids)])
    return score.value


@pytest.mark.parametrize(
    ("text", "options", "expected"),
    [
        ("a b c d e f", {}, 0.0),
        ("a b", {}, 0.0),
        ("", {}, 0.0),
        ("a b c a b c a", {}, -(1 - 3 / 5)),
        ("A b C a B c a", {}, -(1 - 3 / 5)),
        ("a a a a a a a a a a", {"ngram_size": 1}, -0.9),
        ("la la la " * 1000, {}, -(1 - 1 / 2998)),
        ("a b a b", {"ngram_size": 2, "max_penalty": -0.3}, -0.1),
        ("我我我我我我", {}, -0.75),  # no spaces: every character is a word
        ("我们要找出这个数", {}, 0.0),
    ],
)
def test_repetition_over_words(text, options, expected):
    assert repetition(text, **options) == pytest.approx(expected)


def test_repetition_over_tokens():
    assert repetition(ids=[1, 2, 1, 2, 1], unit="tokens", ngram_size=2) == -0.5
    assert repetition(ids=[1, 2, 3], unit="tokens") == 0.0
    assert repetition("a a a a", unit="tokens") is None
    assert build_rewards({"repetition": {"max_penalty": -0.5}}).parts["repetition"].rule.bounds == (-0.5, 0.0)


def test_a_loop_at_the_end_of_a_long_text_counts():
    long = " ".join(map(str, range(100_000)))
    assert repetition(long + " la" * 100_000) < -0.9


@pytest.mark.parametrize(
    ("mapping", "words"),
    [
        ({"cosine_length": {}}, ["cosine_length", "max_len"]),
        ({"cosine_length": {"max_len": 0}}, ["cosine_length.max_len", "0"]),
        ({"cosine_length": {"max_len": 9, "correct": "length"}}, ["cosine_length.correct", "'length'", "gsm8k_answer"]),
        ({"cosine_length": {"max_len": 9, "min_value_wrong": 1.0}}, ["min_value_wrong", "max_value_wrong", "swap"]),
        ({"cosine_length": {"max_len": 9, "max_value_correct": "x"}}, ["cosine_length", "'x'", "finite"]),
        ({"group_length": {"correct": "x"}}, ["group_length.correct", "'x'"]),
        ({"repetition": {"ngram_size": 0}}, ["repetition.ngram_size", "0"]),
        ({"repetition": {"max_penalty": 1.0}}, ["repetition.max_penalty", "1.0"]),
        ({"repetition": {"unit": "lines"}}, ["repetition.unit", "'lines'", "words"]),
    ],
)
def test_bad_options_are_one_clear_line(mapping, words):
    with pytest.raises(ValueError) as caught:
        build_rewards(mapping)
    message = str(caught.value)
    assert all(word in message for word in words) and "\n" not in message
