"""From the `rewards` section of a configuration to something that scores: names, options, weights, gates, the total."""

from __future__ import annotations

import difflib
import importlib
import inspect
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rewards.records import RewardInput, Score, Status
from rewards.rule import Rule, failure
from rewards.user_function import user_function
from rewards.worker import WorkerPool

REGISTRY = {
    "math_answer": "rewards.math_answer:math_answer",
    "exact_match": "rewards.text_rules:exact_match",
    "format_tags": "rewards.text_rules:format_tags",
    "length": "rewards.length_rules:length",
    "soft_overlong": "rewards.length_rules:soft_overlong",
}
_COMMON = ("weight", "gated_by")
_OWN_FUNCTION = ("function", "timeout")
_WORST_FIRST = (Status.ERROR, Status.TIMEOUT, Status.UNPARSEABLE_GOLD, Status.NOT_APPLICABLE)


class RewardFailure(RuntimeError):
    """Rewards failed on too many samples for the run to be trusted."""


@dataclass(frozen=True, slots=True)
class Part:
    """One reward of the mapping."""

    rule: Rule
    weight: float
    gated_by: str | None


class Rewards:
    """What build_rewards returns. Safe to use from any thread; a worker pool is shared by all parts."""

    def __init__(self, parts: Mapping[str, Part], pool: WorkerPool, max_error_share: float) -> None:
        self.parts = dict(parts)
        self.max_error_share = max_error_share
        self._pool = pool

    @property
    def weights(self) -> dict[str, float]:
        """Reward name -> weight."""
        return {name: part.weight for name, part in self.parts.items()}

    def highest(self) -> float:
        """No total is above this; infinite where a reward that counts does not know its bounds."""
        tops = [
            max(part.weight * bound for bound in part.rule.bounds) if part.rule.bounds else math.inf
            for part in self.parts.values()
            if part.weight
        ]
        return sum(max(0.0, top) for top in tops)  # 0: what does not apply, or has a shut gate, adds nothing

    def needs(self) -> set[str]:
        """Every data field that some reward cannot do without."""
        return {name for part in self.parts.values() for name in part.rule.needs}

    def check(self, fields: Iterable[str]) -> None:
        """Raise ValueError naming the reward and the field that the data lack."""
        have = set(fields)
        for name, part in self.parts.items():
            for missing in sorted(part.rule.needs - have):
                raise ValueError(
                    f"rewards.{name} needs the data field {missing!r}, the data have {sorted(have)}; "
                    "set data.answer_column or add the column"
                )

    def score(self, inputs: Sequence[RewardInput]) -> list[Score]:
        """One total per input, in order.

        value: sum of weight * part over the parts that apply; parts: every part's own value; info: {part: {"status",
        ...}}. A NOT_APPLICABLE part is left out. A part of non-zero weight that failed (ERROR, TIMEOUT,
        UNPARSEABLE_GOLD) makes the total that status without a value: a sample is never scored lower because a grader
        broke. A part of weight 0 is only watched.
        """
        scores = {name: _run(name, part.rule, inputs) for name, part in self.parts.items()}
        return [self._total({name: column[i] for name, column in scores.items()}) for i in range(len(inputs))]

    def close(self) -> None:
        """Stop the worker processes."""
        self._pool.close()

    def __enter__(self) -> Rewards:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _total(self, scores: Mapping[str, Score]) -> Score:
        total, statuses = 0.0, set[Status]()
        info: dict[str, dict[str, Any]] = {}
        for name, part in self.parts.items():
            score = scores[name]
            info[name] = {"status": str(score.status), **score.info}
            if not part.weight:
                continue
            counts = True
            if part.gated_by is not None:
                gate = scores[part.gated_by]
                if gate.value is None:
                    statuses.add(gate.status)
                    info[name]["gate"] = str(gate.status)
                    continue
                counts = gate.value > 0
                info[name]["gate"] = "open" if counts else "shut"
            if counts or score.value is not None:
                statuses.add(score.status)
            else:  # a shut gate: the part adds 0 whatever it would have said
                statuses.add(Status.OK)
            if counts and score.value is not None:
                total += part.weight * score.value
        failed = [status for status in _WORST_FIRST if status in statuses]
        if failed and (failed[0] is not Status.NOT_APPLICABLE or Status.OK not in statuses):
            value, status = None, failed[0]
        else:
            value, status = total, Status.OK
        return Score(
            value,
            status,
            parts={name: score.value for name, score in scores.items()},
            info=info,
            queue_s=sum(score.queue_s for score in scores.values()),
            run_s=sum(score.run_s for score in scores.values()),
        )


