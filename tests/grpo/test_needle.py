"""The needle task: exact lengths, answers that stand in the text once, kept depths, the same rows everywhere."""

from __future__ import annotations

import random
import re

import pytest

from grpo.config import DataConfig
from grpo.needle import make_needle
from grpo.sources import load_rows


def test_a_needle_is_where_it_should_be_and_answers_its_question() -> None:
    for number in range(100):
        depth, length = number / 100, 128 + 4 * number
        needle = make_needle(random.Random(number), length, spacing=16, questions=1 + number % 8, depth=depth)
        assert len(needle.prompt + needle.answer) == length
        key = needle.prompt[-1]
        body = needle.prompt[: needle.prompt.index("?")]
        assert re.findall(rf"(?<= ){key}(\d\d)", body) == [needle.answer]  # one needle with that key, and its value
        assert len(re.findall(r" [A-Za-z]\d\d", body)) == length // 16
        at = body.index(f" {key}{needle.answer}") / length
        assert at == needle.depth
    slots = [make_needle(random.Random(i), 512, 16, 1, (i % 10 + 0.5) / 10).depth for i in range(200)]
    assert all(abs(slots[i] - (i % 10 + 0.5) / 10) < 0.2 for i in range(200))
    assert all(sum(int(d * 10) == tenth for d in slots) >= 10 for tenth in range(10))  # every tenth is asked about


def test_rows_are_a_function_of_their_number() -> None:
    config = DataConfig(task="needle", task_options={"length": 80, "spacing": 10, "questions": 2}, size=30, holdout=0)
    rows, held_out = load_rows(config)
    assert held_out == [] and len({row.columns["text"] for row in rows}) == 30
    assert rows[:10] == load_rows(config.model_copy(update={"size": 10}))[0]
    row = rows[7]
    assert row.id == "needle:8" and row.columns["text"] == row.columns["prompt"] + row.columns["answer"]
    assert rows[0].columns["text"] == TEXT  # the same on every machine


TEXT = "s E61 warm the r53 hill O46 is X64 green x34 the C38 sky G69 is m24 bl ?C38 ?r53"


@pytest.mark.parametrize(
    "options, message",
    [
        ({"length": 2000, "spacing": 10}, "makes 200 needles; there must be 1 to 52"),
        ({"length": 40}, "leaves"),
        ({"lenght": 128}, "the options are length, spacing, questions"),
        ({"spacing": 0}, "whole numbers of at least 1"),
    ],
)
def test_options_that_do_not_fit(options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match="task_options") as caught:
        load_rows(DataConfig(task="needle", task_options=options, size=2))
    assert message in str(caught.value) and "\n" not in str(caught.value)
