"""Completions made to freeze a grader: they cost their own score, and nobody else waits."""

import itertools
import threading
import time

import pytest

from rewards import RewardInput, build_rewards

MEGABYTE = 2**20
LIMIT = 0.1
CHOICES = ["London", "Paris"]
INLINE = {
    "format_tags": {},
    "exact_match": {},
    "gsm8k_answer": {},
    "multiple_choice": {},
    "repetition": {},
    "language_consistency": {"language": "en"},
}


def filled(piece: str) -> str:
    return (piece * (MEGABYTE // len(piece) + 1))[:MEGABYTE]


def seconds(rule, text):
    """Below LIMIT the first, else the least of three, of this thread alone: a busy machine is not the rule's doing."""
    took = []
    while len(took) < 3 and (not took or took[-1] >= LIMIT):
        start = time.thread_time()
        rule.score([RewardInput("What is one?", text, {"answer": "1", "choices": CHOICES})])
        took.append(time.thread_time() - start)
    return min(took)


PIECES = ["{", "}", "\\boxed{", "\\boxed{{", "\\boxed{1} ", "\\boxed", "\\", "$", "\\(", "\\[", "`", "```", "<",
          "<think>", "<answer>", "</answer>", "</think>", "<answer>1</answer>",
          " ", "\n", "\t \n", "a", "a ", "a'", "A ", "(A) ",
          "B or ", "1", "1,", "1 ", "1/", "$-", ".", "*", "_", "#", "#### ", "####\n", "A:", "A:\n", "answer is ",
          "answer: 1\n", "the final answer is ", "https://", "\u6211", "\u3042", "\uac00",
          "\u0661", "\u0301"]  # fmt: skip


@pytest.mark.parametrize("text", [*map(filled, PIECES), *("x" + filled(piece) + "x" for piece in ("<", " ", "\\["))])
def test_a_megabyte_takes_no_inline_rule_more_than_a_tenth_of_a_second(text):
    """Or, on a slower machine, no more than linear time."""
    for name, part in build_rewards(INLINE).parts.items():
        took = seconds(part.rule, text)
        if took >= LIMIT:
            eighth = seconds(part.rule, text[: MEGABYTE // 8])
            assert took < 5 * LIMIT and took < 3 * 8 * eighth, (
                f"{name} took {took:.2f} s on {text[:12]!r}..., {eighth=}"
            )


class Beats:
    """A thread that should beat every 20 ms: a gap means that somebody held the interpreter."""

    def __enter__(self):
        self.times, self.stop = [time.monotonic()], threading.Event()
        self.thread = threading.Thread(target=self.run)
        self.thread.start()
        return self

    def run(self):
        while not self.stop.wait(0.02):
            self.times.append(time.monotonic())

    def __exit__(self, *_):
        self.stop.set()
        self.thread.join()
        self.times.append(time.monotonic())

    def longest_gap(self):
        return max(after - before for before, after in itertools.pairwise(self.times))


FREEZERS = [
    r"\boxed{9^{9^{9^{9}}}}",
    r"\boxed{(10^8)!}",
    r"\boxed{3^{10^{9}}}",
    r"\boxed{2^{-10^{12}}}",
    "\\boxed{" + "{" * 300 + "1" + "}" * 300 + "}",
    filled("\\boxed{"),
    filled("{"),
    filled("\\frac{1}{") + "1",
    filled("$("),
    "\\boxed{" + "9" * 5000 + "}",
    "\\boxed{" + "\\sqrt{" * 400 + "2" + "}" * 400 + "}",
]
FINE = [(r"<think>hm</think> \boxed{84/2}", 1.0), (r"<think>hm</think> \boxed{41}", 0.0), ("42", 1.0)]


def test_a_mixed_batch_keeps_its_scores_and_the_heart_beats():
    """A stand-in for the loop: batches are scored in a thread of its own while the main thread goes on."""
    pytest.importorskip("math_verify", reason="math_answer needs math-verify")
    texts = [*FREEZERS[:6], *(text for text, _ in FINE), *FREEZERS[6:], *(text for text, _ in FINE)]
    mapping = {"math_answer": {"timeout": 0.7}} | {name: {"weight": 0.0, **o} for name, o in INLINE.items()}
    with build_rewards(mapping) as rewards:
        rewards.score([RewardInput("q", r"\boxed{2}", {"answer": "42"})] * 2)  # started
        got = []

        def score() -> None:
            got.extend(rewards.score([RewardInput("What is it?", text, {"answer": "42"}) for text in texts]))

        with Beats() as beats:
            loop = threading.Thread(target=score)
            loop.start()
            while loop.is_alive():  # what the main thread of a trainer would notice
                loop.join(0.02)
                beats.times.append(time.monotonic())
    assert beats.longest_gap() < 1.0
    by_text = {text: score.value for text, score in zip(texts, got, strict=True)}
    assert [by_text[text] for text in FREEZERS] == [0.0] * len(FREEZERS)
    assert [(text, by_text[text]) for text, _ in FINE] == FINE
    reasons = [got[place].info["math_answer"].get("reason", "") for place in range(3)]
    assert all("too long" in reason for reason in reasons[:2])


def test_the_beats_would_notice_a_held_interpreter():
    with Beats() as beats:
        time.sleep(0.1)
        pow(7, 1_500_000)  # one operation inside the interpreter
    assert beats.longest_gap() > 0.1
