"""multiple_choice: letters, texts, golds in their usual forms, and lists of options that never pay."""

import pytest

from rewards import RewardInput, Status, build_rewards

CITIES = ["London", "Paris", "Berlin", "New York"]
RIGHT = [  # Paris, B
    "B",
    "(B)",
    "B.",
    "b",
    "**B**",
    "Let me think.\nB) Paris",
    "<answer>B</answer>",
    "<answer> (B) </answer>",
    "<answer>Paris</answer>",
    "<answer>B: Paris</answer>",
    "<answer>Option B</answer>",
    "<answer>The answer is B.</answer>",
    "<think>A or C?</think> The answer is (B).",
    "The correct answer is: B, as France lies there.",
    "Answer: paris",
    r"\boxed{B}",
    r"\boxed{\text{B}}",
    r"\boxed{\text{Paris}}",
    r"so \boxed{A}, no: \boxed{B}",
    "The answer is A. Wait, the answer is B.",
    "Paris",
]
WRONG = [
    "",
    "C",
    "A, B, C, D",
    "A or B",
    "<answer>A or B or C or D</answer>",
    "<answer>A B C D</answer>",
    "<answer>ABCD</answer>",
    "<answer>B, C</answer>",
    "<answer>B) London</answer>",
    "<answer>B or London</answer>",
    "<answer>London Paris Berlin New York</answer>",
    "<answer>London or Paris</answer>",
    "<answer>all of them</answer>",
    "<answer></answer>",
    "<answer>B</answer> <answer>C</answer>",
    "<think>B</think>",
    "The answer is B or maybe C.",
    "The answer is not A.",
    "A big city such as Paris",
    "B is likely, but I do not know.",
    r"\boxed{A, B}",
    "E",
    "The answer is B" + " " * 600 + "or C",
]


def score(text, answer, **fields):
    [got] = build_rewards({"multiple_choice": 1.0}).score([RewardInput("q", text, {"answer": answer, **fields})])
    return got


@pytest.mark.parametrize("answer", ["B", "(B)", "Paris", 1, "B) Paris"])
def test_table(answer):
    rewards = build_rewards({"multiple_choice": 1.0})
    for texts, value in ((RIGHT, 1.0), (WRONG, 0.0)):
        scores = rewards.score([RewardInput("q", text, {"answer": answer, "choices": CITIES}) for text in texts])
        assert [text for text, got in zip(texts, scores) if got.value != value] == []


@pytest.mark.parametrize(
    ("text", "answer", "expected"),
    [
        ("B", "B", 1.0),
        ("The answer is (B).", "(B)", 1.0),
        ("<answer>B) Paris</answer>", "B", 1.0),
        ("<answer>A B C D</answer>", "B", 0.0),
        ("<answer>A or B</answer>", "A", 0.0),
        ("A dog barks", "A", 0.0),
        ("B", 1, 1.0),
        ("K", "B", 0.0),
    ],
)
def test_without_a_column_of_choices_letters_are_read(text, answer, expected):
    assert score(text, answer).value == expected


@pytest.mark.parametrize(
    "choices",
    [
        {"A": "London", "B": "Paris"},
        {"text": ["London", "Paris"], "label": ["A", "B"]},
        ("London", "Paris"),
    ],
)
def test_forms_of_the_choices(choices):
    assert score("Paris", "B", choices=choices).value == 1.0
    assert score("London", "B", choices=choices).value == 0.0


def test_the_column_may_have_another_name():
    rewards = build_rewards({"multiple_choice": {"choices": "options"}})
    [got] = rewards.score([RewardInput("q", "Paris", {"answer": "B", "options": CITIES})])
    assert got.value == 1.0


@pytest.mark.parametrize("answer", ["Rome", "E", 4, None, ""])
def test_a_gold_that_is_no_option_has_a_status_of_its_own(answer):
    assert score("B", answer, choices=CITIES).status is Status.UNPARSEABLE_GOLD


def test_equal_options_cannot_be_named_by_text():
    assert score("Paris", "A", choices=["Paris", "paris"]).value == 0.0


def test_the_perfect_completion_scores_full():
    perfect = build_rewards({"multiple_choice": 1.0}).parts["multiple_choice"].rule.perfect
    assert score(perfect({"answer": "Paris", "choices": CITIES}), "Paris", choices=CITIES).value == 1.0
