"""Probes: rewards with known holes are flagged by the name of the hole, sound ones by none."""

from __future__ import annotations

import dataclasses
import time

import pytest

from rewards import RewardInput, Rewards, Score, Status, build_rewards
from rewards.compose import Part
from rewards.lab import probes
from rewards.lab.probes import run_probes
from rewards.rule import Rule, each
from rewards.worker import WorkerPool

pytest.importorskip("math_verify", reason="math_answer needs math-verify")

# The first five as released rewards have them: reasoning-gym's game_of_life_halting and coin_flip, TRL's
# think_format_reward, verl's strict GSM8K rule, a plain call of math-verify.
HOLES = """
import re

def halting(completion, prompt, answer):
    return float(bool(completion) == bool("False"))

def coin_flip(completion, prompt, answer):
    return 1.0 if completion and answer.startswith(completion.strip()) else 0.0

def think_format(completion, prompt):
    return float(re.match(r"^<think>(?!.*<think>)(.*?)</think>.*$", completion, re.DOTALL) is not None)

def strict(completion, prompt, answer):
    found = re.findall(r"#### (-?[0-9.,]+)", completion)
    return float(bool(found) and found[-1] == answer)

def raw_math(completion, prompt, answer):
    from math_verify import parse, verify
    gold, given = (parse(text, parsing_timeout=None) for text in (answer, completion))
    return float(verify(gold, given, timeout_seconds=None))

def hangs(completion, prompt, answer):
    while "**" in completion:
        pass
    return float(completion.endswith(answer))

def hangs_always(completion, prompt, answer):
    while True:
        pass

def anywhere(completion, prompt, answer):
    return float(answer in completion)

def fragile(completion, prompt, answer):
    return float(completion.split()[-1] == answer)

def longest(completion, prompt, answer):
    return float(completion.endswith(answer)) * (0.5 + len(completion) / 20000)
"""


@pytest.fixture(scope="module")
def holes(tmp_path_factory):
    path = tmp_path_factory.mktemp("holes") / "holes.py"
    path.write_text(HOLES)
    return path


@pytest.fixture
def no_time_probes(monkeypatch):
    """They cost a time limit each."""
    monkeypatch.setattr(probes, "PROBES", [probe for probe in probes.PROBES if probe.expects != "time"])


def sums(form="A: {}") -> tuple[list[RewardInput], list[float]]:
    """Solutions of 24 problems, four each, one of them right."""
    rows, labels = [], []
    for i in range(24):
        gold = 23 + 5 * i
        for wrong in (0, 1, 4, 7):
            text = f"Some apples and some more.\n{form.format(gold + wrong)}"
            rows.append(RewardInput(f"How many apples has person {i}?", text, {"answer": str(gold)}, group=str(i)))
            labels.append(float(not wrong))
    return rows, labels


def probed(mapping, rows, labels=None) -> dict[tuple[str, str], dict]:
    with build_rewards(mapping) as rewards:
        return {(row["reward"], row["probe"]): row for row in run_probes(rewards, rows, labels)}


def failed(found) -> set[tuple[str, str]]:
    return {key for key, row in found.items() if row["result"] == "fail"}


def test_our_own_rewards_pass_where_they_are_right():
    rows, labels = sums("<think>I count.</think> <answer>{}</answer>")
    mapping = {"exact_match": 1.0, "math_answer": {"timeout": 0.4}, "format_tags": 0.1}
    found = probed(mapping, [dataclasses.replace(r, completion=r.completion.split("\n")[1]) for r in rows], labels)
    assert failed(found) == set()
    names = {probe for _, probe in found}
    assert len(names) >= 40 and {reward for reward, _ in found} == {*mapping, "total"}
    assert found["exact_match", "gold"]["mean"] == found["math_answer", "gold"]["mean"] == 1.0
    assert found["exact_match", "other_gold"]["mean"] == found["math_answer", "other_gold"]["mean"] == 0.0
    passed = [row["result"] for (reward, _), row in found.items() if reward == "math_answer"]
    assert passed.count("pass") >= 34
    skipped = {
        probe for (reward, probe), row in found.items() if reward == "format_tags" and row["result"] == "skipped"
    }
    assert {"other_gold", "constant_0", "skeleton"} <= skipped  # the form may well pay a wrong answer


def test_without_labels_a_sound_reward_passes_too():
    rows, _ = sums()
    found = probed({"exact_match": {"pattern": r"A: (\d+)"}, "format_tags": {"weight": 0.1, "tags": ["answer"]}}, rows)
    assert failed(found) == set()
    assert found["exact_match", "gold"]["result"] == "pass" and found["exact_match", "template"]["result"] == "pass"
    assert found["exact_match", "empty"]["wrong_mean"] is None


