"""The gsm8k_answer reward: a final number after `####`, `A:` or "the answer is", compared exactly."""

from __future__ import annotations

import re
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

from rewards.math_answer import last_boxes
from rewards.records import RewardInput, Status
from rewards.rule import Rule, Verdict, each, failure
from rewards.text_rules import answer_part

_MARK = re.compile(r"####|^[ \t*]*A:|\banswer(?: is:?|:)", re.IGNORECASE | re.MULTILINE)
_NUMBER = re.compile(
    r"(?<![\w.,])([-\u2212]?) ?[$\u20ac\u00a3\u00a5]? ?([-\u2212]?)"
    r"([0-9]{1,3}(?:,[0-9]{3})+(?:\.[0-9]+)?|[0-9]+(?:\.[0-9]+)?|\.[0-9]+)"
    r"(?: ?/ ?([0-9]+))?(?![0-9])"
)
_LINE = 200  # characters of the line that are read; a longer one is no answer
_TAIL = 1000  # characters from the end in which a number without a mark is looked for


def gsm8k_answer(*, strict: bool = False) -> Rule:
    r"""1.0 if the completion's final number equals that of fields["answer"], else 0.0.

    The gold answer ends in `#### n` (GSM8K) or `A: n` (its model solutions), or is a number. In a completion the last
    mark counts: `####`, `A:` at the start of a line, "answer is" or "answer:"; the rest of its line must hold one
    number and no other. Without a mark the last \boxed{} counts, then the last number in the text (`strict`: neither
    does). Signs, thousands commas, currencies, units, decimals, fractions and final full stops are read: `$1,200.00.`
    is 1200. What precedes the last </think>, or stands outside the last <answer> pair, does not count.
    """

    def score(sample: RewardInput) -> Verdict:
        gold = gold_number(sample.fields["answer"])
        if gold is None:
            end = str(sample.fields["answer"])[-80:]
            return failure(Status.UNPARSEABLE_GOLD, f"the gold answer ends in no single number: {end!r}")
        return float(final_number(sample.completion, strict) == gold)

    def perfect(fields: Mapping[str, Any]) -> str | None:
        gold = gold_number(fields["answer"])
        return None if gold is None else f"#### {gold}"

    return Rule(each(score), frozenset({"answer"}), (0.0, 1.0), perfect=perfect)


def gold_number(answer: object) -> Fraction | None:
    """The number that a gold answer ends in; None if there is none, or more than one."""
    text = "" if answer is None else str(answer)
    marked = _after_last_mark(text)
    return _only_number(text if marked is None else marked)


def final_number(completion: str, strict: bool = False) -> Fraction | None:
    """The number that a completion gives as its answer; None if it gives none, or several."""
    text, tagged = answer_part(completion)
    marked = _after_last_mark(text)
    if marked is not None:
        boxes = last_boxes(marked)
        return _only_number(boxes[-1] if boxes else marked)
    if tagged and not last_boxes(text):
        return _only_number(text)
    if strict:
        return None
    boxes = last_boxes(text)
    if boxes:
        return _only_number(boxes[-1])
    numbers = _numbers(text[-_TAIL:])
    return numbers[-1] if numbers else None


def _after_last_mark(text: str) -> str | None:
    """The rest of the line after the last mark, or None without a mark."""
    end = None
    for match in _MARK.finditer(text):
        end = match.end()
    if end is None:
        return None
    line = text[end : end + 2 * _LINE].lstrip().partition("\n")[0]
    return line if len(line) <= _LINE else ""


def _only_number(text: str) -> Fraction | None:
    if len(text) > _LINE:
        return None
    found = _numbers(text)
    digits_outside = re.search("[0-9]", _NUMBER.sub("", text))  # part of something that is no plain number: 2x, 1,22
    return found[0] if len(found) == 1 and not digits_outside else None


def _numbers(text: str) -> list[Fraction]:
    found = []
    for sign, inner_sign, digits, divisor in _NUMBER.findall(text):
        if divisor and not int(divisor):
            continue
        value = Fraction(digits.replace(",", "")) / int(divisor or 1)
        found.append(-value if sign or inner_sign else value)
    return found
