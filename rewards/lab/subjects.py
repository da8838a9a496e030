"""What is probed: each reward and the total, with what it is for, what its numbers mean and how it wants an answer."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from rewards.compose import Part, Rewards
from rewards.math_answer import gold_text
from rewards.records import RewardInput, Score

Result = Literal["pass", "fail", "skipped"]
TOTAL = "total"
PROBED_ROWS, MODEL_ROWS = 32, 8  # a model's verdicts are dear
REFERENCE_ROWS = 64  # real completions scored, of right ones and of wrong ones
_TEMPLATES = (
    "{}",
    "\\boxed{{{}}}",
    "<answer>{}</answer>",
    "#### {}",
    "A: {}",
    "Answer: {}",
    "The answer is {}.",
    "<think>I work it out.</think>\n<answer>{}</answer>",
    "<think>I work it out.</think>\nThe answer is \\boxed{{{}}}.",
)


@dataclass(frozen=True, slots=True)
class Real:
    """Real completions: rows, their labels as right (True), wrong (False) or unknown, and every part's scores."""

    rows: Sequence[RewardInput]
    right: Sequence[bool | None]
    parts: Mapping[str, Sequence[Score]]
    totals: Sequence[Score]


@dataclass(frozen=True, slots=True)
class Subject:
    """A reward or the total. `low` to `high` is what it can give, `wrong` and `right` what real answers get."""

    name: str
    purpose: Literal["task", "quality", "form", "total"]
    part: Part | None  # None: the total
    rows: Sequence[RewardInput]  # one a prompt, those it is for
    writer: Callable[[RewardInput, str], str]  # an answer in the form it reads
    complete: Callable[[RewardInput], str | None]  # what it must pay in full on that row
    declared: bool  # `complete` comes from the reward itself
    low: float
    high: float
    wrong: float | None
    right: float | None
    labelled: bool  # `wrong` and `right` come from labels, not from the reward's own verdicts

    @property
    def span(self) -> float:
        return self.high - self.low

    def value(self, score: Score, total: Score) -> float | None:
        """What counts of a scoring: a reward of the form with its gate, as it is paid."""
        if self.part is None:
            return total.value
        gated = self.purpose == "form" and self.part.gated_by is not None
        return total.terms.get(self.name) if gated else score.value

    def outcome(
        self,
        probe: str,
        what: str,
        result: Result,
        text: str,
        remedy: str = "",
        facts: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        """The row that says what became of a probe."""
        row: dict[str, Any] = {"reward": self.name, "probe": probe, "what": what, "result": result, "text": text}
        nothing = {"samples": 0, "mean": None, "highest": None, "allowed": None, "statuses": {}, "seconds": 0.0}
        row |= {**nothing, "example": "", "wrong_mean": self.wrong if self.labelled else None, **(facts or {})}
        return {**row, "example": row["example"][:300], "remedy": remedy if result == "fail" else ""}


def short_gold(row: RewardInput) -> str:
    """The gold answer without the solution before it (`A: 18`, `#### 18`, a box); "" where there is none."""
    text = gold_text(row.fields.get("answer"))
    return text.rpartition("A: ")[2].strip() if "\n" in text else text


def with_gold(row: RewardInput, gold: str) -> RewardInput:
    """The row with another gold answer, in every column that holds it."""
    own = row.fields.get("answer")
    return replace(row, fields={key: gold if value == own else value for key, value in row.fields.items()})


def mean(values: Sequence[float | None]) -> float | None:
    """Of those that are numbers; None if none is."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def real_completions(rewards: Rewards, rows: Sequence[RewardInput], labels: Sequence[float | None]) -> Real:
    """Up to REFERENCE_ROWS each of those labelled right, wrong and not at all, scored."""
    known = [label for label in labels if label is not None]
    middle = (min(known) + max(known)) / 2 if known and not set(known) <= {0, 1} else 0.5
    right = [None if label is None else label > middle for label in labels]
    places = sorted(
        place
        for kind in (True, False, None)
        for place in _spread([place for place, value in enumerate(right) if value is kind], REFERENCE_ROWS)
    )
    chosen = [rows[place] for place in places]
    parts = rewards.part_scores(chosen)
    return Real(chosen, [right[place] for place in places], parts, rewards.totals(parts))


def find_subjects(rewards: Rewards, rows: Sequence[RewardInput], real: Real) -> list[Subject]:
    """Every reward, then the total if there are several."""
    firsts = list({row.group or str(row.prompt): row for row in rows}.values())
    found = [_subject(name, part, rewards, firsts, real) for name, part in rewards.parts.items()]
    if len(found) == 1:
        return found
    # The total, and rewards of the form, are asked in the form of the reward that says most about the task.
    tasks = sorted(
        (s for s in found if s.purpose == "task" and s.part and s.part.weight),
        key=lambda s: -abs(s.part.weight * s.span) if s.part else 0.0,
    )
    leader = tasks[0] if tasks else found[0]
    found = [replace(s, writer=leader.writer, complete=leader.complete) if s.purpose == "form" else s for s in found]
    values = [score.value for score in real.totals]
    wrong, right = _means(values, real.right)
    low, high = _observed(values)
    top = rewards.highest()
    total = replace(
        leader,
        name=TOTAL,
        purpose="total",
        part=None,
        rows=leader.rows if tasks else _spread(firsts, _count(rewards)),
        low=low,
        high=top if math.isfinite(top) and top > low else high,
        wrong=wrong,
        right=right,
    )
    return [*found, total]


def _subject(name: str, part: Part, rewards: Rewards, firsts: Sequence[RewardInput], real: Real) -> Subject:
    own = [row for row in firsts if part.counts_in(row.fields)]
    rows = _spread(own, MODEL_ROWS if part.rule.runs == "model" else PROBED_ROWS)
    purpose = _purpose(name, part, rewards, real)
    gated = purpose == "form" and part.gated_by is not None
    values = [t.terms.get(name) if gated else s.value for s, t in zip(real.parts[name], real.totals)]
    low, high = part.rule.bounds or (-math.inf, math.inf)
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        low, high = _observed(values)
    wrong, right = _means(values, real.right, (low + high) / 2)
    labelled = any(label is not None for label in real.right)
    bare = Subject(
        name, purpose, part, rows, lambda _, text: text, lambda _: None, False, low, high, wrong, right, labelled
    )
    complete = _complete(part)
    if any(complete(row) is not None for row in rows):
        return replace(bare, writer=_by_perfect(part), complete=complete, declared=True)
    template = _template(bare, rewards) if purpose == "task" else None
    if template is None:
        return bare
    return replace(
        bare,
        writer=lambda _, text: template.format(text),
        complete=lambda row: template.format(gold) if (gold := short_gold(row)) else None,
    )


def _purpose(name: str, part: Part, rewards: Rewards, real: Real) -> Literal["task", "quality", "form"]:
    """For the task, if it reads the gold answer: by what it declares, or because another one changes its verdicts."""
    gold_columns = {
        key for row in real.rows[:1] for key, value in row.fields.items() if value == row.fields.get("answer")
    } | {"answer"}
    if part.rule.perfect is not None or part.rule.needs & gold_columns:
        return "task"
    if part.rule.runs == "model":
        return "quality"
    if part.rule.runs == "inline":
        return "form"
    rows = [row for row in real.rows if "answer" in row.fields and part.counts_in(row.fields)][:16]
    swapped = [with_gold(row, str(other.fields["answer"])) for row, other in zip(rows, [*rows[1:], *rows[:1]])]
    before, after = ([score.value for score in rewards.part_scores(inputs, [name])[name]] for inputs in (rows, swapped))
    return "task" if before != after else "form"


def _by_perfect(part: Part) -> Callable[[RewardInput, str], str]:
    complete = _complete(part)

    def write(row: RewardInput, text: str) -> str:
        """The text alone where the reward's own form does not follow from an answer (a program)."""
        written = complete(with_gold(row, text))
        return text if written is None or text not in written or written == complete(row) else written

    return write


def _complete(part: Part) -> Callable[[RewardInput], str | None]:
    def complete(row: RewardInput) -> str | None:
        if part.rule.perfect is None or not part.rule.needs <= row.fields.keys():
            return None
        try:
            return part.rule.perfect(row.fields)
        except ValueError:  # a row that the reward refuses; its scores say why
            return None

    return complete


def _template(subject: Subject, rewards: Rewards) -> str | None:
    """The common form in which the gold answer is paid best, if one is paid at all."""
    rows = [row for row in subject.rows if short_gold(row)][:4]
    best, best_mean = None, subject.low + subject.span / 2
    for template in _TEMPLATES if rows else ():
        inputs = [replace(row, completion=template.format(short_gold(row)), completion_ids=None) for row in rows]
        paid = mean([score.value for score in rewards.part_scores(inputs, [subject.name])[subject.name]])
        if paid is not None and paid > best_mean:
            best, best_mean = template, paid
    return best


def _means(
    values: Sequence[float | None], right: Sequence[bool | None], middle: float | None = None
) -> tuple[float | None, float | None]:
    """Of wrong and of right answers. Without labels, of values below and above the middle."""
    if all(label is None for label in right):
        known = [value for value in values if value is not None]
        middle = (min(known) + max(known)) / 2 if middle is None and known else middle
        right = [None if value is None or middle is None else value > middle for value in values]
    return tuple(mean([v for v, label in zip(values, right) if label is kind]) for kind in (False, True))  # type: ignore[return-value]


def _observed(values: Sequence[float | None]) -> tuple[float, float]:
    """From the lowest to the highest value, 0 included; 0 to 1 where there is but one."""
    low, high = (extreme([0.0, *(v for v in values if v is not None)]) for extreme in (min, max))
    return (low, high) if low < high else (0.0, 1.0)


def _spread(items: Sequence[Any], count: int) -> list[Any]:
    """At most so many, evenly spaced."""
    return [items[i * len(items) // count] for i in range(count)] if len(items) > count else list(items)


def _count(rewards: Rewards) -> int:
    return MODEL_ROWS if any(part.rule.runs == "model" for part in rewards.parts.values()) else PROBED_ROWS