def build_rewards(
    mapping: Mapping[str, Any],
    *,
    workers: int = 2,
    memory_gb: float = 4.0,
    max_error_share: float = 0.05,
    **resources: Any,
) -> Rewards:
    """Rewards from a configuration section: name -> weight, or name -> {weight, gated_by, function, own options}.

    `workers` processes with `memory_gb` of address space each (started on first use) run math_answer and users'
    functions. `resources` are objects a reward may ask for by parameter name (a model-based one asks for `generate`).
    ValueError, in one line naming the key: unknown reward or option (with the nearest known), a bad value, a missing
    resource.
    """
    if not isinstance(mapping, Mapping) or not mapping:
        raise ValueError(f'rewards is {mapping!r}; give at least one, such as {{"math_answer": 1.0}}')
    if not 0 <= max_error_share <= 1:
        raise ValueError(f"max_error_share is {max_error_share!r}; give a share from 0 to 1")
    pool = WorkerPool(workers, memory_gb)
    parts = {name: _part(name, given, mapping, {**resources, "pool": pool}) for name, given in mapping.items()}
    if not any(part.weight for part in parts.values()):
        raise ValueError("every weight under rewards is 0; give one reward a weight to learn from")
    return Rewards(parts, pool, max_error_share)


def error_share(scores: Sequence[Score]) -> float:
    """The share of scores that failed by ERROR or TIMEOUT: the grader's failures, not the completion's."""
    return sum(score.status in (Status.ERROR, Status.TIMEOUT) for score in scores) / max(1, len(scores))


def raise_if_failing(scores: Sequence[Score], max_error_share: float) -> None:
    """The circuit breaker, for the loop to call on a batch: RewardFailure if more than that share failed.

    A single failed sample never stops a run, however small the batch.
    """
    failed = [score for score in scores if score.status in (Status.ERROR, Status.TIMEOUT)]
    if len(failed) < 2 or error_share(scores) <= max_error_share:
        return
    reasons = Counter(
        f"{name}: {part.get('reason', part['status'])}"
        for score in failed
        for name, part in score.info.items()
        if isinstance(part, Mapping) and part.get("status") in (Status.ERROR, Status.TIMEOUT)
    )
    raise RewardFailure(
        f"rewards failed on {len(failed)} of {len(scores)} samples (allowed share {max_error_share:g}); "
        f"most often {reasons.most_common(1)[0][0] if reasons else 'without a reason'}"
    )


def _run(name: str, rule: Rule, inputs: Sequence[RewardInput]) -> list[Score]:
    """The rule's scores; a field that a row lacks is an ERROR of that sample and stays out of the rule's sight."""
    scores: list[Score | None] = [None] * len(inputs)
    places = []
    for place, sample in enumerate(inputs):
        missing = sorted(rule.needs - sample.fields.keys())
        if missing:
            scores[place] = failure(Status.ERROR, f"the row has no field {missing[0]!r}")
        else:
            places.append(place)
    answers = rule.score([inputs[place] for place in places]) if places else []
    assert len(answers) == len(places), f"{name} gave {len(answers)} scores for {len(places)} inputs"
    for place, answer in zip(places, answers):
        scores[place] = answer
    return scores  # type: ignore[return-value]


def _part(name: str, given: Any, mapping: Mapping[str, Any], resources: Mapping[str, Any]) -> Part:
    options = dict(given) if isinstance(given, Mapping) else {"weight": given}
    weight = _number(f"rewards.{name}.weight", options.pop("weight", 1.0))
    gate = options.pop("gated_by", None)
    if gate is not None and (gate not in mapping or gate == name):
        others = [other for other in mapping if other != name]
        raise ValueError(
            f"rewards.{name}.gated_by is {gate!r}{_nearest(gate, others)}; name another reward of: {others}"
        )
    if "timeout" in options and _number(f"rewards.{name}.timeout", options["timeout"]) <= 0:
        raise ValueError(f"rewards.{name}.timeout is {options['timeout']!r}; give a number of seconds above 0")
    if "function" in options:
        if name in REGISTRY:
            raise ValueError(f"rewards.{name} is built in, so it takes no function; give your function another name")
        _check_options(name, options, _OWN_FUNCTION)
        rule = user_function(
            name, options["function"], pool=resources["pool"], timeout=float(options.get("timeout", 10.0))
        )
    else:
        rule = _built_in(name, options, resources)
    return Part(rule, weight, gate)


def _built_in(name: str, options: Mapping[str, Any], resources: Mapping[str, Any]) -> Rule:
    if name not in REGISTRY:
        raise ValueError(
            f"unknown reward {name!r} under rewards{_nearest(name, REGISTRY)}; "
            f"known: {', '.join(REGISTRY)}; your own needs a `function`"
        )
    module, _, attribute = REGISTRY[name].partition(":")
    builder = getattr(importlib.import_module(module), attribute)
    parameters = inspect.signature(builder).parameters
    injected = {key: value for key, value in resources.items() if key in parameters}
    own = [key for key in parameters if key not in injected]
    _check_options(name, options, own)
    for key in own:
        if key not in options and parameters[key].default is inspect.Parameter.empty:
            raise ValueError(f"rewards.{name} needs the option {key!r}; add rewards.{name}.{key}")
    return builder(**options, **injected)


def _check_options(name: str, options: Mapping[str, Any], known: Sequence[str]) -> None:
    every = [*_COMMON, *known]
    for option in options:
        if option not in known:
            raise ValueError(
                f"unknown option rewards.{name}.{option}{_nearest(option, every)}; known: {', '.join(every)}"
            )


def _nearest(word: object, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(str(word), list(known), n=1, cutoff=0.5)
    return f", did you mean {close[0]!r}?" if close else ""


def _number(key: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{key} is {value!r}; give a finite number")
    return float(value)
