"""From the `rewards` section of a configuration to something that scores: names and options, checked."""

from __future__ import annotations

import difflib
import importlib
import inspect
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rewards.cache import RewardCache, cached
from rewards.compose import Part, Rewards
from rewards.rule import Rule
from rewards.user_function import user_function
from rewards.worker import WorkerPool

REGISTRY = {
    "code_tests": "rewards.code_tests:code_tests",
    "cosine_length": "rewards.length_rules:cosine_length",
    "exact_match": "rewards.text_rules:exact_match",
    "format_tags": "rewards.text_rules:format_tags",
    "generative_reward": "rewards.generative_reward:generative_reward",
    "group_length": "rewards.length_rules:group_length",
    "gsm8k_answer": "rewards.gsm8k_answer:gsm8k_answer",
    "instruction_following": "rewards.instructions:instruction_following",
    "json_schema": "rewards.json_schema:json_schema",
    "judge": "rewards.judge:judge",
    "language_consistency": "rewards.language_consistency:language_consistency",
    "length": "rewards.length_rules:length",
    "math_answer": "rewards.math_answer:math_answer",
    "multiple_choice": "rewards.multiple_choice:multiple_choice",
    "reasoning_gym": "rewards.reasoning_gym:reasoning_gym",
    "repetition": "rewards.repetition:repetition",
    "reward_model": "rewards.reward_model:reward_model",
    "self_voting": "rewards.self_voting:self_voting",
    "soft_overlong": "rewards.length_rules:soft_overlong",
}
_COMMON = ("weight", "gated_by", "clip", "when", "kind")
_OWN_FUNCTION = ("function", "timeout", "style", "batch", "kwargs")


def build_rewards(
    mapping: Mapping[str, Any],
    *,
    workers: int = 2,
    memory_gb: float = 4.0,
    max_error_share: float = 0.05,
    cache: str | Path = "",
    **resources: Any,
) -> Rewards:
    """Rewards from a configuration section: name -> weight, or name -> {weight, ..., own options}.

    Options of every reward: `weight`; `gated_by` another reward, which must be above 0; `clip: [low, high]`;
    `when: {column: value or list of values}`, the rows it is for; `kind`, the built-in reward meant where the name is
    one of your own (two judges); `function`, a function of your own, or with a `style` of another framework.

    `workers` processes with `memory_gb` of address space each (started on first use) run math_answer and users'
    functions. `cache`: a file that keeps the verdicts of rewards that do not run inline. `resources` are objects a
    reward may ask for by parameter name (a model-based one asks for `generate`). ValueError, in one line naming the
    key: unknown reward or option (with the nearest known), a bad value, a missing resource.
    """
    if not isinstance(mapping, Mapping) or not mapping:
        raise ValueError(f'rewards is {mapping!r}; give at least one, such as {{"math_answer": 1.0}}')
    if not 0 <= max_error_share <= 1:
        raise ValueError(f"max_error_share is {max_error_share!r}; give a share from 0 to 1")
    pool = WorkerPool(workers, memory_gb)
    kept = RewardCache(cache) if cache else None
    resources = {**resources, "pool": pool}
    parts = {name: _part(name, given, mapping, resources, kept) for name, given in mapping.items()}
    if not any(part.weight for part in parts.values()):
        raise ValueError("every weight under rewards is 0; give one reward a weight to learn from")
    return Rewards(parts, pool, max_error_share, kept)


def _part(
    name: str, given: Any, mapping: Mapping[str, Any], resources: Mapping[str, Any], cache: RewardCache | None
) -> Part:
    options = dict(given) if isinstance(given, Mapping) else {"weight": given}
    weight = _number(f"rewards.{name}.weight", options.pop("weight", 1.0))
    gate = options.pop("gated_by", None)
    if gate is not None and (gate not in mapping or gate == name):
        others = [other for other in mapping if other != name]
        raise ValueError(
            f"rewards.{name}.gated_by is {gate!r}{_nearest(gate, others)}; name another reward of: {others}"
        )
    clip, when = _clip(name, options.pop("clip", None)), _when(name, options.pop("when", {}))
    if "timeout" in options and _number(f"rewards.{name}.timeout", options["timeout"]) <= 0:
        raise ValueError(f"rewards.{name}.timeout is {options['timeout']!r}; give a number of seconds above 0")
    if "function" in options:
        if name in REGISTRY:
            raise ValueError(f"rewards.{name} is built in, so it takes no function; give your function another name")
        _check_options(name, options, _OWN_FUNCTION)
        rule = user_function(name, pool=resources["pool"], **options)
    else:
        rule = _built_in(name, dict(options), resources)
    if cache is not None and rule.runs != "inline" and not rule.grouped:
        rule = cached(name, rule, options, cache)
    return Part(rule, weight, gate, clip, when)


def _built_in(name: str, options: dict[str, Any], resources: Mapping[str, Any]) -> Rule:
    kind = options.pop("kind", name)
    if kind not in REGISTRY:
        where = f"unknown reward {name!r} under rewards" if kind == name else f"rewards.{name}.kind is {kind!r}"
        raise ValueError(
            f"{where}{_nearest(kind, REGISTRY)}; known: {', '.join(REGISTRY)}; your own needs a `function`"
        )
    module, _, attribute = REGISTRY[kind].partition(":")
    builder = getattr(importlib.import_module(module), attribute)
    parameters = inspect.signature(builder).parameters
    injected = {key: value for key, value in resources.items() if key in parameters}
    own = [key for key in parameters if key not in injected]
    _check_options(name, options, own)
    for key in own:
        if key not in options and parameters[key].default is inspect.Parameter.empty:
            raise ValueError(f"rewards.{name} needs the option {key!r}; add rewards.{name}.{key}")
    try:
        return builder(**options, **injected)
    except ValueError as error:  # it names its options by the reward's own name
        raise error if kind == name else ValueError(str(error).replace(f"rewards.{kind}", f"rewards.{name}")) from None


def _clip(name: str, given: Any) -> tuple[float, float] | None:
    if given is None:
        return None
    if isinstance(given, str) or not isinstance(given, Sequence) or len(given) != 2:
        raise ValueError(f"rewards.{name}.clip is {given!r}; give [lowest, highest]")
    low, high = (_number(f"rewards.{name}.clip", bound) for bound in given)
    if low > high:
        raise ValueError(f"rewards.{name}.clip is {given!r}; the first number is the lowest")
    return low, high


def _when(name: str, given: Any) -> dict[str, tuple[Any, ...]]:
    if not isinstance(given, Mapping):
        raise ValueError(f"rewards.{name}.when is {given!r}; give a mapping of column to value, such as {{task: math}}")
    return {str(key): tuple(value) if isinstance(value, list | tuple) else (value,) for key, value in given.items()}


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
