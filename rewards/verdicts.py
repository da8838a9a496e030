"""Verdicts with reasons as SFT data: what trains a policy's checkpoint to be the model of generative_reward."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rewards.generative_reward import prompt_of
from rewards.grading import Grading, refusal
from rewards.judge_text import NoVerdict, on_scale, read_verdict
from rewards.records import RewardInput

COLUMNS = ("prompt", "completion", "reason", "label")


def sft_rows(
    rows: Sequence[tuple[str, Mapping[str, Any]]], how: Grading, chat: bool = False
) -> Iterator[dict[str, Any]]:
    """{"prompt", "completion"} of each (where, row): the very question generative_reward asks, and reason + verdict.

    A row has prompt, completion, reason, label (a number on the scale, or true and false for its ends), answer where
    there is one, and any column that the template names. Rows whose completion the reward answers by itself (empty,
    symbols only) are left out. `chat`: the prompt is one user message, for generative_reward with `chat: true`.
    Raises ValueError naming the row: a missing column, a label off the scale, a reason that hides the verdict.
    """
    for where, row in rows:
        for column in (*COLUMNS, *sorted(how.needs)):
            if row.get(column) is None:
                raise ValueError(f"{where}: no column {column!r}; it has {', '.join(row)}")
        sample = RewardInput(row["prompt"], str(row["completion"]), row)
        label = _label(where, row["label"], how.scale)
        if refusal(sample, how):
            continue
        reason = str(row["reason"]).strip()
        if not reason:
            raise ValueError(f"{where}: the reason is empty; a reward that reasons is trained on reasons")
        completion = f"{reason}\nVerdict: {label:g}"
        try:
            learned = on_scale(read_verdict(completion)[0], how.scale)
        except NoVerdict as error:
            raise ValueError(f"{where}: the verdict cannot be read behind this reason ({error}); mend it") from None
        assert learned == label, f"{where}: {learned=} {label=}"
        question = how.question(how.shows_reference(row))
        prompt = prompt_of(question, how.body(sample))
        yield {"prompt": [{"role": "user", "content": prompt}] if chat else prompt, "completion": completion}


def _label(where: str, label: Any, scale: tuple[int, int]) -> float:
    if isinstance(label, bool):
        return float(scale[label])
    if not isinstance(label, int | float) or not math.isfinite(label) or not scale[0] <= label <= scale[1]:
        raise ValueError(
            f"{where}: the label is {label!r:.50}; give a number from {scale[0]} to {scale[1]} (--scale), or true or "
            "false"
        )
    return float(label)
