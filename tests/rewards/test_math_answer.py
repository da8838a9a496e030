"""math_answer: tables of (text, gold, expected), hostile answers, and agreement with labelled GSM8K solutions."""

import itertools
import json
import threading
import time
from pathlib import Path

import pytest

from rewards import RewardInput, Status, build_rewards

pytest.importorskip("math_verify", reason="math_answer needs math-verify")

PLACES = [folder / "shared/data/gsm8k/model_solutions.jsonl" for folder in Path(__file__).resolve().parents]
GSM8K = next((place for place in PLACES if place.exists()), PLACES[3])

RIGHT = [
    (r"\boxed{42}", "42"),
    (r"so \boxed{41}, no: \boxed{42}", "42"),
    (r"\boxed{41} \boxed{42}", "42"),
    (r"<think>\boxed{7}</think> <answer>42</answer>", "42"),
    (r"<think>\boxed{7}</think> \boxed{42}", "42"),
    (r"The value is $42$.", "42"),
    (r"\boxed{$42$}", "42"),
    (r"\boxed{42}", "$42$"),
    (r"\boxed{42}", r"\boxed{42}"),
    (r"\boxed{72}", "48/2 = 24, so 72\n#### 72"),
    ("He pays 18.\nA: 18", "18"),
    (r"\boxed{0.5}", r"\frac{1}{2}"),  # a bare LaTeX gold is misread unless it is put in a box
    (r"\boxed{\frac12}", r"\dfrac{1}{2}"),
    (r"\boxed{2\sqrt{2}}", r"\sqrt{8}"),
    (r"\boxed{1 + x}", "x+1"),
    (r"\boxed{x=42}", "42"),
    (r"\boxed{3+39=42}", "42"),
    (r"\boxed{\frac13\approx 0.33}", r"\frac13"),
    (r"\boxed{\pi\approx 3.14}", r"\pi"),
    (r"\boxed{4,200}", "4200"),
    (r"\boxed{12{:}30}", "12{:}30"),  # cannot be parsed, equal as a string
    (r"\boxed{(B)}", "B"),
    (r"\boxed{\text{B}}", "B"),
    ("The answer is B.", "B"),
    (r"\boxed{2} and \boxed{1}", r"1, 2"),
    (r"\boxed{1 - \frac{1}{\mathrm{e}}}", r"1-\frac1e"),
    (r"\boxed{\boxed{42}}", "42"),
    (r"\boxed{42\%}", "42"),
    (r"\boxed{50\%}", "0.5"),
    (r"\boxed{x<3}", r"(-\infty,3)"),
    (r"\boxed{(-\infty,3)}", "x<3"),
    (r"\boxed{30^\circ}", r"\pi/6"),
    (r"\boxed{30^\circ}", "pi/6"),
    (r"\boxed{30^\circ}", "30"),
    (r"\boxed{1.22}", "1,22"),
    (r"\boxed{(0.6, 2.6667]}", r"(\frac35, \frac83]"),  # rounded to five digits
    ("so $x = 3+4 = 7+2 = 9$", "9"),  # run-on equals of running text
    (r"it is $\frac{1}{2} \$ = \frac{10}{9}$", "10/9"),  # quantities, not numbers
    (r"We save \boxed{255}. The final answer is $10,455$. I hope it is correct.", "10455"),
    (r"\boxed{(3, 3)} \text{ for part (a) and } \boxed{(1, 1)}", "(3, 3), (1, 1)"),
    (r"\(y_1 = \boxed{-2(x-1)^2} \) and \( y_2 = \boxed{3x} \)", "-2(x-1)^2, 3x"),
    (r"\boxed{1,2}", r"\boxed{1} papers and \boxed{2} bins"),
    (r"\boxed{1,2}", r"\boxed{1}\boxed{2}"),
]

