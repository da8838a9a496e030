"""Reward functions written for other frameworks: how each framework calls one, and how its answer is read.

    style      called as                                                          gives
    own        fn(completion, prompt, **columns)                                  number or None
    trl        fn(prompts=, completions=, completion_ids=, **columns, ...)        list of number or None
    verl       fn(data_source=, solution_str=, ground_truth=, extra_info=)        number or {"score": number, ...}
    openrlhf   fn(queries, prompts, labels)                                       {"rewards": tensor, ...}
    slime      fn(args, sample), or fn(args, samples) with whole groups           number or {reward_key: number, ...}
    verifiers  fn(parameters by name), or a Rubric of such functions and weights  number

All may be async. The names are those of TRL 1.16, verl 0.9, OpenRLHF 0.11, slime of 2026 and verifiers 0.1. None of
these packages is needed: their objects are recognised by their attributes. This file runs in a worker.
"""

from __future__ import annotations

import asyncio
import inspect
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from types import SimpleNamespace
from typing import Any

Sample = Mapping[str, Any]  # prompt, completion, fields, completion_ids, truncated: JSON values
Verdict = dict[str, Any]  # value, parts (further numbers), info (further values): JSON values

_RESERVED = ("status", "reason", "gate", "routed_away", "cached", "timed_out", "parts")  # keys of info that are ours
_GROUP_NAMES = {"prompts", "completions", "answers", "states", "tasks", "infos"}  # of verifiers' group functions


@dataclass(frozen=True, slots=True)
class Convention:
    """A style.

    `call(function, samples, further arguments, grouped)` gives one verdict per sample; not grouped, there is one
    sample. It raises what the function raises, and TypeError for an answer of the wrong form.
    """

    call: Callable[[Any, Sequence[Sample], Mapping[str, Any], bool], list[Verdict]]
    groups: bool = False  # functions of this style may compare the samples of a group
    first: tuple[str, ...] = ()  # what it is called with by position
    columns: Mapping[str, str] | None = None  # parameter or attribute -> data field; None: parameters are data fields
    provided: frozenset[str] = frozenset()  # parameters that are no data fields
    token_ids: bool = False  # wants completion_ids


def _own(function: Any, samples: Sequence[Sample], kwargs: Mapping[str, Any], grouped: bool) -> list[Verdict]:
    [sample] = samples
    columns = {key: value for key, value in sample["fields"].items() if key not in ("completion", "prompt")}
    given = _accepted(function, {**columns, **kwargs})
    return [_verdict(_settled(function(sample["completion"], sample["prompt"], **given)))]


def _trl(function: Any, samples: Sequence[Sample], kwargs: Mapping[str, Any], grouped: bool) -> list[Verdict]:
    names = dict.fromkeys(key for sample in samples for key in sample["fields"])
    given = {key: [sample["fields"].get(key) for sample in samples] for key in names}
    given |= {
        "prompts": [sample["prompt"] for sample in samples],
        "completions": [_completion(sample) for sample in samples],
        "trainer_state": _NO_TRAINER,
    }
    if all(sample["completion_ids"] is not None for sample in samples):
        given["completion_ids"] = [sample["completion_ids"] for sample in samples]
    for name in ("prompt", "completion"):
        given.pop(name, None)
    info: list[dict[str, Any]] = [{} for _ in samples]

    def log_extra(column: str, values: Sequence[Any]) -> None:
        for entry, value in zip(info, _column(values, len(samples), f"log_extra of {column!r}")):
            entry[column] = value

    def log_metric(name: str, value: Any) -> None:
        for entry in info:
            entry[name] = value

    given |= {"log_extra": log_extra, "log_metric": log_metric, **kwargs}
    values = _column(_settled(function(**_accepted(function, given))), len(samples), "the list of rewards")
    return [_verdict(value, info=entry) for value, entry in zip(values, info)]


def _verl(function: Any, samples: Sequence[Sample], kwargs: Mapping[str, Any], grouped: bool) -> list[Verdict]:
    [sample] = samples
    fields = sample["fields"]
    extra_info = fields.get("extra_info")
    offered = {
        "data_source": fields.get("data_source"),
        "solution_str": sample["completion"],
        "ground_truth": fields.get("answer"),
        "extra_info": {} if extra_info is None else extra_info,
        **kwargs,
    }
    if "solution_str" in inspect.signature(function).parameters:
        answer = _settled(function(**_accepted(function, offered)))
    else:  # those that verl's own dispatcher calls name the solution as they like, and put it first
        answer = _settled(function(sample["completion"], fields.get("answer"), **kwargs))
    if isinstance(answer, Mapping):
        return [_verdict(_entry(answer, "score"), {key: value for key, value in answer.items() if key != "score"})]
    return [_verdict(answer[0] if isinstance(answer, list | tuple) and answer else answer)]


