"""Compares a mathematical answer with the gold one. Runs in a worker only: the text can hang it or eat its memory.

math-verify parses and compares. What stands here besides keeps it from calling equal what is not (chains that
contradict themselves, tiny numbers, restated problems, 4200 % for 42) and different what is equal (decimal commas,
correctly rounded decimals, degrees, inequalities for intervals).
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from typing import Any

_EQUALITY = re.compile(r"(?<![<>!\\])=|\\approx|\\equiv")
_TO_DO = re.compile(r"\\(?:sum|prod|i{1,3}nt|oint|lim)(?![A-Za-z])")
_INEQUALITY = re.compile(r"[<>]|\\[lg]eq?(?![A-Za-z])")
_MEMBER = re.compile(r"\\in(?![A-Za-z])")
_DEGREES = re.compile(r"\^\s*\{?\s*\\circ\s*\}?|\\degree(?![A-Za-z])|°")
_DECIMAL = re.compile(r"(\d+)\.(\d+)")
_DIGITS = 5  # a decimal with as many significant digits may be the rounding of an exact number
_SMALL = 1e-3  # below, math-verify's six decimals are fewer than four significant digits


def make() -> Callable[[Mapping[str, Any]], tuple[float, str] | None]:
    r"""A function of {"gold", "text", "boxed"}: (value, reason), or None if the gold answer cannot be parsed.

    With {"gold"} alone it only says whether the gold can be worked with. math-verify's own timeouts are signals that
    work in main threads only; they are off, the parent's deadline holds.
    """
    from math_verify import StringExtractionConfig

    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its timeouts are off
    letters = (StringExtractionConfig(strings=tuple("ABCDEFGHIJ")),)

    @lru_cache(maxsize=256)
    def read_gold(gold: str) -> list[Any] | None:
        # Bare gold such as \frac{1}{2} or x^2 is misread; in a box it is read as LaTeX.
        parsed = _read(f"\\boxed{{{gold}}}")
        if re.fullmatch(r"-?\d+,\d+", gold) and not re.fullmatch(r"-?\d+,\d{3}", gold):  # a decimal comma, or a list
            parsed = parsed + _read(f"\\boxed{{{gold.replace(',', '.')}}}")[:1]
        return parsed if any(not isinstance(entry, str) for entry in parsed) else None  # text alone: not parsed

    def grade(item: Mapping[str, Any]) -> tuple[float, str] | None:
        gold = read_gold(item["gold"])
        if gold is None:
            return None
        if "text" not in item:
            _verify(gold, _read("1"))  # a power tower parses and hangs only here
            return 0.0, ""
        text = f"\\boxed{{{item['text']}}}" if item["boxed"] else item["text"]
        if not item["boxed"] and re.fullmatch("[A-J]", item["gold"]):
            letter = _read(text, letters)
            return float(letter[:1] == [item["gold"].lower()]), "by letter"
        answer = _read(text)
        if not answer:
            return 0.0, "no mathematical answer found"
        stated = answer[-1] if isinstance(answer[-1], str) else ""
        if not any(same() for same in _comparisons(gold, answer, item["gold"], stated)):
            return 0.0, ""
        objection = _objection(gold, answer, item["gold"], stated, item)
        return (0.0, objection) if objection else (1.0, "")

    grade({"gold": "1", "text": "The answer is $\\frac{1}{2}$", "boxed": False})  # builds the grammar and regexes once
    return grade


@lru_cache(maxsize=1)
def _mathematics() -> tuple[Any, ...]:
    from math_verify import ExprExtractionConfig, LatexExtractionConfig

    return LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig()


def _read(text: str, config: tuple[Any, ...] | None = None) -> list[Any]:
    """[what math-verify makes of the text, the text of it]; [] if it finds nothing, only the text if it is no maths."""
    from math_verify import parse

    text = re.sub(r"\\mathrm\{([A-Za-z])\}", r"\1", text)  # its parser knows e but not \mathrm{e}
    text = re.sub(r"(?<![A-Za-z\\])pi(?![A-Za-z])", r"\\pi", text)
    return parse(text, config or _mathematics(), parsing_timeout=None)  # pyright: ignore[reportArgumentType]  (None: no alarm)


def _verify(gold: list[Any], answer: list[Any], **options: Any) -> bool:
    from math_verify import verify

    return verify(gold, answer, timeout_seconds=None, **options)


def _comparisons(gold: list[Any], answer: list[Any], gold_text: str, stated: str) -> Iterator[Callable[[], bool]]:
    """The ways in which the two may be equal, the cheap and usual ones first."""
    yield lambda: _verify(gold, answer)
    decimals = _shared_decimals(gold_text) or _shared_decimals(stated)
    if decimals:
        yield lambda: _verify(gold, answer, float_rounding=decimals)
    if _INEQUALITY.search(stated) and not _MEMBER.search(gold_text):
        # (-oo, 3) may stand for x < 3; a gold that says x \in ... itself shows the form that was asked for
        yield lambda: _verify(gold, answer, allow_set_relation_comp=True)
    if bool(_DEGREES.search(stated)) != bool(_DEGREES.search(gold_text)) and "pi" in gold_text + stated:
        yield lambda: _verify(_read(f"\\boxed{{{_radians(gold_text)}}}"), _read(f"\\boxed{{{_radians(stated)}}}"))


def _radians(text: str) -> str:
    return _DEGREES.sub(r"\\cdot\\frac{\\pi}{180}", text)


def _shared_decimals(text: str) -> int | None:
    """The decimals to round to where the text has decimals of enough significant digits: 4 for (0.6, 2.6667]."""
    numbers = [(len((whole + part).lstrip("0")), len(part)) for whole, part in _DECIMAL.findall(text)]
    long = [decimals for significant, decimals in numbers if significant >= _DIGITS]
    if not long or any(decimals > min(long) for significant, decimals in numbers if significant < _DIGITS):
        return None
    return min(long) if min(long) < 6 else None


def _objection(gold: list[Any], answer: list[Any], gold_text: str, stated: str, item: Mapping[str, Any]) -> str:
    """Why the answer is none although math-verify calls it equal; "" where it is one."""
    if _contradicts_itself(stated, item) and not _contradicts_itself(gold_text):
        return f"the answer {stated!r:.80} contradicts itself"
    last_side = _EQUALITY.split(re.sub(r"_\s*\{[^{}]*\}", "", stated))[-1]  # not split at the = of \sum_{k=1}
    if _TO_DO.search(last_side) and not _TO_DO.search(gold_text):
        return f"the answer {stated!r:.80} is not worked out"
    one, other = gold[0], answer[0]
    if not (getattr(one, "is_number", False) and getattr(other, "is_number", False)):
        return ""
    values = [value.evalf() for value in (one.doit(), other.doit())]
    if not all(value.is_Float for value in values):
        return ""
    apart, size = abs(values[0] - values[1]), max(map(abs, values))
    if size < _SMALL and apart > _SMALL * size:
        return "equal to six decimals only because both numbers are small"
    percent = "%" in stated and "%" not in gold_text
    if percent and one.is_integer and size > 1 and apart < 1e-9:
        return f"the answer {stated!r:.80} is a hundred times {gold_text!r:.80} percent"
    return ""


def _contradicts_itself(answer: str, item: Mapping[str, Any] | None = None) -> bool:
    """`41=42` states something false. math-verify looks at one side only, so nothing else would object.

    Running text is not a statement as a box is: there a chain that begins with a name is a derivation, where run-on
    equals (x = 3+4 = 7+2 = 9) are common and the last side counts; and where math-verify dropped something (a
    currency, a unit), the sides are quantities, not numbers.
    """
    text = "" if item is None or item["boxed"] else item["text"]
    running = text != ""
    if running and answer not in text:
        return False
    for statement in re.split(r"[,;]", answer):
        sides = [side for side in _EQUALITY.split(statement) if side.strip()]
        if len(sides) < 2:
            continue
        values = [_value(side) for side in sides]
        if running and not getattr(values[0], "is_number", False):
            continue
        numbers = [value for value in values if getattr(value, "is_number", False)]
        rounded = "\\approx" in statement or "." in statement  # 1/3 = 0.33 is how people write it
        if any(not _same_number(numbers[0], number, rounded) for number in numbers[1:]):
            return True
    return False


def _value(side: str) -> Any:
    return next((entry for entry in _read(f"\\boxed{{{side}}}") if not isinstance(entry, str)), None)


def _same_number(one: Any, other: Any, rounded: bool) -> bool:
    if _verify([one], [other]):
        return True
    return rounded and bool((abs(one - other) - abs(one) / 100).is_nonpositive)
