"""Functions written for other frameworks run unmodified: the frameworks' signatures, with functions of our own."""

from __future__ import annotations

import json
import time

import pytest

from rewards import RewardInput, Status, build_rewards

CHAT = [{"role": "user", "content": "2+2?"}]
TRL = """
import asyncio
from functools import partial

def accuracy(completions, solution, log_extra=None, log_metric=None, **kwargs):
    texts = [completion[0]["content"] for completion in completions]
    rewards = [None if gold == "?" else float(gold in text) for text, gold in zip(texts, solution)]
    log_extra("gold", list(solution))
    log_metric("accuracy", sum(r or 0.0 for r in rewards) / len(rewards))
    return rewards

async def later(prompts, completions, **kwargs):
    await asyncio.sleep(0.01)
    return [float(len(prompt) + len(text)) for prompt, text in zip(prompts, completions)]

class Length:
    __name__ = "length"
    def __init__(self, scale):
        self.scale = scale
    def __call__(self, completion_ids, **kwargs):
        return [len(ids) / self.scale for ids in completion_ids]

length = Length(4)

def shortest(completions, completion_ids, **kwargs):
    if "bad" in completions:
        raise RuntimeError("no group with bad")
    least = min(map(len, completion_ids))
    return [float(len(ids) == least) for ids in completion_ids]

def curriculum(completions, trainer_state, **kwargs):
    return [float(trainer_state.global_step)] * len(completions)

def too_few(completions, **kwargs):
    return []

def nan(completions, **kwargs):
    return [float("nan")] * len(completions)

def hang(completions, **kwargs):
    while True:
        pass
"""
VERL = """
import asyncio

def compute_score(data_source, solution_str, ground_truth, extra_info=None, **kwargs):
    if data_source != "openai/gsm8k":
        raise LookupError(f"no reward for {data_source}")
    right = solution_str.endswith(ground_truth["target"])
    return {"score": 1.0 if right else -1.0, "acc": right, "pred": solution_str, "split": extra_info["split"]}

async def later(data_source, solution_str, ground_truth, extra_info):
    await asyncio.sleep(0.01)
    return float(solution_str == ground_truth)

def file(model_output: str, ground_truth: str, scale=1.0):  # as verl's own files are, for its dispatcher
    return scale * (model_output == ground_truth), True, "x"

def keyless(data_source, solution_str, ground_truth, extra_info=None):
    return {"reward": 1.0}
"""
OPENRLHF = """
import torch

def reward_func(queries, prompts, labels, **kwargs):
    responses = [query[len(prompt):] for query, prompt in zip(queries, prompts)]
    scores = torch.tensor([float(text == label) for text, label in zip(responses, labels)])
    return {"rewards": scores - 0.5, "scores": scores, "extra_logs": {"accuracy": scores.mean(), "mine": scores * 3}}

def no_labels(queries, prompts, labels, **kwargs):
    return {"rewards": torch.tensor([float(len(q)) for q in queries]), "extra_logs": {"query": queries}}
"""
SLIME = """
import asyncio

async def custom_rm(args, sample, **kwargs):
    await asyncio.sleep(0.01)
    right = sample.response == sample.label
    cut = sample.status == sample.Status.TRUNCATED
    return {"score": float(right), "cut": cut, "level": sample.metadata["level"], "n": sample.response_length}

async def groups(args, samples, **kwargs):
    return [float(sample.response_length == min(s.response_length for s in samples)) for sample in samples]

def plain(args, sample):
    return args.scale * len(sample.response)
"""
VERIFIERS = """
import asyncio

def correct(completion, answer, **kwargs):
    return float(completion[-1]["content"] == answer)

async def style(parser, prompt, completion, info):
    await asyncio.sleep(0.01)
    return parser.mark(prompt[-1]["content"]) + info["bonus"]

def shortest(completions, **kwargs):
    sizes = [len(completion[-1]["content"]) for completion in completions]
    return [float(size == min(sizes)) for size in sizes]

class Parser:
    def mark(self, text):
        return float(text.endswith("?"))

class Rubric:
    def __init__(self, funcs, weights):
        self.funcs, self.weights, self.class_objects = funcs, weights, {"parser": Parser()}

rubric = Rubric([correct, style], [1.0, 0.25])
grouped = Rubric([correct, shortest], [1.0, 0.5])

class Group:
    rubrics = [rubric, Rubric([correct], [2.0])]

both = Group()
"""
OWN = """
import asyncio

async def score(completion, prompt, answer):
    await asyncio.sleep(0.01)
    return float(completion == answer)
"""