def _openrlhf(function: Any, samples: Sequence[Sample], kwargs: Mapping[str, Any], grouped: bool) -> list[Verdict]:
    prompts = [_text(sample["prompt"]) for sample in samples]
    queries = [prompt + sample["completion"] for prompt, sample in zip(prompts, samples)]
    labels = [sample["fields"].get("answer", "") for sample in samples]
    answer = _settled(function(queries, prompts, labels, **kwargs))
    if not isinstance(answer, Mapping):
        raise TypeError(f'returned a {type(answer).__name__}; an OpenRLHF reward returns {{"rewards": tensor, ...}}')
    logs = {**(answer.get("extra_logs") or {})}
    if answer.get("scores") is not None:
        logs["scores"] = answer["scores"]
    count = len(samples)
    columns = {key: _column(value, count, f"extra_logs of {key!r}", one_for_all=True) for key, value in logs.items()}
    values = _column(_entry(answer, "rewards"), count, "rewards", one_for_all=count == 1)
    return [_verdict(value, {key: columns[key][i] for key in columns}) for i, value in enumerate(values)]


class SlimeStatus(Enum):
    """Equal to the member of slime's own Sample.Status that has the same value."""

    PENDING = "pending"
    COMPLETED = "completed"
    TRUNCATED = "truncated"
    ABORTED = "aborted"
    FAILED = "failed"

    def __eq__(self, other: object) -> bool:
        return self.value == getattr(other, "value", other)

    __hash__ = Enum.__hash__


@dataclass
class SlimeSample:
    """Stands in for slime.utils.types.Sample. `tokens` holds the completion's alone."""

    Status = SlimeStatus

    prompt: str | list[dict[str, str]]
    response: str
    tokens: list[int]
    response_length: int
    label: Any
    metadata: dict[str, Any]
    status: SlimeStatus
    index: int
    group_index: int = 0
    reward: Any = None
    loss_mask: list[int] | None = None
    custom_rm_path: str | None = None
    rollout_log_probs: list[float] | None = None
    multimodal_inputs: dict[str, Any] | None = None
    train_metadata: dict[str, Any] | None = None
    remove_sample: bool = False
    weight_versions: list[str] = field(default_factory=list)


def _slime(function: Any, samples: Sequence[Sample], kwargs: Mapping[str, Any], grouped: bool) -> list[Verdict]:
    args = SimpleNamespace(**{"reward_key": None, "rm_type": None, "custom_rm_path": None, "rm_url": None, **kwargs})
    given = []
    for index, sample in enumerate(samples):
        tokens = sample["completion_ids"] or []
        status = SlimeStatus.TRUNCATED if sample["truncated"] else SlimeStatus.COMPLETED
        label, metadata = sample["fields"].get("answer"), dict(sample["fields"].get("metadata") or {})
        given.append(
            SlimeSample(sample["prompt"], sample["completion"], tokens, len(tokens), label, metadata, status, index)
        )
    if grouped:
        answers = _column(_settled(function(args, given)), len(samples), "the list of rewards")
    else:
        answers = _settled_all([function(args, sample) for sample in given])
    verdicts = []
    for answer in answers:
        if isinstance(answer, Mapping):
            if args.reward_key is None:
                raise TypeError(
                    f"returned a dict of {sorted(map(str, answer))}; say which one counts: kwargs.reward_key"
                )
            rest = {key: value for key, value in answer.items() if key != args.reward_key}
            verdicts.append(_verdict(_entry(answer, args.reward_key), rest))
        else:
            verdicts.append(_verdict(answer))
    return verdicts


def _verifiers(function: Any, samples: Sequence[Sample], kwargs: Mapping[str, Any], grouped: bool) -> list[Verdict]:
    states = []
    for sample in samples:
        state = {"prompt": sample["prompt"], "completion": _completion(sample)}
        defaults = {"answer": "", "task": "default", "info": {}}
        states.append(state | {key: sample["fields"].get(key, default) for key, default in defaults.items()})
    totals, parts = [0.0] * len(samples), [dict[str, Any]() for _ in samples]
    for call, weight, objects in _functions(function):
        further = {**objects, **kwargs}
        if _GROUP_NAMES & inspect.signature(call).parameters.keys():
            if not grouped:
                raise TypeError(f"{_name(call)} compares the samples of a group; set batch: group")
            offered = {f"{key}s": [state[key] for state in states] for key in states[0]} | {"states": states}
            answer = _settled(call(**_accepted(call, offered | further)))
            values = _column(answer, len(samples), f"the list of {_name(call)}")
        else:
            each = [_accepted(call, {**state, "state": state, **further}) for state in states]
            values = _settled_all([call(**given) for given in each])
        for i, value in enumerate(values):
            parts[i][_name(call)] = value
            totals[i] += weight * float(value)
    return [_verdict(total, part) for total, part in zip(totals, parts)]


