"""The json_schema reward: the answer is JSON that a schema allows.

Parsing and validation run in a worker: a pattern of the schema may backtrack for ever on the model's text, and deep
nesting may exhaust the stack.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

from rewards.records import RewardInput, Score, Status
from rewards.rule import Rule, failure
from rewards.text_rules import answer_part
from rewards.worker import Answer, WorkerPool

TARGET = "rewards.json_schema:make"


def json_schema(
    *, pool: WorkerPool, schema: Mapping[str, Any] | None = None, column: str = "schema", timeout: float = 2.0
) -> Rule:
    """1.0 if the completion's answer is JSON that validates against the schema, else 0.0 with the first error in info.

    The answer is what follows </think> (in it the last <answer> pair), in that the last fenced block (``` or ```json),
    else all of it. `schema`: one for all rows (JSON Schema, the draft that its $schema names, 2020-12 without); else
    each row has its own in `column`, a mapping or JSON text. NaN and Infinity are no JSON. References to other
    documents are not followed. An invalid schema of a row is UNPARSEABLE_GOLD. More than `timeout` seconds are the
    completion's doing: 0.0, with the reason in info. ValueError: jsonschema is not installed, or `schema` is no valid
    schema."""
    if importlib.util.find_spec("jsonschema") is None:
        raise ValueError("rewards.json_schema needs jsonschema; pip install 'grpo-v3[rewards]'")
    if schema is not None:
        problem = schema_problem(schema)
        if problem:
            raise ValueError(f"rewards.json_schema.schema is no valid JSON Schema: {problem}")
    pool.preload(TARGET, {})
    one_for_all = None if schema is None else json.dumps(schema)

    def score(inputs: Sequence[RewardInput]) -> list[Score]:
        scores: list[Score | None] = [None] * len(inputs)
        items, places = [], []
        for place, sample in enumerate(inputs):
            given = sample.fields.get(column) if one_for_all is None else one_for_all
            try:
                text = given if isinstance(given, str) else json.dumps(given)
            except TypeError as error:
                scores[place] = failure(Status.UNPARSEABLE_GOLD, f"the schema is no JSON: {error}")
                continue
            items.append({"schema": text, "answer": json_part(sample.completion)})
            places.append(place)
        for place, answer in zip(places, pool.run(TARGET, {}, items, timeout), strict=True):
            scores[place] = _verdict(answer)
        assert all(verdict is not None for verdict in scores)
        return scores  # type: ignore[return-value]

    needs = frozenset[str]() if schema is not None else frozenset({column})
    return Rule(score, needs, (0.0, 1.0), runs="worker")


def json_part(completion: str) -> str:
    """The part of a completion that should be JSON: the last fenced block of the answer, else all of it."""
    text, _ = answer_part(completion)
    end = text.rfind("```")
    start = text.rfind("```", 0, max(end, 0))
    if start < 0:
        return text.strip()
    language, newline, block = text[start + 3 : end].partition("\n")
    return (block if newline and language.strip().lower() in ("", "json") else text).strip()


def schema_problem(schema: Any) -> str:
    """Why it is no JSON Schema, in one line; "" if it is one."""
    from jsonschema.exceptions import SchemaError
    from jsonschema.validators import Draft202012Validator, validator_for

    if not isinstance(schema, Mapping | bool):
        return f"it is a {type(schema).__name__}; give a mapping"
    try:
        validator_for(schema, default=Draft202012Validator).check_schema(schema)  # pyright: ignore[reportArgumentType]
    except SchemaError as error:
        return f"{error.json_path}: {error.message}"[:300].replace("\n", " ")
    except RecursionError:
        return "it is nested too deep"
    return ""


def make() -> Callable[[Mapping[str, str]], tuple[float | None, str]]:
    """In the worker: a function of {"schema", "answer"}: (value, reason); no value where the schema is at fault."""
    from jsonschema.validators import Draft202012Validator, validator_for
    from referencing import Registry
    from referencing.exceptions import Unresolvable

    @lru_cache(maxsize=64)
    def read_schema(text: str) -> tuple[Any, str]:
        try:
            schema = json.loads(text)
        except (ValueError, RecursionError) as error:
            return None, f"the schema is no JSON: {error}"
        problem = schema_problem(schema)
        if problem:
            return None, f"the schema is no valid JSON Schema: {problem}"
        kind = validator_for(schema, default=Draft202012Validator)
        return kind(schema, registry=Registry()), ""  # a registry of its own: the default one opens URLs

    def refuse(constant: str) -> Any:
        raise ValueError(f"{constant} is no JSON")

    def check(item: Mapping[str, str]) -> tuple[float | None, str]:
        validator, problem = read_schema(item["schema"])
        if validator is None:
            return None, problem
        try:
            answer = json.loads(item["answer"], parse_constant=refuse)
        except ValueError as error:
            return 0.0, f"no JSON: {error}"
        except RecursionError:
            return 0.0, "nested too deep"
        try:
            error = next(validator.iter_errors(answer), None)
        except RecursionError:
            try:
                validator.is_valid(None)
            except RecursionError:
                return None, "the schema refers to itself without end"
            return 0.0, "nested too deep"
        except Unresolvable as error:
            return None, f"the schema refers to {error!s:.80}, which it does not hold"
        return (1.0, "") if error is None else (0.0, f"{error.json_path}: {error.message}"[:200])

    return check


def _verdict(answer: Answer) -> Score:
    if answer.status is Status.TIMEOUT:
        info = {"reason": f"the answer took too long to check: {answer.reason}", "timed_out": True}
        verdict = Score(0.0, info=info)
    elif answer.status is not Status.OK:
        verdict = failure(answer.status, answer.reason)
    elif answer.result[0] is None:
        verdict = failure(Status.UNPARSEABLE_GOLD, answer.result[1])
    else:
        value, reason = answer.result
        verdict = Score(value, info={"reason": reason} if reason else {})
    return replace(verdict, queue_s=answer.queue_s, run_s=answer.run_s)
