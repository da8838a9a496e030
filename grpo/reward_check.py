"""`grpo rewards check`: a recipe's rewards against its own data, before any training and without a model.

Every gold answer must earn the full reward; an empty completion and another row's gold answer must not. The gold
completion is the recipe's own (data.completion_template or completion_column) where it has one, else what the reward
itself calls perfect.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from grpo.config import Config, ConfigError
from grpo.data import Row, completion_text, load_rows, row_fields
from rewards import RewardInput, Rewards, Score, Status, build_rewards
from rewards.compose import Part

DONORS = 3  # rows whose gold answer is tried on another; golds may be equal and written differently
SHOWN = 3  # rows named in a line
MOST = 12  # lines

Progress = Callable[[str, int, int], None]


@dataclass(slots=True)
class Checked:
    """What came of one reward. The lists hold `file:line (why)`."""

    name: str
    golds: int = 0
    full: float = 1.0  # what a gold answer should score
    low: list[str] = field(default_factory=list)  # gold answers that do not score full
    empty: list[str] = field(default_factory=list)  # rows where saying nothing scores full
    other: list[str] = field(default_factory=list)  # rows where another row's gold answer scores full
    compared: bool = False  # whether another row's gold answer was tried
    unchecked: str = ""  # why nothing could be said

    @property
    def failed(self) -> bool:
        return bool(self.low or self.empty or self.other)


def resources_for(mapping: Mapping[str, Any]) -> dict[str, Any]:
    """What a command outside a run hands to build_rewards: loaders of models, only where a reward asks for them."""
    kinds = [given.get("kind", name) if isinstance(given, Mapping) else name for name, given in mapping.items()]
    if "generative_reward" not in kinds:
        return {}
    from grpo.prepare import reward_resources

    return reward_resources()


def check_rewards(config: Config, limit: int = 0, progress: Progress = lambda what, done, total: None) -> list[Checked]:
    """Checks each reward on the training and held-out rows, or on `limit` of them. Raises ValueError for bad input."""
    if not config.rewards:
        raise ConfigError("rewards is empty; name at least one, e.g. `rewards: {exact_match: 1.0}`")
    with build_rewards(config.rewards, workers=config.run.reward_workers, **resources_for(config.rewards)) as rewards:
        gold = "answer" in rewards.needs()
        rows = [row for side in load_rows(config.data) for row in side]
        rows = rows[:: max(1, len(rows) // limit)][:limit] if limit else rows
        inputs = []
        for row in rows:
            fields = row_fields(row, config.data, gold)
            try:
                rewards.check(fields)
            except ValueError as error:
                raise ConfigError(f"{row.where}: {error}") from None
            inputs.append(RewardInput("", "", fields, group=row.id))
        return [_check(config, rewards, name, part, rows, inputs, progress) for name, part in rewards.parts.items()]


def describe(checks: Sequence[Checked]) -> list[str]:
    """At most MOST lines: for each reward what holds, or which rows fail and what to do."""
    lines = []
    for check in sorted(checks, key=lambda check: not check.failed):
        if check.unchecked:
            lines.append(f"?     {check.name} could not be checked: {check.unchecked}")
        elif not check.failed:
            nothing = "saying nothing or another row's answer does not" if check.compared else "saying nothing does not"
            also = f"; {nothing}" if check.full > 0 else ""
            lines.append(f"ok    {check.name}: all {check.golds:,} gold answers score {check.full:g}{also}")
        for rows, what, remedy in (
            (check.low, f"of {check.golds:,} gold answers do not score {check.full:g}",
             "check data.answer_column, answer_pattern and the completion template"),
            (check.empty, f"rows pay {check.full:g} for an empty completion", "tighten the reward"),
            (check.other, f"rows pay {check.full:g} for another row's gold answer",
             "the reward does not look at the answer; see data.answer_pattern"),
        ):  # fmt: skip
            if rows:
                more = ", ..." if len(rows) > SHOWN else ""
                lines.append(f"FAIL  {check.name}: {len(rows):,} {what}: {', '.join(rows[:SHOWN])}{more}; {remedy}")
    return lines if len(lines) <= MOST else [*lines[: MOST - 1], f"...   and {len(lines) - MOST + 1} more lines"]


def _check(
    config: Config,
    rewards: Rewards,
    name: str,
    part: Part,
    rows: Sequence[Row],
    inputs: Sequence[RewardInput],
    progress: Progress,
) -> Checked:
    result, rule = Checked(name), part.rule
    own = bool(config.data.completion_template or config.data.completion_column)
    if rule.grouped or rule.runs == "model":
        result.unchecked = "it compares the samples of a group" if rule.grouped else "it runs on a model"
        return result
    if not own and rule.perfect is None:
        result.unchecked = "it names no perfect completion; set data.completion_template"
        return result
    golds = [_gold(config, part, row, sample, own) for row, sample in zip(rows, inputs)]
    places = [place for place, gold in enumerate(golds) if gold is not None]
    missing = [row for row, sample, gold in zip(rows, inputs, golds) if gold is None and part.counts_in(sample.fields)]
    if not places:
        result.unchecked = "it names no perfect completion for these rows; set data.completion_template"
        return result

    def scores(what: str, samples: Sequence[RewardInput]) -> list[Score]:
        progress(f"{name}: {what}", 0, 0)
        return rewards.part_scores(samples, [name])[name]

    given = dict(zip(places, scores("gold answers", [_with(inputs[place], golds[place]) for place in places])))
    places = [place for place in places if given[place].status is not Status.NOT_APPLICABLE]
    if not places:
        result.unchecked = "it applies to no gold answer (length rewards need a model's token ids)"
        return result
    result.golds = len(places) + len(missing)
    best = max((score.value for score in given.values() if score.value is not None), default=1.0)
    full = result.full = rule.bounds[1] if rule.bounds else best
    result.low = [_low(rows[place], given[place]) for place in places if not _is_full(given[place], full)]
    result.low += [f"{_short(row)} (no gold answer)" for row in missing]
    if full <= 0:  # a penalty: where nothing is said nothing is punished
        return result
    empty = scores("empty completions", [_with(inputs[place], "") for place in places])
    result.empty = [_short(rows[place]) for place, score in zip(places, empty) if _is_full(score, full)]
    if "answer" in rule.needs or rule.perfect is not None:
        result.compared = True
        result.other = _other_golds(rows, inputs, golds, places, full, scores)
    return result


def _other_golds(
    rows: Sequence[Row],
    inputs: Sequence[RewardInput],
    golds: Sequence[str | None],
    places: Sequence[int],
    full: float,
    scores: Callable[[str, Sequence[RewardInput]], list[Score]],
) -> list[str]:
    """Rows where each of several other rows' gold completions scores full."""
    donors: dict[int, list[str]] = {}
    for at, place in enumerate(places):
        for step in range(1, min(len(places), 50)):
            other = places[(at + step) % len(places)]
            gold = golds[other]
            different = inputs[other].fields.get("answer") != inputs[place].fields.get("answer")
            if gold is not None and different and gold != golds[place] and gold not in donors.get(place, []):
                donors.setdefault(place, []).append(gold)
            if len(donors.get(place, [])) == DONORS:
                break
    suspects = list(donors)
    for donor in range(DONORS):
        tried = [place for place in suspects if donor < len(donors[place])]
        found = scores("another row's answer", [_with(inputs[place], donors[place][donor]) for place in tried])
        cleared = {place for place, score in zip(tried, found) if not _is_full(score, full)}
        suspects = [place for place in suspects if place not in cleared]
        if not suspects:
            break
    return [_short(rows[place]) for place in suspects]


def _gold(config: Config, part: Part, row: Row, sample: RewardInput, own: bool) -> str | None:
    if not part.counts_in(sample.fields):
        return None
    if own:
        return completion_text(row, config.data, sample.fields)
    assert part.rule.perfect is not None
    return part.rule.perfect(sample.fields)


def _with(sample: RewardInput, completion: str | None) -> RewardInput:
    return RewardInput(sample.prompt, completion or "", sample.fields, group=sample.group)


def _is_full(score: Score, full: float) -> bool:
    return score.value is not None and score.value >= full - 1e-9


def _low(row: Row, score: Score) -> str:
    what = str(score.status) if score.value is None else f"{score.value:g}"
    why = str(score.info.get("reason", ""))[:80]
    return f"{_short(row)} ({what}{': ' + why if why else ''})"


def _short(row: Row) -> str:
    return Path(row.where).name