WRONG = [
    (r"\boxed{41=42}", "42"),
    (r"\boxed{1=2=42}", "42"),
    (r"\boxed{42\approx 41}", "42"),
    ("The answer is $41=42$", "42"),
    (r"\boxed{42} or rather \boxed{41}", "42"),
    (r"\boxed{41, 42}", "42"),
    (r"\boxed{x = 41 = 42}", "42"),
    (r"so $x = 42 \approx 41$", "41"),
    (r"\boxed{4200\%}", "42"),
    (r"\boxed{\frac{1}{2006!}}", r"\frac{1}{2004!}"),
    (r"\boxed{2^{-98}}", r"2^{-99}"),
    (r"\boxed{0.0000002}", "0.0000001"),
    (r"\boxed{\sum_{k=1}^{100} k}", "5050"),
    (r"\boxed{\int_0^1 x^2 dx}", r"\frac13"),
    (r"\boxed{\lim_{x\to 3} x}", "3"),
    (r"\boxed{2.667}", r"\frac83"),
    (r"\boxed{x<-3}", r"(-\infty,3)"),
    (r"\boxed{60^\circ}", r"\pi/6"),
    (r"\boxed{1, 2}", r"\boxed{1}. No, no: \boxed{2}"),
    (r"\boxed{42} is the final answer, is it not?", "41"),
    (r"\boxed{1}, \boxed{2}, \boxed{3}", "1, 2"),
    (r"<think>\boxed{42}</think>", "42"),
    (r"\boxed{}", "42"),
    ("", "42"),
    ("   ", "42"),
    ("I do not know.", "42"),
    ("The answer is C.", "B"),
    (r"\boxed{1, 2}", "12"),
    (r"\boxed{__import__('os').system('touch /tmp/owned')}", "42"),
    (r"\boxed{" * 3000 + "41", "42"),
]


@pytest.fixture(scope="module")
def rewards():
    with build_rewards({"math_answer": {"weight": 1.0, "timeout": 1.5}}) as built:
        yield built


def sample(text: str, gold: object) -> RewardInput:
    return RewardInput("question", text, {"answer": gold})


@pytest.mark.parametrize(("rows", "value"), [(RIGHT, 1.0), (WRONG, 0.0)], ids=["right", "wrong"])
def test_table(rewards, rows, value):
    scores = rewards.score([sample(text, gold) for text, gold in rows])
    assert [row[:2] for row, score in zip(rows, scores) if score.value != value] == []


@pytest.mark.parametrize("gold", [r"\frac{", "", None, "   "])
def test_gold_that_cannot_be_parsed_has_a_status_of_its_own(rewards, gold):
    [score] = rewards.score([sample(r"\boxed{1}", gold)])
    assert (score.value, score.status) == (None, Status.UNPARSEABLE_GOLD)
    assert "gold" in score.info["math_answer"]["reason"]


def test_gold_that_hangs_is_not_charged_to_the_completion(rewards):
    [score] = rewards.score([sample(r"\boxed{1}", "9^{9^{9^{9}}}")])
    assert (score.value, score.status) == (None, Status.UNPARSEABLE_GOLD)


def test_power_towers_score_zero_and_the_process_stays_responsive(rewards):
    rewards.score([sample(r"\boxed{2}", "42")])  # started
    beats, stop = [time.monotonic()], threading.Event()

    def heart() -> None:
        while not stop.wait(0.02):
            beats.append(time.monotonic())

    thread = threading.Thread(target=heart)
    thread.start()
    start = time.monotonic()
    scores = rewards.score(
        [sample(r"\boxed{9^{9^{9^{9}}}}", "42"), sample(r"\boxed{(10^8)!}", "42"), sample(r"\boxed{84/2}", "42")]
    )
    took = time.monotonic() - start
    stop.set()
    thread.join()
    assert [score.value for score in scores] == [0.0, 0.0, 1.0]
    assert "too long" in scores[0].info["math_answer"]["reason"]
    assert took < 1.5 + 2.5
    assert max(b - a for a, b in itertools.pairwise(beats)) < 1.0
    assert scores[2].queue_s > 1.0 > scores[2].run_s  # waiting behind the towers is not charged to it


def test_works_from_a_thread_that_is_not_the_main_one(rewards):
    got = []
    thread = threading.Thread(target=lambda: got.extend(rewards.score([sample(r"\boxed{6\cdot 7}", "42")])))
    thread.start()
    thread.join(20)
    assert [score.value for score in got] == [1.0]


def test_require_box():
    with build_rewards({"math_answer": {"require_box": True}}) as rewards:
        scores = rewards.score([sample("42", "42"), sample(r"\boxed{42}", "42")])
    assert [score.value for score in scores] == [0.0, 1.0]


@pytest.mark.skipif(not GSM8K.exists(), reason=f"GSM8K is not at {GSM8K}")
def test_agrees_with_the_labels_of_gsm8k_solutions(rewards):
    inputs, labels = [], []
    for line in GSM8K.read_text(encoding="utf-8").splitlines()[::10]:
        row = json.loads(line)
        gold = row["ground_truth"].rpartition("A: ")[2]
        for solution in (value for value in row.values() if isinstance(value, dict)):
            inputs.append(sample(solution["solution"], gold))
            labels.append(float(solution["is_correct"]))
    assert len(labels) > 400 and 0.2 < sum(labels) / len(labels) < 0.6
    assert [score.value for score in rewards.score(inputs)] == labels
