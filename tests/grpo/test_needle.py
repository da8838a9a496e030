"""The needle task: exact lengths, answers that stand in the text once, kept depths, the same rows everywhere."""

from __future__ import annotations

import random
import re

import pytest

from grpo.config import DataConfig
from grpo.needle import KEYS, make_needle
from grpo.sources import load_rows


def tokens(text: str) -> list[str]:
    return re.findall(r"<\w\w>|.", text)


def test_a_needle_is_where_it_should_be_and_answers_its_question() -> None:
    tenths = [0] * 10
    for number in range(200):
        wanted, length = (number + 0.5) / 200, 128 + 2 * number
        needle = make_needle(random.Random(number), length, wanted)
        text = tokens(needle.prompt + needle.answer)
        assert len(text) == length and text[-1] == needle.answer and text[-3:-1] == ["?", needle.answer[1]]
        assert text.count(needle.answer) == 2  # hidden once, and the answer
        assert text.index(needle.answer) == pytest.approx(length * needle.depth)
        assert abs(needle.depth - wanted) < 0.25
        tenths[int(10 * needle.depth)] += 1
        hidden = [t for place, t in enumerate(text) if len(t) > 1 and text[place - 2] != "?"]
        assert sorted(t[1] for t in hidden) == list(KEYS)
        for place in (place for place, t in enumerate(text) if t == "?"):  # each is asked about after it, rightly
            key, answer = text[place + 1 : place + 3]
            assert answer[1] == key and text.index(answer) < place
    assert min(tenths) >= 10  # every tenth of the context is asked about


def test_rows_are_a_function_of_their_number() -> None:
    config = DataConfig(task="needle", task_options={"length": 120}, size=30, holdout=0)
    rows, held_out = load_rows(config)
    assert held_out == [] and len({row.columns["text"] for row in rows}) == 30
    assert rows[:10] == load_rows(config.model_copy(update={"size": 10}))[0]
    row = rows[7]
    assert row.id == "needle:8" and row.columns["text"] == row.columns["prompt"] + row.columns["answer"]
    assert rows[0].columns["text"] == TEXT  # the same on every machine


TEXT = (
    "p <E3> <G4> the sun <D5> is warm <H6> the <F9> ?H<H6> hill is green <A5> ?A<A5> the <B8> s"
    "ky is ?E<E3> ?D<D5> blue <C8> ?G<G4> the ?B<B8> sea ?C<C8> is deep the  ?F<F9>"
)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"length": 113}, "length 113 is too short for 8 needles with their questions; it must be at least 114"),
        ({"lenght": 128}, "the one option is length"),
        ({"length": 1.5}, "the one option is length"),
    ],
)
def test_options_that_do_not_fit(options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match="task_options") as caught:
        load_rows(DataConfig(task="needle", task_options=options, size=2))
    assert message in str(caught.value) and "\n" not in str(caught.value)