@pytest.fixture
def build(tmp_path):
    made = []

    def make(source, function, **options):
        path = tmp_path / "theirs.py"
        path.write_text(source)
        made.append(build_rewards({"mine": {"function": f"{path}:{function}", **options}}))
        return made[-1]

    yield make
    for rewards in made:
        rewards.close()


def chat(text, group="", **fields):
    return RewardInput(CHAT, text, fields, completion_ids=list(range(len(text))), group=group)


def test_trl_gets_messages_columns_and_loggers(build):
    rewards = build(TRL, "accuracy", style="trl")
    assert rewards.needs() == {"solution"}
    scores = rewards.score([chat("it is 4", solution="4"), chat("5", solution="4"), chat("6", solution="?")])
    assert [score.value for score in scores] == [1.0, 0.0, None]
    assert [score.status for score in scores] == [Status.OK, Status.OK, Status.NOT_APPLICABLE]
    info = scores[0].info["mine"]
    assert info["gold"] == "4" and info["accuracy"] == 1.0 and info["status"] == "ok"


def test_trl_async_with_plain_prompts_and_callable_objects(build):
    assert build(TRL, "later", style="trl").score([RewardInput("ab", "cde")])[0].value == 5.0
    length = build(TRL, "length", style="trl")
    with_ids, without = length.score([RewardInput("q", "x", {}, completion_ids=(1, 2, 3)), RewardInput("q", "x")])
    assert with_ids.value == 0.75
    assert without.status is Status.ERROR and "completion_ids" in without.info["mine"]["reason"]


def test_trl_compares_the_samples_of_a_group_when_asked(build):
    inputs = [chat("aa", "1"), chat("bbb", "2"), chat("a", "1"), chat("bbbb", "2")]
    alone, groups = build(TRL, "shortest", style="trl"), build(TRL, "shortest", style="trl", batch="group")
    assert [score.value for score in alone.score(inputs)] == [1.0] * 4
    assert [score.value for score in groups.score(inputs)] == [0.0, 1.0, 1.0, 0.0]
    assert groups.parts["mine"].rule.grouped and not alone.parts["mine"].rule.grouped
    plain = [RewardInput("q", text, completion_ids=[1] * len(text), group=group)
             for text, group in (("a", "1"), ("bad", "1"), ("cc", "2"))]  # fmt: skip
    scores = groups.score(plain)
    assert [score.status for score in scores] == [Status.ERROR, Status.ERROR, Status.OK]
    assert "no group with bad" in scores[0].info["mine"]["reason"]


def test_trl_failures_have_no_value(build):
    state = build(TRL, "curriculum", style="trl").score([chat("a")])[0]
    assert state.status is Status.ERROR and "trainer_state.global_step" in state.info["mine"]["reason"]
    few = build(TRL, "too_few", style="trl").score([chat("a")])[0]
    assert few.status is Status.ERROR and "list of 1" in few.info["mine"]["reason"]
    assert build(TRL, "nan", style="trl").score([chat("a")])[0].status is Status.ERROR
    start = time.monotonic()
    assert build(TRL, "hang", style="trl", timeout=0.5).score([chat("a")])[0].status is Status.TIMEOUT
    assert time.monotonic() - start < 5


