"""Rewards read off the completion with a regular expression: an exact answer, a well-formed layout."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from rewards.records import RewardInput
from rewards.rule import Rule, each


def last_tagged(text: str, tag: str) -> str | None:
    """The text inside the last closed <tag>...</tag> pair, or None."""
    end = text.rfind(f"</{tag}>")
    start = text.rfind(f"<{tag}>", 0, max(end, 0))
    return text[start + len(tag) + 2 : end] if end >= 0 and start >= 0 else None


def answer_part(completion: str) -> tuple[str, bool]:
    """(the part that may hold the answer, whether it stood in <answer>).

    It is the content of the last <answer> pair after the last </think>, or all that follows that.
    """
    text = completion.rpartition("</think>")[2]
    tagged = last_tagged(text, "answer")
    return (text, False) if tagged is None else (tagged, True)


def _visible(character: str) -> bool:
    return character.isprintable() and not character.isspace()  # a zero-width space is neither space nor visible


def exact_match(*, tag: str | None = None, pattern: str | None = None) -> Rule:
    """1.0 if the extracted text equals fields["answer"] after strip(), else 0.0; nothing extracted is 0.0.

    `tag` (default "answer"): extract what is inside the last <tag>...</tag>. `pattern` instead: a regular expression
    with one group; its last match counts. The comparison is of whole strings, so listing every option never pays. An
    empty gold answer is never matched. ValueError: both given, or a pattern that does not compile or has not exactly
    one group.
    """
    if tag is not None and pattern is not None:
        raise ValueError("rewards.exact_match has both tag and pattern; keep one of them")
    regex: re.Pattern[str] | None = None
    if pattern is not None:
        if not isinstance(pattern, str):
            raise ValueError(
                f"rewards.exact_match.pattern is {pattern!r}; give text, in quotes where YAML reads more into it"
            )
        try:
            regex = re.compile(pattern, re.DOTALL)
        except re.error as error:
            raise ValueError(f"rewards.exact_match.pattern {pattern!r} is not a regular expression: {error}") from None
        if regex.groups != 1:
            raise ValueError(
                f"rewards.exact_match.pattern {pattern!r} has {regex.groups} groups; put one (...) around the answer"
            )

    def score(sample: RewardInput) -> float:
        if regex is None:
            found = last_tagged(sample.completion, tag or "answer")
        else:
            found = None
            for match in regex.finditer(sample.completion):
                found = match.group(1)
        gold = str(sample.fields["answer"]).strip()
        return float(found is not None and gold != "" and found.strip() == gold)

    def perfect(fields: Mapping[str, Any]) -> str | None:
        gold = str(fields["answer"]).strip()
        return f"<{tag or 'answer'}>{gold}</{tag or 'answer'}>" if gold and regex is None else None

    return Rule(each(score), frozenset({"answer"}), (0.0, 1.0), perfect=perfect)


def format_tags(*, tags: Sequence[str] = ("think", "answer"), prefix: str = "") -> Rule:
    """1.0 if the completion is exactly <a>..</a> <b>..</b> for the tags in order, else 0.0.

    Each tag opens and closes exactly once, nothing but whitespace stands outside, and no pair is empty: the last one,
    the answer, has something visible in it, those before have a letter or a digit (<think>.</think> is no thought).
    `prefix` is text the chat template already wrote (such as "<think>"), put in front of the completion. ValueError: no
    tags, or one that is no plain name.
    """
    if isinstance(tags, str) or not tags or len(set(tags)) < len(tags):
        raise ValueError(
            f'rewards.format_tags.tags is {tags!r}; give a list of different names, such as ["think", "answer"]'
        )
    for tag in tags:
        if not re.fullmatch(r"[A-Za-z_][\w-]*", str(tag)):
            raise ValueError(f"rewards.format_tags.tags has {tag!r}; give the bare name, such as think")
    marks = [mark for tag in tags for mark in (f"<{tag}>", f"</{tag}>")]

    def score(sample: RewardInput) -> float:
        text = prefix + sample.completion
        if any(text.count(mark) != 1 for mark in marks):
            return 0.0
        pieces = re.split("|".join(map(re.escape, marks)), text)  # outside, inside, outside, ..., outside
        in_order = re.findall("|".join(map(re.escape, marks)), text) == marks
        empty_outside = not any(piece.strip() for piece in pieces[0::2])
        *thoughts, answer = pieces[1::2]
        thought_of = all(any(map(str.isalnum, thought)) for thought in thoughts)
        return float(in_order and empty_outside and thought_of and any(map(_visible, answer)))

    return Rule(each(score), bounds=(0.0, 1.0))
