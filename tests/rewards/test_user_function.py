"""A user's function as a reward: signature, failures of one sample, hangs."""

import time
from datetime import date

import numpy as np
import pytest

from rewards import RewardInput, Status, build_rewards

SOURCE = """
import math, os, sys, time
from dataclasses import dataclass
import neighbour

@dataclass
class Unused:
    a: int

def reward(completion, prompt, **fields):
    if completion == "raise":
        raise KeyError("boom")
    if completion == "hang":
        while True:
            pass
    if completion == "nan":
        return math.nan
    if completion == "text":
        return "1.0"
    if completion == "list":
        return [1.0]
    if completion == "none":
        return None
    if completion == "true":
        return True
    if completion == "exit":
        sys.exit(3)
    if completion == "crash":
        os._exit(3)
    if completion == "memory":
        return float(len(bytearray(3 << 30)))
    return neighbour.HALF * len(completion)

def picky(completion, prompt, answer, *, level, bonus=0.0):
    return float(completion == answer) + level + bonus

def messages(completion, prompt, **fields):
    print("a reward that prints")
    return float(prompt[-1]["content"] == "hi" and fields["when"] == "2026-01-02" and fields["vector"] == [1, 2])

def short(completion):
    return 1.0
"""


@pytest.fixture
def path(tmp_path):
    (tmp_path / "neighbour.py").write_text("HALF = 0.5\n")
    (tmp_path / "mine.py").write_text(SOURCE)
    return tmp_path / "mine.py"


def build(path, function="reward", **options):
    return build_rewards({"mine": {"weight": 1.0, "function": f"{path}:{function}", **options}}, memory_gb=2.0)


def test_failures_cost_their_own_sample_only(path):
    texts = ["abcd", "raise", "nan", "text", "list", "none", "true", "exit", "crash", "memory", "ab"]
    with build(path, timeout=5) as rewards:
        scores = dict(zip(texts, rewards.score([RewardInput("q", text) for text in texts])))
    assert {text: score.value for text, score in scores.items() if score.value is not None} == {
        "abcd": 2.0,
        "true": 1.0,
        "ab": 1.0,
    }
    assert scores["none"].status is Status.NOT_APPLICABLE
    for text in ("raise", "nan", "text", "list", "exit", "crash", "memory"):
        assert scores[text].status is Status.ERROR, text
    reasons = {text: score.info["mine"].get("reason", "") for text, score in scores.items()}
    assert "KeyError" in reasons["raise"] and "mine.py:" in reasons["raise"]
    assert "nan" in reasons["nan"] and "'1.0'" in reasons["text"] and "MemoryError" in reasons["memory"]
    assert "died" in reasons["crash"]


def test_a_hang_is_a_timeout_without_a_value_and_the_worker_is_replaced(path):
    with build(path, timeout=0.5) as rewards:
        rewards.score([RewardInput("q", "a")] * 2)
        before = set(rewards._pool.pids())
        start = time.monotonic()
        scores = rewards.score([RewardInput("q", text) for text in ("a", "hang", "ab", "abc")])
        assert time.monotonic() - start < 2.5
        after = set(rewards._pool.pids())
    assert [score.value for score in scores] == [0.5, None, 1.0, 1.5]
    assert scores[1].status is Status.TIMEOUT and 0.5 <= scores[1].run_s < 1.5
    assert len(before & after) == len(before) - 1 and len(after) == len(before)


def test_fields_are_declared_by_the_signature(path):
    rewards = build(path, "picky")
    assert rewards.needs() == {"answer", "level"}
    with pytest.raises(ValueError, match=r"rewards.mine .*'level'"):
        rewards.check({"answer"})
    with rewards:
        unused = {"image": object()}  # a column the function does not ask for need not be sendable
        [score] = rewards.score([RewardInput("q", "x", {"answer": "x", "level": 1, **unused})])
    assert score.value == 2.0


def test_messages_and_columns_arrive_as_plain_values(path):
    prompt = [{"role": "user", "content": "hi"}]
    fields = {"when": date(2026, 1, 2), "vector": np.array([1, 2])}
    with build(path, "messages") as rewards:
        good, bad = rewards.score([RewardInput(prompt, "x", fields), RewardInput(prompt, "x", {"image": object()})])
    assert good.value == 1.0
    assert bad.status is Status.ERROR and "object" in bad.info["mine"]["reason"]


def test_a_function_of_a_module():
    with build_rewards(
        {"size": {"function": "operator:concat"}}
    ) as rewards:  # has **no** Python signature to read fields
        [score] = rewards.score([RewardInput("q", "x")])
    assert score.status is Status.ERROR and "'xq'" in score.info["size"]["reason"]


def test_a_module_that_fails_to_import_is_an_error_with_its_reason(tmp_path):
    broken = tmp_path / "broken.py"
    broken.write_text("import not_installed_anywhere\ndef fn(completion, prompt):\n    return 1.0\n")
    with build(broken, "fn") as rewards:
        [score] = rewards.score([RewardInput("q", "x")])
    assert score.status is Status.ERROR and "not_installed_anywhere" in score.info["mine"]["reason"]


def test_loading_time_is_not_charged_to_the_sample(tmp_path):
    slow = tmp_path / "slow.py"
    slow.write_text("import time\ntime.sleep(1.0)\ndef fn(completion, prompt):\n    return 1.0\n")
    with build(slow, "fn", timeout=0.5) as rewards:
        [score] = rewards.score([RewardInput("q", "x")])
    assert score.value == 1.0 and score.run_s < 0.5 < score.queue_s


@pytest.mark.parametrize(
    ("function", "words"),
    [
        ("nothing.py:fn", ["no file", "nothing.py"]),
        ("no_such_package_x.y:fn", ["no module", "no_such_package_x"]),
        ("{path}:nothing_like_it", ["defines no 'nothing_like_it'"]),
        ("{path}:short", ["(completion, prompt, ...)"]),
        ("{path}", ["pkg.module:fn"]),
        (5, ["pkg.module:fn"]),
    ],
)
def test_bad_functions_are_found_at_build(path, function, words):
    given = function.format(path=path) if isinstance(function, str) else function
    with pytest.raises(ValueError) as caught:
        build_rewards({"mine": {"function": given}})
    assert all(word in str(caught.value) for word in ["rewards.mine.function", *words])


def test_unknown_option_next_to_a_function(path):
    with pytest.raises(ValueError, match=r"rewards.mine.timeot.*'timeout'"):
        build(path, timeot=3)
