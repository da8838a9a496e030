"""The math_answer reward: which text is the answer, what is decided here, and what goes to a worker.

Only string work happens in this process. Whatever parses the model's text as mathematics runs in
rewards/math_grader.py behind a deadline.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Mapping, Sequence
from typing import Any

from rewards.records import RewardInput, Score, Status
from rewards.rule import Rule, failure
from rewards.text_rules import answer_part
from rewards.worker import Answer, WorkerPool

TARGET = "rewards.math_grader:make"
_JOINT = re.compile(r"[,;]|\b(?:and|or)\b")  # between two boxes of one answer
_SENTENCE_END = re.compile(r"[.!?]\s|\n\s*\n")
_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
_FINAL = re.compile(r"final answer is:?\s*(?=\$|\\[(\[]|-?\d)", re.IGNORECASE)
_LONGEST_ANSWER = 10_000  # characters; a box that is not closed by then is none, so that braces cannot cost seconds
_LAST_BOXES = 16  # how many are looked at


def last_boxes(text: str, gold: bool = False) -> list[str]:
    r"""The contents of the last closed \boxed{...} (or \fbox), after those joined to it by a comma, "and" or "or".

    Joined means in one sentence and less than 80 characters apart; in a gold answer, which never takes anything back,
    also without a word between. Braces are matched. [] if there is no closed box.
    """
    boxes: list[str] = []
    start_of_next = len(text)
    for start, content in reversed(_boxes(text)):
        between = text[start + len(content) + 1 : start_of_next]
        start_of_next = text.rfind("\\", 0, start)
        joined = _JOINT.search(between) or (gold and not re.search("[A-Za-z]", between))
        if boxes and not (len(between) < 80 and joined and not _SENTENCE_END.search(between)):
            return boxes
        boxes.insert(0, content)
    return boxes


def _boxes(text: str) -> list[tuple[int, str]]:
    """(place, content) of the closed boxes among the last ones. Of nested ones only the inner is an answer."""
    found = []
    for start in _openings(text):
        depth = 1
        for brace in re.finditer(r"\\.|[{}]", text[start : start + _LONGEST_ANSWER], re.DOTALL):
            depth += {"{": 1, "}": -1}.get(brace.group(), 0)
            if depth == 0:
                content = text[start : start + brace.start()]
                found += [] if _BOX.search(content) else [(start, content)]
                break
            if depth > _LONGEST_ANSWER // 100:  # no answer is nested so deep
                break
    return found


def _openings(text: str) -> list[int]:
    """Where the contents of the last boxes begin. Searched from the end: a megabyte may hold 150,000 of them."""
    places = {name: text.rfind(name) for name in ("\\boxed", "\\fbox")}
    found: list[int] = []
    while max(places.values()) >= 0 and len(found) < _LAST_BOXES:
        name = max(places, key=lambda name: places[name])
        match = _BOX.match(text, places[name])
        found.append(match.end() if match else -1)
        places[name] = text.rfind(name, 0, places[name])
    return [start for start in reversed(found) if start >= 0]


def tidy(answer: str) -> str:
    r"""The answer without what surrounds it: $...$, \(...\), \text{...}, (B), a final full stop. `1, 2` is not 12."""
    answer = answer.strip()
    if answer.endswith(".") and not answer.endswith(".."):
        answer = answer[:-1].rstrip()
    for pattern in (
        r"\$\$?([^$]*)\$\$?",
        r"\\[(\[](.*)\\[)\]]",
        r"\\(?:text|textbf|mathrm|mathbf)\{([^{}]*)\}",
        r"\(([A-Z])\)",
    ):
        match = re.fullmatch(pattern, answer, re.DOTALL)
        if match:
            answer = match.group(1).strip()
    return answer


def gold_text(answer: object) -> str:
    r"""The gold answer alone, tidied: the last box and those joined to it, what follows `####`, or the text itself."""
    text = str(answer) if answer is not None else ""
    boxes = last_boxes(text, gold=True)
    return ", ".join(map(tidy, boxes)) if boxes else tidy(text.rpartition("####")[2])


def extract(completion: str, gold: str) -> tuple[str, bool]:
    r"""(the part of a completion that holds its answer, whether it is the answer and nothing else).

    What precedes the last </think> does not count; in the rest the last <answer> pair, in that the last box, unless
    "the final answer is ..." follows it. Where the gold answer is a list, boxes joined to the last one belong to the
    answer: `\boxed{1}` and `\boxed{2}`.
    """
    text, _ = answer_part(completion)
    boxes = last_boxes(text)
    if not boxes:
        return text, False
    final = _FINAL.search(text, text.rfind(boxes[-1] + "}"))
    if final:
        return text[final.start() :], False
    return ", ".join(map(tidy, boxes if "," in gold else boxes[-1:])), True


def math_answer(*, pool: WorkerPool, timeout: float = 3.0, require_box: bool = False) -> Rule:
    r"""1.0 if the completion's final answer equals fields["answer"] as mathematics (math-verify decides), else 0.0.

    The last \boxed{} of the text after </think> is the answer; without a box, math-verify looks for one in the text
    (`require_box`: then 0.0). An answer equal to the gold as a string is right without parsing; no string comparison
    ever makes an answer wrong. A gold answer that cannot be parsed is UNPARSEABLE_GOLD. An answer that takes more
    than `timeout` seconds (a power tower) is the completion's doing: 0.0, with the reason in info. A crashed worker
    is an ERROR. ValueError: math-verify is not installed.
    """
    if importlib.util.find_spec("math_verify") is None:
        raise ValueError("rewards.math_answer needs math-verify; pip install 'grpo-v3[rewards]'")
    pool.preload(TARGET, {})

    def score(inputs: Sequence[RewardInput]) -> list[Score]:
        scores: list[Score | None] = [None] * len(inputs)
        items, places = [], []
        for place, sample in enumerate(inputs):
            gold = gold_text(sample.fields["answer"])
            text, boxed = extract(sample.completion, gold)
            if not gold:
                scores[place] = failure(Status.UNPARSEABLE_GOLD, "the gold answer is empty")
            elif tidy(text) == gold and (boxed or not require_box):
                scores[place] = Score(1.0, info={"by": "string"})
            elif not boxed and (require_box or not text.strip()):
                scores[place] = Score(0.0, info={"reason": "no boxed answer" if require_box else "no answer"})
            else:
                items.append({"gold": gold, "text": text, "boxed": boxed})
                places.append(place)
        answers = pool.run(TARGET, {}, items, timeout)
        slow = sorted({item["gold"] for item, answer in zip(items, answers) if answer.status is Status.TIMEOUT})
        gold_checks = dict(zip(slow, pool.run(TARGET, {}, [{"gold": gold} for gold in slow], timeout)))
        for place, item, answer in zip(places, items, answers, strict=True):
            scores[place] = _verdict(answer, gold_checks.get(item["gold"]), item["gold"])
        assert all(verdict is not None for verdict in scores)
        return scores  # type: ignore[return-value]

    def perfect(fields: Mapping[str, Any]) -> str | None:
        gold = gold_text(fields["answer"])
        return f"\\boxed{{{gold}}}" if gold else None

    return Rule(score, frozenset({"answer"}), (0.0, 1.0), runs="worker", perfect=perfect)


def _verdict(answer: Answer, gold_check: Answer | None, gold: str) -> Score:
    """The Score of a worker's answer. A timeout is the completion's, unless the gold answer alone takes too long."""
    queue_s, run_s = answer.queue_s, answer.run_s
    if answer.status is Status.TIMEOUT:
        if gold_check is None or gold_check.status is not Status.OK or gold_check.result is None:
            return failure(
                Status.UNPARSEABLE_GOLD,
                f"the gold answer {gold!r:.80} takes too long to check",
                queue_s=queue_s,
                run_s=run_s,
            )
        info = {"reason": f"the answer took too long to check: {answer.reason}", "timed_out": True}
        return Score(0.0, info=info, queue_s=queue_s, run_s=run_s)
    if answer.status is not Status.OK:
        return failure(answer.status, answer.reason, queue_s=queue_s, run_s=run_s)
    if answer.result is None:
        return failure(
            Status.UNPARSEABLE_GOLD,
            f"the gold answer {gold!r:.80} cannot be parsed as mathematics",
            queue_s=queue_s,
            run_s=run_s,
        )
    value, reason = answer.result
    return Score(float(value), info={"reason": reason} if reason else {}, queue_s=queue_s, run_s=run_s)
