"""Our rewards in other trainers: called as TRL's and verl's trainers call them."""

from __future__ import annotations

import asyncio
import inspect
import logging
import math
import pickle

import pytest

from rewards import RewardFailure, as_trl, as_verl, build_rewards

SOURCE = """
def score(completion, prompt, answer):
    if completion == "raise":
        raise KeyError("boom")
    if completion == "none":
        return None
    return float(completion == answer)
"""
PROMPTS = ["1+1="] * 2 + ["2+2="] * 2
COLUMNS = {"prompts": PROMPTS, "trainer_state": object(), "environments": None}


@pytest.fixture
def mapping(tmp_path):
    (tmp_path / "mine.py").write_text(SOURCE)
    return {"mine": {"function": f"{tmp_path / 'mine.py'}:score"}, "length": {"weight": 0.5, "max": 4}}


@pytest.fixture
def trl(mapping):
    reward = as_trl(mapping, name="ours", answer_column="solution")
    yield reward
    reward._source.get().close()


def test_trl_gets_totals_and_none_for_what_failed(trl, caplog):
    extra, metrics = {}, {}
    with caplog.at_level(logging.WARNING, "rewards"):
        values = trl(
            completions=["2", "3", "none", "raise"],
            completion_ids=[[1], [1, 2], [1], [1]],
            solution=["2", "2", "4", "4"],
            log_extra=extra.__setitem__,
            log_metric=metrics.__setitem__,
            **COLUMNS,
        )
    assert values == [1.0 - 0.125, -0.25, -0.125, None]
    assert extra == {"ours/mine": [1.0, 0.0, None, None], "ours/length": [-0.25, -0.5, -0.25, -0.25]}
    assert metrics == {"ours/mine": 0.5, "ours/length": -0.3125, "ours/error_share": 0.25}
    assert "1 of 4" in caplog.text and "boom" in caplog.text and "mine" in caplog.text
    assert trl.__name__ == "ours"


def test_trl_chats_and_a_copy_in_another_process(trl):
    copy = pickle.loads(pickle.dumps(trl))
    assert copy.__name__ == "ours" and copy._source._built is None
    chats = [[{"role": "assistant", "content": text}] for text in ("2", "3")]
    blocks = [[{"role": "assistant", "content": [{"type": "text", "text": "4"}]}]]
    prompts = [[{"role": "user", "content": "?"}]] * 3
    values = copy(prompts=prompts, completions=chats + blocks, solution=["2", "2", "4"])
    copy._source.get().close()
    assert values == [1.0, 0.0, 1.0]  # without token ids, the length reward does not apply


def test_trl_errors(trl, mapping):
    with pytest.raises(ValueError, match=r"rewards.mine needs the data field 'answer'"):
        trl(completions=["2"], prompts=["q"], gold=["2"])
    with pytest.raises(ValueError, match=r"unknown reward"):
        as_trl({"exact_mach": 1.0})
    strict = as_trl({"mine": mapping["mine"]}, max_error_share=0.4)
    with pytest.raises(RewardFailure, match=r"2 of 4 .*boom"):
        strict(completions=["raise", "raise", "2", "2"], answer=["2"] * 4, prompts=PROMPTS)
    strict._source.get().close()
    with build_rewards({"exact_match": 1.0}) as built:
        reward = as_trl(built)
        assert reward(prompts=["q"], completions=["<answer>2</answer>"], answer=["2"]) == [1.0]
        with pytest.raises(TypeError, match="mapping"):
            pickle.dumps(reward)


def test_verl_gets_the_same_keys_for_every_sample(mapping, caplog):
    compute_score = as_verl(mapping, failure_score=-2.0)
    assert not inspect.iscoroutinefunction(compute_score)
    with caplog.at_level(logging.WARNING, "rewards"):
        rows = [
            compute_score(data_source="x", solution_str=text, ground_truth="2", extra_info={"index": 1}, further=None)
            for text in ("2", "none", "raise")
        ]
    assert [row["score"] for row in rows] == [1.0, -2.0, -2.0]
    assert {tuple(row) for row in rows} == {("score", "error", "mine", "length")}
    assert rows[0]["error"] == "" and rows[0]["mine"] == 1.0 and math.isnan(rows[0]["length"])
    assert rows[1]["error"].startswith("not_applicable")
    assert rows[2]["error"].startswith("error: mine: KeyError") and "boom" in caplog.text


def test_verl_async_and_fields_of_extra_info():
    when = {"exact_match": {"when": {"data_source": "sums", "level": [1, 2]}}}
    compute_score = as_verl(when, asynchronous=True)
    assert inspect.iscoroutinefunction(compute_score)

    async def several():
        calls = [("sums", 1, "2"), ("sums", 2, "3"), ("sums", 3, "2")]
        return await asyncio.gather(
            *(compute_score(source, f"<answer>{text}</answer>", "2", {"level": n}) for source, n, text in calls)
        )

    assert [row["score"] for row in asyncio.run(several())] == [1.0, 0.0, 0.0]


def test_verl_refuses_what_it_cannot_do(mapping, tmp_path):
    grouped = {"function": mapping["mine"]["function"].replace(":score", ":many"), "style": "trl", "batch": "group"}
    with (tmp_path / "mine.py").open("a") as file:
        file.write("\ndef many(completions, **kwargs):\n    return [1.0] * len(completions)\n")
    with pytest.raises(ValueError, match="compares the samples of a group"):
        as_verl({"mine": grouped})
    with pytest.raises(ValueError, match="'score' would hide"):
        as_verl({"score": mapping["mine"]})
