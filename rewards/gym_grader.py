"""Scores an answer to a reasoning-gym row. Runs in a worker only: the library's scorers may hang or raise on junk."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from rewards.gym_checks import CHECKS, FIRST

_NO_NUMBER = re.compile(r"(?<![^\W\d_])[-+]?(?:nan|inf|infinity)(?![^\W\d_])", re.IGNORECASE)


def make(name: str) -> Callable[[Mapping[str, Any]], tuple[float, str] | None]:
    """A function of {"answer", "gold", "metadata"}: (1.0 or 0.0, why), or None if the gold answer does not get 1.

    Of the library's partial marks none is paid: most of its holes are there. An exception is the answer's doing if the
    gold answer passes.
    """
    from reasoning_gym.factory import get_score_answer_fn

    check, first = CHECKS.get(name), FIRST.get(name)
    own: Any = get_score_answer_fn(name)

    def right(answer: str, item: Mapping[str, Any]) -> bool:
        if check is not None:
            return check(answer, item["gold"], item["metadata"])
        if _NO_NUMBER.search(answer) and not _NO_NUMBER.search(item["gold"]):
            return False  # it compares as equal to, or as near as, any number
        if first is not None and not first(answer, item["gold"], item["metadata"]):
            return False
        return own(answer, {"answer": item["gold"], "metadata": item["metadata"]}) >= 1.0

    def grade(item: Mapping[str, Any]) -> tuple[float, str] | None:
        if "answer" not in item:
            return (1.0, "") if right(item["gold"], item) else None
        try:
            return float(right(item["answer"], item)), ""
        except Exception as error:  # the reward boundary: what a scorer raises on junk is of any type
            try:
                passes = right(item["gold"], item)
            except Exception:  # then the row is at fault
                passes = False
            return (0.0, f"{type(error).__name__}: {error}"[:200]) if passes else None

    return grade
