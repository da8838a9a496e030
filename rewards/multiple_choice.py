"""The multiple_choice reward: one option, named by its letter or its text."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from rewards.math_answer import last_boxes, tidy
from rewards.records import RewardInput, Status
from rewards.rule import Rule, Verdict, each, failure
from rewards.text_rules import answer_part

LETTERS = "ABCDEFGHIJ"
_MARK = re.compile(r"\b(?:answer|choice|option)(?: is:?|:)", re.IGNORECASE)
_LED = re.compile(r"(?:(?:the )?(?:correct )?(?:answer|choice|option)\b(?: is)?[ :]*)?(.*)", re.IGNORECASE | re.DOTALL)
_LETTER = re.compile(r"[*_(\[]*([A-Za-z])(?![A-Za-z0-9])[*_)\]]*[.:,)]*(.*)", re.DOTALL)
_LONGEST = 500  # characters of the text that names the option


def multiple_choice(*, choices: str = "choices") -> Rule:
    r"""1.0 if the completion names the right option and no other, else 0.0.

    fields["answer"] is a letter (`B`, `(B)`), the text of an option, or its number from 0 (an int, as in MMLU).
    `choices` is the column of the options' texts (a list, or a mapping of letter to text); rows without it take letters
    only. A completion names its option in the last <answer> pair, else in the last \boxed{}, else after the last
    "answer is" or "answer:", else in its last line, which may then hold nothing else. A second letter, or the text of
    another option, makes it no answer, so listing the options never pays.
    """

    def score(sample: RewardInput) -> Verdict:
        texts = _texts(sample.fields.get(choices))
        gold = _gold(sample.fields["answer"], texts)
        if gold is None:
            return failure(
                Status.UNPARSEABLE_GOLD,
                f"the gold answer {sample.fields['answer']!r:.80} is no option of {texts!r:.80}",
            )
        return float(named_option(sample.completion, texts) == gold)

    def perfect(fields: Mapping[str, Any]) -> str | None:
        gold = _gold(fields["answer"], _texts(fields.get(choices)))
        return f"<answer>{gold}</answer>" if gold else None

    return Rule(each(score), frozenset({"answer"}), (0.0, 1.0), perfect=perfect)


def named_option(completion: str, texts: Mapping[str, str]) -> str | None:
    """The letter of the one option that the completion names; None if it names none, or more than one."""
    text, tagged = answer_part(completion)
    boxes = last_boxes(text)
    if boxes:
        return _option(boxes[-1], texts)
    if tagged:
        return _option(text, texts)
    end = None
    for mark in _MARK.finditer(text):
        end = mark.end()
    if end is not None:
        return _option(text[end:].lstrip().partition("\n")[0], texts)
    return _option(text.rstrip().rpartition("\n")[2], texts, alone=True)


def _option(text: str, texts: Mapping[str, str], alone: bool = False) -> str | None:
    """`alone`: nothing but an option may stand there ("A dog barks" begins with a letter and names nothing)."""
    if len(text) > _LONGEST:
        return None
    text = tidy(text)
    plain = _plain(text)
    by_text = [letter for letter, option in texts.items() if option and option == plain]
    if by_text:
        return by_text[0] if len(by_text) == 1 else None
    led = _LED.fullmatch(text)
    match = _LETTER.fullmatch(led.group(1).strip() if led else text)
    if match is None:
        return None
    letter, rest = match.group(1), match.group(2)
    if letter.islower() and rest.strip():  # "a dog" is an article
        return None
    letter = letter.upper()
    if letter not in (texts or LETTERS):
        return None
    if _plain(rest) in ("", texts.get(letter, "")):
        return letter
    others = [other for other in (texts or LETTERS) if other != letter]
    if alone or any(re.search(rf"(?<![A-Za-z]){other}(?![A-Za-z])", rest) for other in others):
        return None
    return None if any(texts.get(other) and texts[other] in _plain(rest) for other in others) else letter


def _texts(column: Any) -> dict[str, str]:
    """Letter -> text of the option, plain. {} if the row has no options."""
    if isinstance(column, Mapping):
        if isinstance(column.get("text"), Sequence) and isinstance(column.get("label"), Sequence):  # as ARC has them
            return {str(label).upper(): _plain(str(text)) for label, text in zip(column["label"], column["text"])}
        return {str(letter).upper(): _plain(str(text)) for letter, text in column.items()}
    if isinstance(column, str) or not isinstance(column, Sequence):
        return {}
    return {letter: _plain(str(text)) for letter, text in zip(LETTERS, column)}


def _gold(answer: Any, texts: Mapping[str, str]) -> str | None:
    if isinstance(answer, int) and not isinstance(answer, bool):
        letters = list(texts) or list(LETTERS)
        return letters[answer] if 0 <= answer < len(letters) else None
    return _option(str(answer), texts, alone=True) if answer is not None else None


def _plain(text: str) -> str:
    return " ".join(text.split()).strip(" .*_$").casefold()
