"""The final answer a completion states, whatever its format: what votes are counted by, and how it was written."""

from __future__ import annotations

import re

from rewards.math_answer import last_boxes, tidy
from rewards.text_rules import last_tagged

_LINE = re.compile(r"^\s*(####|A:|(?:the )?(?:final )?answer(?: is)?:?)\s*(.+?)\s*$", re.IGNORECASE | re.MULTILINE)
_NUMBER = re.compile(r"[-+]?\d[\d,]*(?:\.\d+)?(?:/\d+)?")
_GROUPED = re.compile(r"[-+]?\d{1,3}(?:,\d{3})+(?:\.\d+)?")


def final_answer(completion: str) -> tuple[str, str | None]:
    r"""(form, answer) of a completion. Looked for in this order, in what follows the last </think>: the last
    <answer>...</answer>, the last \boxed{...}, the last line `#### n`, `A: n` or `The answer is: n`, the last number.

    The forms are "<answer>", "\boxed", "####", "A:", "answer:", "number" and, without an answer, "none". Thousands
    separators and a leading dollar sign of a number do not count.
    """
    text = completion.rpartition("</think>")[2]
    tagged = last_tagged(text, "answer")
    if tagged is not None:
        boxes = last_boxes(tagged)
        return "<answer>", _plain(boxes[-1] if boxes else tagged)
    boxes = last_boxes(text)
    if boxes:
        return "\\boxed", _plain(boxes[-1])
    lines = _LINE.findall(text)
    if lines:
        mark, answer = lines[-1]
        return mark if mark == "####" else "A:" if mark.upper() == "A:" else "answer:", _plain(answer)
    numbers = _NUMBER.findall(text)
    return ("number", _plain(numbers[-1])) if numbers else ("none", None)


def _plain(answer: str) -> str | None:
    answer = tidy(answer).lstrip("$").strip()
    if _GROUPED.fullmatch(answer):
        answer = answer.replace(",", "")
    return answer or None