def test_verl_functions_and_files(build):
    fields = {"data_source": "openai/gsm8k", "answer": {"target": "4"}, "extra_info": {"split": "test"}}
    rewards = build(VERL, "compute_score", style="verl")
    assert rewards.needs() == {"answer", "data_source"}
    right, wrong = rewards.score([RewardInput("q", text, fields) for text in ("#### 4", "5")])
    [unknown] = rewards.score([RewardInput("q", "4", fields | {"data_source": "x"})])
    assert (right.value, wrong.value) == (1.0, -1.0)
    assert right.info["mine"]["parts"] == {"acc": 1.0}
    assert right.info["mine"]["pred"] == "#### 4" and right.info["mine"]["split"] == "test"
    assert unknown.status is Status.ERROR and "no reward for x" in unknown.info["mine"]["reason"]
    fields = {"data_source": "x", "answer": "4"}
    assert build(VERL, "later", style="verl").score([RewardInput("q", "4", fields)])[0].value == 1.0
    scaled = build(VERL, "file", style="verl", kwargs={"scale": 3})
    assert scaled.needs() == {"answer"}
    assert [s.value for s in scaled.score([RewardInput("q", text, {"answer": "4"}) for text in "45"])] == [3.0, 0.0]
    keyless = build(VERL, "keyless", style="verl").score([RewardInput("q", "4", fields)])[0]
    assert keyless.status is Status.ERROR and "without 'score'" in keyless.info["mine"]["reason"]


def test_openrlhf_gets_queries_and_gives_tensors(tmp_path):
    path = tmp_path / "theirs.py"
    path.write_text(OPENRLHF)
    one = {"function": f"{path}:reward_func", "style": "openrlhf"}
    free = {"function": f"{path}:no_labels", "style": "openrlhf"}
    with build_rewards({"one": one, "whole": {**one, "batch": "group"}, "free": free}, workers=1) as rewards:
        assert {name: set(part.rule.needs) for name, part in rewards.parts.items()} == {
            "one": {"answer"}, "whole": {"answer"}, "free": set()
        }  # fmt: skip
        scores = rewards.score([RewardInput("2+2=", text, {"answer": "4"}, group="g") for text in ("4", "5")])
        chat = rewards.score([RewardInput(CHAT, "4", {"answer": "4"})])[0]
    assert [score.parts["one"] for score in scores] == [score.parts["whole"] for score in scores] == [0.5, -0.5]
    assert scores[0].info["one"]["parts"] == {"accuracy": 1.0, "mine": 3.0, "scores": 1.0}
    assert [score.info["whole"]["parts"]["accuracy"] for score in scores] == [0.5, 0.5]
    assert [score.info["whole"]["parts"]["mine"] for score in scores] == [3.0, 0.0]
    assert chat.parts["free"] == 6.0 and chat.info["free"]["query"] == "2+2?\n4"


def test_slime_gets_a_sample(build):
    rewards = build(SLIME, "custom_rm", style="slime", kwargs={"reward_key": "score"})
    assert rewards.needs() == {"answer"}
    fields = {"answer": "4", "metadata": {"level": 2}}
    right, cut = rewards.score(
        [RewardInput("q", "4", fields, completion_ids=(7, 8)), RewardInput("q", "5", fields, truncated=True)]
    )
    assert (right.value, cut.value) == (1.0, 0.0)
    assert right.info["mine"]["parts"] == {"cut": 0.0, "level": 2.0, "n": 2.0}
    assert cut.info["mine"]["parts"]["cut"] == 1.0
    keyless = build(SLIME, "custom_rm", style="slime").score([RewardInput("q", "4", fields)])[0]
    assert keyless.status is Status.ERROR and "reward_key" in keyless.info["mine"]["reason"]
    groups = build(SLIME, "groups", style="slime", batch="group")
    assert [score.value for score in groups.score([chat("aa", "1"), chat("a", "1"), chat("aaa", "2")])] == [
        0.0,
        1.0,
        1.0,
    ]
    plain = build(SLIME, "plain", style="slime", kwargs={"scale": 2})
    assert plain.needs() == set() and plain.score([RewardInput("q", "abc")])[0].value == 6.0