def _functions(rubric: Any) -> list[tuple[Any, float, Mapping[str, Any]]]:
    """(function, weight, objects it may ask for by name) of a function, a Rubric, or a RubricGroup."""
    if hasattr(rubric, "rubrics"):
        return [entry for member in rubric.rubrics for entry in _functions(member)]
    if not hasattr(rubric, "funcs"):
        return [(rubric, 1.0, {})]
    objects = getattr(rubric, "class_objects", {})
    return [(call, float(weight), objects) for call, weight in zip(rubric.funcs, rubric.weights, strict=True)]


def _name(function: Any) -> str:
    return getattr(function, "__name__", type(function).__name__)


# ---- calls and answers


class _NoTrainer:
    """Stands in for TRL's trainer_state, which cannot be had here: using it is an error that says so."""

    def __bool__(self) -> bool:
        return False

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"trainer_state.{name}: rewards run apart from the trainer here, so they get no state")


_NO_TRAINER = _NoTrainer()
_runner: asyncio.Runner | None = None


def _settled(answer: Any) -> Any:
    """What a call gave, awaited if it has to be."""
    return _settled_all([answer])[0]


def _settled_all(answers: Sequence[Any]) -> list[Any]:
    """The same for several, which are awaited together. One event loop a process: functions keep sessions open."""
    global _runner
    if not any(map(inspect.isawaitable, answers)):
        return list(answers)

    async def wait() -> list[Any]:
        return await asyncio.gather(*answers)

    _runner = _runner or asyncio.Runner()
    return _runner.run(wait())


def _accepted(function: Any, offered: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the offered arguments that the function has parameters for."""
    parameters = inspect.signature(function).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return dict(offered)
    return {key: value for key, value in offered.items() if key in parameters}


def _completion(sample: Sample) -> Any:
    """A message list where the prompt is one, else the text."""
    if isinstance(sample["prompt"], str):
        return sample["completion"]
    return [{"role": "assistant", "content": sample["completion"]}]


def _text(prompt: Any) -> str:
    """A chat as text: its contents, a line each. The tokenizer's template is not known here."""
    return prompt if isinstance(prompt, str) else "".join(f"{message['content']}\n" for message in prompt)


def _entry(answer: Mapping[str, Any], key: str) -> Any:
    if key not in answer:
        raise TypeError(f"returned a dict of {sorted(map(str, answer))} without {key!r}")
    return answer[key]


def _column(values: Any, count: int, what: str, one_for_all: bool = False) -> list[Any]:
    """One value per sample of a list, an array or a tensor; with `one_for_all` a single number stands for all."""
    values = values.tolist() if hasattr(values, "tolist") else values
    if one_for_all and not isinstance(values, list | tuple):
        return [values] * count
    if not isinstance(values, list | tuple) or len(values) != count:
        size = f" of {len(values)}" if isinstance(values, list | tuple) else ""
        raise TypeError(f"{what} is a {type(values).__name__}{size}; it must be a list of {count}, one per sample")
    return list(values)


def _verdict(value: Any, extra: Mapping[str, Any] | None = None, info: Mapping[str, Any] | None = None) -> Verdict:
    """Numbers of `extra` become parts, all else of it info."""
    parts: dict[str, float | None] = {}
    further: dict[str, Any] = dict(info or {})
    for key, entry in (extra or {}).items():
        entry = entry.tolist() if hasattr(entry, "tolist") else entry
        if isinstance(entry, bool | int | float):
            parts[str(key)] = float(entry) if math.isfinite(entry) else None
        else:
            further[key] = entry
    plain = {str(key): json.loads(json.dumps(entry, default=_json)) for key, entry in further.items()}
    kept = {key + "_" if key in _RESERVED else key: entry for key, entry in plain.items()}
    return {"value": _plain_number(value), "parts": parts, "info": kept}


def _json(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else repr(value)


def _plain_number(value: Any) -> Any:
    if hasattr(value, "item"):  # a number of numpy or torch
        value = value.item()
    if value is None or isinstance(value, bool | int | float | str):  # what is wrong with a str is said by as_score
        return value
    raise TypeError(f"returned a {type(value).__name__}; a reward returns a float or None")


_TRL_OWN = frozenset({"prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric"})
STYLES = {
    "own": Convention(_own, first=("completion", "prompt")),
    "trl": Convention(_trl, groups=True, provided=_TRL_OWN, token_ids=True),
    "verl": Convention(
        _verl, columns={"ground_truth": "answer", "data_source": "data_source", "extra_info": "extra_info"}
    ),
    "openrlhf": Convention(
        _openrlhf, groups=True, first=("queries", "prompts", "labels"), columns={"labels": "answer"}
    ),
    "slime": Convention(
        _slime,
        groups=True,
        first=("args", "sample"),
        columns={"label": "answer", "metadata": "metadata"},
        token_ids=True,
    ),
    "verifiers": Convention(_verifiers, groups=True, columns={"answer": "answer", "info": "info", "task": "task"}),
}