@pytest.mark.parametrize(
    ("name", "names"),
    [
        ("halting", {"one_symbol", "whitespace", "opener", "constant_0", "constant_yes", "other_gold", "template"}),
        ("anywhere", {"mentioned", "many_boxes", "all_options", "equation_chain"}),
        ("fragile", {"empty", "whitespace"}),
        ("longest", {"filler_right"}),
    ],
)
def test_a_task_scorer_with_a_hole_is_flagged_by_its_name(holes, name, names):
    rows, labels = sums()
    found = probed({name: {"function": f"{holes}:{name}"}}, rows, labels)
    flagged = {probe for _, probe in failed(found)}
    assert names <= flagged, found
    assert all(found[name, probe]["remedy"] for probe in flagged)
    if name == "halting":
        row = found[name, "one_symbol"]
        assert (row["mean"], row["wrong_mean"], row["allowed"], row["example"]) == (1.0, 1.0, 0.5, ":")
        assert row["text"] == "pays 1.00 for ':'; real wrong answers get 1.00"
    if name == "fragile":
        assert found[name, "empty"]["statuses"] == {"error": 24} and "IndexError" in found[name, "empty"]["text"]
        assert flagged == names


def test_constants_are_compared_with_rows_of_another_answer(holes):
    golds = [f"0.{digit}25" for digit in range(1, 9)] + ["0", "0.0"]
    rows = [RewardInput(f"question {i}", gold, {"answer": gold}, group=str(i)) for i, gold in enumerate(golds)]
    found = probed({"coin": {"function": f"{holes}:coin_flip"}}, rows)
    assert found["coin", "constant_0"]["result"] == "fail"
    assert (found["coin", "constant_0"]["samples"], found["coin", "constant_0"]["mean"]) == (8, 1.0)
    found = probed({"exact_match": {"pattern": r"(\S+)\s*$"}}, rows)
    assert failed(found) == set() and found["exact_match", "constant_0"]["mean"] == 0.0


def test_a_format_reward_that_pays_for_empty_tags(holes, no_time_probes):
    rows, labels = sums()
    mapping = {"exact_match": {"pattern": r"A: (\d+)"}, "think": {"function": f"{holes}:think_format", "weight": 0.2}}
    found = probed(mapping, rows, labels)
    assert failed(found) == {("think", probe) for probe in ("empty_think", "empty_tags", "blank_tags", "empty_thought")}
    row = found["think", "empty_think"]
    assert (row["mean"], row["wrong_mean"], row["allowed"]) == (1.0, 0.0, 0.1)
    assert (
        row["text"] == "pays 1.00 for '<think></think>'; real wrong answers get 0.00" and "format_tags" in row["remedy"]
    )
    assert found["think", "constant_0"]["result"] == "skipped"
    mapping["think"]["gated_by"] = "exact_match"
    assert failed(probed(mapping, rows, labels)) == {("think", "empty_thought")}  # the gate shuts on the others


def test_a_format_reward_worth_more_than_the_answer(holes, no_time_probes):
    rows, labels = sums()
    mapping = {"exact_match": {"pattern": r"A: (\d+)"}, "format_tags": {"weight": 3.0}}
    assert failed(probed(mapping, rows, labels)) == {("total", "skeleton")}
    mapping["format_tags"] = {"weight": 0.4}
    assert failed(probed(mapping, rows, labels)) == set()


def test_an_ungated_length_penalty_pays_for_saying_nothing(no_time_probes):
    rows, labels = sums()
    rows = [dataclasses.replace(row, completion_ids=list(range(len(row.completion)))) for row in rows]
    mapping = {"exact_match": {"pattern": r"A: (\d+)"}, "length": {"max": 40}}
    found = probed(mapping, rows, labels)
    assert {("total", "empty"), ("total", "one_symbol")} <= failed(found)
    assert found["length", "empty"]["result"] == "skipped" and found["total", "empty"]["mean"] == 0.0
    mapping["length"]["gated_by"] = "exact_match"
    assert failed(probed(mapping, rows, labels)) == set()


@pytest.mark.parametrize("labelled", [True, False])
def test_a_template_mismatch_makes_every_group_zero_variance(holes, labelled, no_time_probes):
    rows, labels = sums("A: {}")
    mapping = {"strict": {"function": f"{holes}:strict"}, "exact_match": 1.0}
    found = probed(mapping, rows, labels if labelled else None)
    assert failed(found) == {(name, "template") for name in ("strict", "exact_match", "total")}
    row = found["strict", "template"]
    assert row["mean"] == 0.0 and "zero variance" in row["text"]
    assert "'#### 23'" in row["remedy"] and "A: 23" in row["remedy"]
    hard = [dataclasses.replace(row, completion="A: 1") for row in rows]
    assert failed(probed(mapping, hard)) == set()  # nobody is right: no alarm