def test_slime_status_equals_slimes_own():
    from enum import Enum

    from rewards.adapters import SlimeStatus

    theirs = Enum("Status", {"COMPLETED": "completed", "TRUNCATED": "truncated"})
    assert SlimeStatus.TRUNCATED == theirs.TRUNCATED and theirs.TRUNCATED == SlimeStatus.TRUNCATED
    assert SlimeStatus.TRUNCATED != theirs.COMPLETED and {SlimeStatus.ABORTED} == {SlimeStatus("aborted")}


def test_verifiers_functions_and_rubrics(build):
    assert build(VERIFIERS, "correct", style="verifiers").score([chat("4", answer="4")])[0].value == 1.0
    assert build(VERIFIERS, "correct", style="verifiers").needs() == {"answer"}
    sample = chat("4", answer="4", info={"bonus": 0.5})
    score = build(VERIFIERS, "rubric", style="verifiers").score([sample])[0]
    assert score.value == 1.0 + 0.25 * 1.5
    assert score.info["mine"]["parts"] == {"correct": 1.0, "style": 1.5}
    assert build(VERIFIERS, "both", style="verifiers").score([sample])[0].value == 1.0 + 0.25 * 1.5 + 2.0
    inputs = [chat("4", "1", answer="4"), chat("44", "1", answer="4")]
    groups = build(VERIFIERS, "grouped", style="verifiers", batch="group")
    assert [score.value for score in groups.score(inputs)] == [1.5, 0.0]
    alone = build(VERIFIERS, "grouped", style="verifiers").score(inputs)[0]
    assert alone.status is Status.ERROR and "batch: group" in alone.info["mine"]["reason"]


def test_own_functions_may_be_async(build):
    rewards = build(OWN, "score")
    assert rewards.needs() == {"answer"}
    assert [s.value for s in rewards.score([RewardInput("q", text, {"answer": "4"}) for text in "45"])] == [1.0, 0.0]


def test_answers_are_json_values_whatever_the_function_gives():
    import numpy as np
    import torch

    from rewards.adapters import _verdict

    extra = {"a": torch.tensor(2.0), "b": np.array([1, 2]), "c": {"k": object}, "status": "x", "d": float("nan")}
    verdict = json.loads(json.dumps(_verdict(np.float32(0.5), extra)))
    assert verdict["value"] == 0.5 and verdict["parts"] == {"a": 2.0, "d": None}
    assert verdict["info"]["b"] == [1, 2] and verdict["info"]["status_"] == "x"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"style": "tlr"}, ["rewards.mine.style", "'tlr'", "trl"]),
        ({"batch": "all"}, ["rewards.mine.batch", "'all'", "group"]),
        ({"style": "verl", "batch": "group"}, ["rewards.mine.batch", "style verl", "one sample"]),
        ({"kwargs": 3}, ["rewards.mine.kwargs", "mapping"]),
        ({"style": "slime"}, ["(args, sample, ...)"]),
        ({"style": "openrlhf"}, ["(queries, prompts, labels, ...)"]),
    ],
)
def test_bad_options_are_found_at_build(build, options, words):
    with pytest.raises(ValueError) as caught:
        build("def one(completions):\n    return [1.0]\n", "one", **options)
    assert all(word in str(caught.value) for word in words) and "\n" not in str(caught.value)


def test_finding_a_module_does_not_run_the_packages_around_it(tmp_path, monkeypatch):
    (tmp_path / "noisy").mkdir()
    (tmp_path / "noisy" / "__init__.py").write_text("raise RuntimeError('was run')\n")
    (tmp_path / "noisy" / "inner.py").write_text("def fn(completion, prompt, gold):\n    return 1.0\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    rewards = build_rewards({"mine": {"function": "noisy.inner:fn"}})
    assert rewards.needs() == {"gold"}
    with rewards:
        score = rewards.score([RewardInput("q", "x", {"gold": 1})])[0]
    assert score.status is Status.ERROR and "was run" in score.info["mine"]["reason"]
