"""Compares a mathematical answer with the gold one. Runs in a worker only: the text can hang it or eat its memory."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

_EQUALITY = re.compile(r"(?<![<>!\\])=|\\approx|\\equiv")


def make() -> Callable[[Mapping[str, Any]], tuple[float, str] | None]:
    r"""A function of {"gold", "text", "boxed"}: (value, reason), or None if the gold answer cannot be parsed.

    With {"gold"} alone it only says whether the gold can be worked with. math-verify's own timeouts are signals that
    work in main threads only; they are off, the parent's deadline holds.
    """
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, StringExtractionConfig, parse, verify

    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its timeouts are off
    mathematics = (LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig())
    letters = (StringExtractionConfig(strings=tuple("ABCDEFGHIJ")),)

    def read(text: str, config: tuple[Any, ...] = mathematics) -> list[Any]:
        text = re.sub(r"\\mathrm\{([A-Za-z])\}", r"\1", text)  # its parser knows e but not \mathrm{e}
        return parse(text, config, parsing_timeout=None)  # pyright: ignore[reportArgumentType]  (None: no alarm)

    @lru_cache(maxsize=256)
    def read_gold(gold: str) -> list[Any] | None:
        # Bare gold such as \frac{1}{2} or x^2 is misread; in a box it is read as LaTeX.
        parsed = read(f"\\boxed{{{gold}}}")
        return parsed if any(not isinstance(entry, str) for entry in parsed) else None  # text alone: not parsed

    def value_of(side: str) -> Any:
        return next((entry for entry in read(f"\\boxed{{{side}}}") if not isinstance(entry, str)), None)

    def same(one: Any, other: Any, rounded: bool) -> bool:
        if verify([one], [other], timeout_seconds=None):
            return True
        return rounded and bool((abs(one - other) - abs(one) / 100).is_nonpositive)

    def contradicts_itself(answer: str) -> bool:
        """`41=42` states something false. math-verify looks at the last side only, so chains would be free guesses."""
        for statement in re.split(r"[,;]", answer):
            sides = [side for side in _EQUALITY.split(statement) if side.strip()]
            if len(sides) < 2:
                continue
            numbers = [value for value in map(value_of, sides) if getattr(value, "is_number", False)]
            rounded = "\\approx" in statement or "." in statement  # 1/3 = 0.33 is how people write it
            if any(not same(numbers[0], number, rounded) for number in numbers[1:]):
                return True
        return False

    def grade(item: Mapping[str, Any]) -> tuple[float, str] | None:
        gold = read_gold(item["gold"])
        if gold is None:
            return None
        if "text" not in item:
            verify(gold, read("1"), timeout_seconds=None)  # a power tower parses and hangs only here
            return 0.0, ""
        text = f"\\boxed{{{item['text']}}}" if item["boxed"] else item["text"]
        if not item["boxed"] and re.fullmatch("[A-J]", item["gold"]):
            letter = read(text, letters)
            return float(letter[:1] == [item["gold"].lower()]), "by letter"
        answer = read(text)
        if not answer:
            return 0.0, "no mathematical answer found"
        if verify(gold, answer, timeout_seconds=None):
            stated = answer[-1] if isinstance(answer[-1], str) else ""
            if contradicts_itself(stated) and not contradicts_itself(item["gold"]):
                return 0.0, f"the answer {stated!r:.80} contradicts itself"
            return 1.0, ""
        return 0.0, ""

    grade({"gold": "1", "text": "The answer is $\\frac{1}{2}$", "boxed": False})  # builds the grammar and regexes once
    return grade
