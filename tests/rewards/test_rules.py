"""exact_match, format_tags, length and soft_overlong: tables, and what bad options say."""

import pytest

from rewards import RewardInput, Status, build_rewards


def value(mapping, text="", gold="42", ids=None):
    [score] = build_rewards(mapping).score([RewardInput("q", text, {"answer": gold}, completion_ids=ids)])
    return score.value


@pytest.mark.parametrize(
    ("text", "gold", "expected"),
    [
        ("<answer>42</answer>", "42", 1.0),
        ("<answer> 42\n</answer>", " 42 ", 1.0),
        ("<answer>41</answer> <answer>42</answer>", "42", 1.0),
        ("<answer>42</answer> <answer>41</answer>", "42", 0.0),
        ("<answer>42</answer> <answer>41", "42", 1.0),
        ("<answer>42", "42", 0.0),
        ("42</answer>", "42", 0.0),
        ("</answer>42<answer>", "42", 0.0),
        ("42", "42", 0.0),
        ("", "42", 0.0),
        ("<answer>41 or 42</answer>", "42", 0.0),
        ("<answer>42.0</answer>", "42", 0.0),
        ("<answer>A or B or C</answer>", "A", 0.0),
        ("<answer></answer>", "", 0.0),
        ("<answer>42</answer>", 42, 1.0),
    ],
)
def test_exact_match(text, gold, expected):
    assert value({"exact_match": 1.0}, text, gold) == expected


def test_exact_match_by_tag_and_pattern():
    assert value({"exact_match": {"tag": "final"}}, "<answer>1</answer><final>42</final>") == 1.0
    pattern = {"exact_match": {"pattern": r"A: (-?\d+)"}}
    assert value(pattern, "A: 41\nA: 42") == 1.0
    assert value(pattern, "A: 421") == 0.0
    assert value(pattern, "42") == 0.0


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<think>hm</think><answer>42</answer>", 1.0),
        (" <think>hm</think>\n\n<answer>42</answer>\n", 1.0),
        ("<think></think><answer>42</answer>", 0.0),
        ("<think> \n</think><answer>42</answer>", 0.0),
        ("<think>.</think><answer>42</answer>", 0.0),
        ("<think>\u200b ...\n</think><answer>42</answer>", 0.0),
        ("<think>hm</think><answer>\u200b</answer>", 0.0),
        ("<think>\u662f</think><answer>-</answer>", 1.0),
        ("<think></think>", 0.0),
        ("<think>a</think></think></think><answer>42</answer>", 0.0),
        ("<answer>42</answer><think>hm</think>", 0.0),
        ("<think>hm<answer>42</answer></think>", 0.0),
        ("<think>hm</think> so <answer>42</answer>", 0.0),
        ("<think>hm</think><answer>42</answer> done", 0.0),
        ("<think>hm</think><answer>1</answer><answer>42</answer>", 0.0),
        ("</think>hm<think><answer>42</answer>", 0.0),
        ("la la la " * 2000, 0.0),
        ("", 0.0),
    ],
)
def test_format_tags(text, expected):
    assert value({"format_tags": 1.0}, text) == expected


def test_format_tags_options():
    assert value({"format_tags": {"tags": ["answer"]}}, "<answer>42</answer>") == 1.0
    assert value({"format_tags": {"prefix": "<think>"}}, "hm</think><answer>42</answer>") == 1.0


@pytest.mark.parametrize(
    ("options", "tokens", "expected"),
    [
        ({"max": 10}, 0, 0.0),
        ({"max": 10}, 5, -0.5),
        ({"max": 10}, 99, -1.0),
        ({"target": 10}, 10, 0.0),
        ({"target": 10}, 5, -0.5),
        ({"target": 10}, 12, -0.2),
        ({"target": 10}, 50, -1.0),
    ],
)
def test_length(options, tokens, expected):
    assert value({"length": options}, ids=[0] * tokens) == pytest.approx(expected)


@pytest.mark.parametrize(("tokens", "expected"), [(0, 0.0), (80, 0.0), (85, -0.25), (100, -1.0), (101, -1.0)])
def test_soft_overlong(tokens, expected):
    """DAPO eq. 13 with L_max = 100, L_cache = 20."""
    assert value({"soft_overlong": {"max_completion_length": 100, "cache": 20}}, ids=[0] * tokens) == expected


def test_length_rules_do_not_apply_without_token_ids():
    [score] = build_rewards({"length": {"max": 10}}).score([RewardInput("q", "text")])
    assert (score.value, score.status) == (None, Status.NOT_APPLICABLE)


@pytest.mark.parametrize(
    ("mapping", "words"),
    [
        ({"exact_match": {"tag": "a", "pattern": "(b)"}}, ["exact_match", "tag", "pattern"]),
        ({"exact_match": {"pattern": "("}}, ["exact_match.pattern", "regular expression"]),
        ({"exact_match": {"pattern": "a"}}, ["exact_match.pattern", "0 groups"]),
        ({"format_tags": {"tags": "think"}}, ["format_tags.tags", "list"]),
        ({"format_tags": {"tags": ["<think>"]}}, ["format_tags.tags", "<think>"]),
        ({"length": {}}, ["length", "max", "target"]),
        ({"length": {"max": 0}}, ["length.max", "0"]),
        ({"soft_overlong": {"max_completion_length": 10, "cache": 20}}, ["soft_overlong.cache", "20", "10"]),
    ],
)
def test_bad_options_are_one_clear_line(mapping, words):
    with pytest.raises(ValueError) as caught:
        build_rewards(mapping)
    message = str(caught.value)
    assert all(word in message for word in words) and "\n" not in message
