"""generative_reward with a `generate` of the test's own and over an endpoint; votes; verdicts as SFT rows."""

from __future__ import annotations

import pytest

from rewards import RewardInput, Status, build_rewards
from rewards.grading import grading
from rewards.verdicts import sft_rows


def score(generate, *texts, fields=None, **options):
    with build_rewards({"generative_reward": options}, generate=generate) as rewards:
        return rewards.score([RewardInput("2 + 2?", text, fields or {}) for text in texts])


def test_reasons_come_first_and_the_last_line_is_the_verdict():
    asked = []

    def generate(prompts):
        asked.extend(prompts)
        return [
            "It says four.\nVerdict: 1" if "\nfour\n" in prompt else "Verdict: 1 if right.\nVerdict: 0"
            for prompt in prompts
        ]

    scores = score(generate, "four", "five", "four", ".", fields={"answer": "4"})
    assert [item.value for item in scores] == [1.0, 0.0, 1.0, 0.0]
    assert scores[0].info["generative_reward"]["explanation"] == "It says four."
    assert len(asked) == 2  # equal texts once, "." never
    assert all("<reference>\n4\n</reference>" in prompt and "from 0 to 1" in prompt for prompt in asked)
    score(generate, "four", reference="never", fields={"answer": "4"})
    assert "<reference>" not in asked[-1]


def test_no_verdict_and_no_text_are_errors():
    texts = {"a": "Well.", "b": None, "c": "<think>Verdict: 1"}
    scores = score(lambda prompts: [texts[p.split("<response>\n")[1][0]] for p in prompts], "a", "b", "c")
    assert [item.status for item in scores] == [Status.ERROR] * 3
    reasons = [item.info["generative_reward"]["reason"] for item in scores]
    assert "no verdict" in reasons[0] and "longer than the model's context" in reasons[1] and "reasoning" in reasons[2]


@pytest.mark.parametrize(
    ("votes", "value"),
    [
        (["1", "0", "1"], 1.0),
        (["0", "0", "1"], 0.0),
        (["1", "0", "1", "0"], 0.5),  # undecided
        (["1", "1", "?", "?"], 1.0),  # half of the votes count
        (["1", "?", "?"], None),
    ],
)
def test_the_majority_of_the_votes_decides(votes, value):
    def generate(prompts):
        assert len(prompts) == len(votes) and len(set(prompts)) == 1
        return [f"So.\nVerdict: {vote}" for vote in votes]

    [item] = score(generate, "text", votes=len(votes), temperature=1.0)
    assert item.value == value
    if value is not None:
        assert item.info["generative_reward"]["votes"] == {v: votes.count(v) for v in dict.fromkeys(votes) if v != "?"}
        assert item.info["generative_reward"]["unread"] == votes.count("?")
    else:
        assert item.status is Status.ERROR


def test_over_an_endpoint_each_vote_has_a_seed_of_its_own(serve, says):
    pytest.importorskip("httpx2")
    with serve(lambda request, _: says(f"Hm.\nVerdict: {int(request['seed'] > 7)}")) as server:
        options = {"base_url": server.url, "model": "judge-7b", "votes": 3, "temperature": 0.7, "seed": 7}
        with build_rewards({"generative_reward": options}) as rewards:
            [item] = rewards.score([RewardInput("q", "text")])
        assert sorted(request["seed"] for request in server.requests) == [7, 8, 9]
        assert "response_format" not in server.requests[0]
    assert item.value == 1.0 and item.info["generative_reward"]["votes"] == {"1": 2, "0": 1}
    assert item.info["generative_reward"]["usage"]["requests"] == 3


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, ["rewards.generative_reward", "no model", "base_url"]),
        ({"model": "runs/rm"}, ["rewards.generative_reward.model", "runs/rm", "base_url"]),
        ({"votes": 3}, ["rewards.generative_reward.votes", "temperature"]),
        ({"votes": 0}, ["rewards.generative_reward.votes", "0"]),
        ({"temperature": "hot"}, ["rewards.generative_reward.temperature", "hot"]),
    ],
)
def test_bad_options_are_one_clear_line(options, words):
    with pytest.raises(ValueError) as caught:
        build_rewards({"generative_reward": options})
    assert all(word in str(caught.value) for word in words) and "\n" not in str(caught.value)


ROW = {"prompt": "2 + 2?", "completion": "<think>hm</think>four", "answer": "4", "reason": "Right.", "label": True}


def test_verdicts_are_the_very_question_and_an_answer_that_reads_back():
    asked = []
    how = grading("generative_reward", scale=(0, 1))
    rows = [ROW, ROW | {"answer": "", "label": 0}, ROW | {"completion": "."}]
    [row, bare] = sft_rows([(f"f:{line}", each) for line, each in enumerate(rows)], how)
    assert (row["completion"], bare["completion"]) == ("Right.\nVerdict: 1", "Right.\nVerdict: 0")

    def learnt(prompts):
        asked.extend(prompts)
        return [row["completion"]] * len(prompts)

    assert score(learnt, ROW["completion"], fields={"answer": "4"})[0].value == 1.0
    assert score(learnt, ROW["completion"])[0].value == 1.0
    assert asked == [row["prompt"], bare["prompt"]]
    [chat] = sft_rows([("f:1", ROW)], how, chat=True)
    assert chat["prompt"] == [{"role": "user", "content": row["prompt"]}]
    [graded] = sft_rows([("f:1", ROW | {"label": 7.5})], grading("generative_reward", scale=(0, 10)))
    assert graded["completion"].endswith("\nVerdict: 7.5")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"label": 2}, ["f:9", "label", "2", "--scale"]),
        ({"label": "yes"}, ["f:9", "label", "yes"]),
        ({"reason": " "}, ["f:9", "reason"]),
        ({"reason": None}, ["f:9", "'reason'"]),
        ({"reason": "<think>never ends"}, ["f:9", "verdict cannot be read"]),
    ],
)
def test_rows_that_would_teach_nonsense_are_named(change, words):
    with pytest.raises(ValueError) as caught:
        list(sft_rows([("f:9", ROW | change)], grading("generative_reward", scale=(0, 1))))
    assert all(word in str(caught.value) for word in words)
