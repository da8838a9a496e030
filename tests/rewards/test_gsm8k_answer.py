"""gsm8k_answer: what is read as the answer, what never pays, and full agreement with the labels of 5,276 solutions."""

import json
from fractions import Fraction
from pathlib import Path

import pytest

from rewards import RewardInput, Status, build_rewards
from rewards.gsm8k_answer import final_number, gold_number

PLACES = [folder / "shared/data/gsm8k" for folder in Path(__file__).resolve().parents]
GSM8K = next((place for place in PLACES if place.exists()), PLACES[3])
needs_data = pytest.mark.skipif(not GSM8K.exists(), reason=f"GSM8K is not at {GSM8K}")

RIGHT = [  # for the gold answer 1200
    "so 3 * 400 = 1200\n#### 1200",
    "#### $1,200",
    "#### 1,200.00.",
    "#### 1200 dollars",
    "####1200",
    "#### **1200**",
    "A: 1200",
    "12 + 3 = 15\n  A: $ 1,200 per year.",
    "The answer is 1200.",
    "The final answer is: $1,200$.",
    "**Answer:** 1200",
    "Answer: \\boxed{1200}",
    "#### 7\nno:\n#### 1200",
    "A: 7\n#### 1200",
    "#### 2400/2",
    "We get \\boxed{1,200} dollars after 3 years.",
    "<think>#### 7</think> <answer>$1200</answer>",
    "<think>#### 7</think> it costs 1200",
    "First 3, then 400, hence 1200.",
]
WRONG = [
    "",
    "I do not know.",
    "#### 12",
    "#### 12000",
    "#### 1,2,00",
    "#### 1,200,0",
    "#### -1200",
    "#### 1200%2",
    "#### 1200 or 1300",
    "#### 7, 1200",
    "#### 1200x2",
    "#### 41 = 1200",
    "#### 1200\n#### 7",
    "#### 1200\nA: 7",
    "#### ",
    "1200\n####",
    "<think>#### 1200</think>",
    "<think>#### 1200</think> <answer>7</answer>",
    "<answer>7 or 1200</answer>",
    "#### ١٢٠٠",
    "#### 1200" + " and so on" * 100,
    "1200 is what I say. It took 3 steps.",
    "\\boxed{7} 1200",
]


@pytest.fixture(scope="module")
def rewards():
    return build_rewards({"gsm8k_answer": 1.0})


@pytest.mark.parametrize(("texts", "value"), [(RIGHT, 1.0), (WRONG, 0.0)], ids=["right", "wrong"])
def test_table(rewards, texts, value):
    scores = rewards.score([RewardInput("q", text, {"answer": "... = 1200\n#### 1,200"}) for text in texts])
    assert [text for text, score in zip(texts, scores) if score.value != value] == []


@pytest.mark.parametrize(
    ("gold", "number"),
    [
        ("48/2 = <<48/2=24>>24\n#### 72", 72),
        ("16 - 3 = 13\nA: 18", 18),
        ("#### -5", -5),
        ("#### $-5", -5),
        ("#### −5", -5),  # noqa: RUF001
        ("#### 0.50", Fraction(1, 2)),
        ("#### .5", Fraction(1, 2)),
        ("#### 3/4", Fraction(3, 4)),
        ("2,125", 2125),
        (72, 72),
        (2.5, Fraction(5, 2)),
        ("#### 1/0", None),
        ("#### seven", None),
        ("", None),
        (None, None),
        ("#### 7 or 8", None),
    ],
)
def test_gold(gold, number):
    assert gold_number(gold) == number


def test_gold_without_a_number_has_a_status_of_its_own(rewards):
    [score] = rewards.score([RewardInput("q", "#### 7", {"answer": "#### seven"})])
    assert (score.value, score.status) == (None, Status.UNPARSEABLE_GOLD)
    assert "seven" in score.info["gsm8k_answer"]["reason"]


def test_strict_takes_marked_answers_only():
    texts = ["#### 72", "A: 72", "The answer is 72", "<answer>72</answer>", "\\boxed{72}", "so 72"]
    strict = build_rewards({"gsm8k_answer": {"strict": True}})
    values = [score.value for score in strict.score([RewardInput("q", text, {"answer": "72"}) for text in texts])]
    assert values == [1.0, 1.0, 1.0, 1.0, 0.0, 0.0]


def test_the_perfect_completion_scores_full(rewards):
    rule = rewards.parts["gsm8k_answer"].rule
    for gold in ("#### 72", "A: 1,200.50", "#### -3/4"):
        assert final_number(rule.perfect({"answer": gold})) == gold_number(gold)
    assert rule.perfect({"answer": "none"}) is None


@needs_data
def test_agrees_with_every_label_and_gives_the_known_group_signal(rewards):
    inputs, labels = [], []
    for line in (GSM8K / "model_solutions.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        for solution in (value for value in row.values() if isinstance(value, dict)):
            inputs.append(RewardInput(row["question"], solution["solution"], {"answer": row["ground_truth"]}))
            labels.append(float(solution["is_correct"]))
    values = [score.value for score in rewards.score(inputs)]
    assert (len(values), sum(labels)) == (5276, 2001)
    assert [i for i, (value, label) in enumerate(zip(values, labels)) if value != label] == []
    groups = [values[start : start + 4] for start in range(0, len(values), 4)]
    assert round(100 * sum(len(set(group)) == 1 for group in groups) / len(groups), 1) == 44.6


@needs_data
def test_reads_the_gold_answers_of_the_test_set(rewards):
    rows = [json.loads(line) for line in (GSM8K / "test.jsonl").read_text(encoding="utf-8").splitlines()]
    scores = rewards.score([RewardInput(row["question"], row["answer"], {"answer": row["answer"]}) for row in rows])
    assert len(rows) == 1319 and all(score.value == 1.0 for score in scores)