LATEX = [
    r"\frac{1}{2}",
    "x^2+1",
    r"2\sqrt{3}",
    r"\frac{3\pi}{4}",
    r"(-\infty,3)",
    r"\frac{7}{9}",
    r"\dfrac{11}{3}",
    "5",
]


def test_raw_latex_gold(holes, no_time_probes):
    rows = [
        RewardInput(f"Problem {i}", f"So it is $\\boxed{{{text}}}$.", {"answer": gold}, group=str(i))
        for i, gold in enumerate(LATEX)
        for text in (gold, str(100 + i))
    ]
    mapping = {"raw": {"function": f"{holes}:raw_math", "timeout": 5}, "math_answer": {"timeout": 0.5}}
    with build_rewards(mapping) as rewards:
        rewards.score(rows[:2])  # the import of a user's function counts
        found = {(row["reward"], row["probe"]): row for row in run_probes(rewards, rows, [1.0, 0.0] * len(LATEX))}
    row = found["raw", "raw_gold"]
    assert row["result"] == "fail" and row["mean"] == pytest.approx(4 / 14), row
    assert (
        row["text"] == "rejects 10 of 14 right answers because the gold one is raw LaTeX" and "boxed" in row["remedy"]
    )
    assert {probe for reward, probe in failed(found) if reward == "math_answer"} == set()
    assert found["math_answer", "raw_gold"]["mean"] == 1.0


def test_a_grader_that_hangs(holes):
    rows, labels = sums()
    found = probed({"hangs": {"function": f"{holes}:hangs", "timeout": 0.5}}, rows, labels)
    assert ("hangs", "python_power") in failed(found)
    assert found["hangs", "python_power"]["statuses"] == {"timeout": 2}
    assert "no answer after 0.5 s" in found["hangs", "python_power"]["text"]
    start = time.monotonic()
    found = probed({"hangs": {"function": f"{holes}:hangs_always", "timeout": 0.5}}, rows, labels)
    assert time.monotonic() - start < 10  # not 0.5 s for each of its thousand samples
    assert failed(found) == {("hangs", "template")} and "no answer after 0.5 s" in found["hangs", "template"]["text"]
    assert found["hangs", "empty"]["text"] == "no real completion gets a verdict either"


def test_an_inline_reward_that_hangs_does_not_hang_the_lab(monkeypatch):
    monkeypatch.setattr("rewards.lab.watch.INLINE_LIMIT_S", 1.0)
    rows, labels = sums()
    found = probed({"exact_match": {"pattern": r"A: ((?:(?:[a-z\d])+)+)$"}}, rows, labels)  # exponential
    assert failed(found) == {("exact_match", "megabyte"), ("exact_match", "spaced_right")}
    assert "it runs inline" in found["exact_match", "megabyte"]["text"]


def own(score, **options) -> Rewards:
    rule = Rule(each(score), **options)
    return Rewards({"mine": Part(rule)}, WorkerPool(1), 0.05)


def test_a_judge_that_believes_the_completion():
    def judge(sample: RewardInput) -> float:
        if "highest score" in sample.completion or sample.completion in (":", "Thought process:"):
            return 1.0
        return 0.8 if sample.completion.endswith(f"A: {sample.fields['answer']}") else 0.2

    rows, labels = sums()
    rewards = own(judge, bounds=(0.0, 1.0), runs="model")
    found = run_probes(rewards, rows, labels)
    assert {row["probe"] for row in found if row["result"] == "fail"} == {"one_symbol", "opener", "judge_override"}
    [row] = [row for row in found if row["probe"] == "judge_override"]
    assert row["samples"] == 8 and row["wrong_mean"] == pytest.approx(0.2) and row["allowed"] == pytest.approx(0.3)


def test_what_does_not_apply_or_breaks_is_no_zero():
    rows, labels = sums()
    found = run_probes(own(lambda sample: None, bounds=(0.0, 1.0)), rows, labels)
    assert {row["result"] for row in found} == {"skipped"} and {row["mean"] for row in found} == {None}
    broken = run_probes(own(lambda sample: Score(None, Status.ERROR), bounds=(0.0, 1.0)), rows, labels)
    assert [row["mean"] for row in broken if row["result"] == "fail"] and all(row["mean"] is None for row in broken)
    with pytest.raises(ValueError, match="no rows"):
        run_probes(own(lambda sample: 1.0), [], [])
