"""A user's own function as a reward: found and checked without running it here, called in a killable worker."""

from __future__ import annotations

import ast
import hashlib
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rewards.records import RewardInput, Score, Status
from rewards.rule import Rule, as_score, failure
from rewards.worker import WorkerPool

TARGET = "rewards.user_function:make"


def user_function(name: str, function: str, *, pool: WorkerPool, timeout: float) -> Rule:
    """The reward `fn(completion: str, prompt, **fields) -> float | None` at "pkg.module:fn" or "path/to/file.py:fn".

    Named parameters without a default are the data fields it needs; with **fields it gets every column. Fields reach
    it as JSON values. An exception, a non-number or NaN is an ERROR of that sample; longer than `timeout` seconds is
    a TIMEOUT; neither has a value, because the function is at fault. ValueError: there is no such file, module or
    function.
    """
    where, colon, attribute = function.rpartition(":") if isinstance(function, str) else ("", "", "")
    if not colon or not where or not attribute.isidentifier():
        raise ValueError(f'rewards.{name}.function is {function!r}; write "pkg.module:fn" or "path/to/file.py:fn"')
    source = _source(name, where)
    needs, wanted = _signature(name, source, attribute) if source is not None else (frozenset(), None)
    options = {"function": f"{source if where.endswith('.py') else where}:{attribute}"}

    def score(inputs: Sequence[RewardInput]) -> list[Score]:
        scores: list[Score | None] = [None] * len(inputs)
        items, places = [], []
        for place, sample in enumerate(inputs):
            fields = {key: value for key, value in sample.fields.items() if wanted is None or key in wanted}
            try:
                items.append(_plain({"completion": sample.completion, "prompt": sample.prompt, "fields": fields}))
                places.append(place)
            except TypeError as error:
                scores[place] = failure(Status.ERROR, str(error))
        for place, answer in zip(places, pool.run(TARGET, options, items, timeout), strict=True):
            if answer.status is Status.OK:
                verdict = as_score(answer.result)
                scores[place] = replace(verdict, queue_s=answer.queue_s, run_s=answer.run_s)
            else:
                scores[place] = failure(answer.status, answer.reason, answer.queue_s, answer.run_s)
        assert all(verdict is not None for verdict in scores)
        return scores  # type: ignore[return-value]

    version = hashlib.sha256(source.read_bytes()).hexdigest() if source is not None else "1"
    return Rule(score, needs, runs="worker", version=version)


def make(function: str) -> Callable[[Mapping[str, Any]], Any]:
    """In the worker: import the user's function and call it with the fields it asks for."""
    where, _, attribute = function.rpartition(":")
    if where.endswith(".py"):
        path = Path(where)
        sys.path.insert(0, str(path.parent))  # its neighbours are importable, as when it is run as a script
        module_name = f"user_reward_{path.stem}"
        spec = importlib.util.spec_from_file_location(module_name, path)
        assert spec is not None and spec.loader is not None, path
        module = importlib.util.module_from_spec(spec)
        sys.modules[module_name] = module  # dataclasses look their module up
        spec.loader.exec_module(module)
    else:
        module = importlib.import_module(where)
    call = getattr(module, attribute)
    parameters = inspect.signature(call).parameters
    takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())

    def score(item: Mapping[str, Any]) -> Any:
        fields = {
            key: value
            for key, value in item["fields"].items()
            if key not in ("completion", "prompt") and (takes_all or key in parameters)
        }
        value = call(item["completion"], item["prompt"], **fields)
        if value is None or isinstance(value, bool | int | float | str):
            return value
        if hasattr(value, "item"):  # a number of numpy or torch
            return value.item()
        raise TypeError(f"returned a {type(value).__name__}; a reward returns a float or None")

    return score


def _source(name: str, where: str) -> Path | None:
    """The file that defines the function; None if the module has no Python source."""
    if where.endswith(".py"):
        path = Path(where).expanduser().resolve()
        if not path.is_file():
            raise ValueError(f"rewards.{name}.function: there is no file {path}; give the path of a Python file")
        return path
    try:
        spec = importlib.util.find_spec(where)
    except (ImportError, ValueError):
        spec = None
    if spec is None:
        raise ValueError(
            f"rewards.{name}.function: no module {where!r} on the Python path; check it or give a file path"
        )
    return Path(spec.origin) if spec.origin and spec.origin.endswith(".py") else None


def _signature(name: str, source: Path, attribute: str) -> tuple[frozenset[str], frozenset[str] | None]:
    """(fields the function requires, fields it takes or None for all), read from its source without running it."""
    try:
        tree = ast.parse(source.read_bytes())
    except SyntaxError as error:
        raise ValueError(f"rewards.{name}.function: {source}:{error.lineno} is not valid Python: {error.msg}") from None
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    found = [node for node in functions if node.name == attribute]
    if not found:
        if attribute in source.read_text(encoding="utf-8", errors="replace"):  # imported, assigned, or made in an if
            return frozenset(), None
        raise ValueError(f"rewards.{name}.function: {source} defines no {attribute!r}; name a function of that file")
    if isinstance(found[-1], ast.AsyncFunctionDef):
        raise ValueError(f"rewards.{name}.function: {attribute!r} is async; give a plain function")
    arguments = found[-1].args
    positional = [*arguments.posonlyargs, *arguments.args]
    if len(positional) < 2 and arguments.vararg is None:
        raise ValueError(
            f"rewards.{name}.function: {attribute!r} must take (completion, prompt, ...) as its first two parameters"
        )
    required = positional[2 : max(2, len(positional) - len(arguments.defaults))]
    required += [
        arg for arg, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True) if default is None
    ]
    taken = frozenset(argument.arg for argument in [*positional[2:], *arguments.kwonlyargs])
    return frozenset(argument.arg for argument in required), None if arguments.kwarg is not None else taken


def _plain(value: Any) -> Any:
    """The value as JSON values; arrays become lists, dates ISO text. TypeError names what has no such form."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, bytes | bytearray):
        raise TypeError("a field of bytes cannot be handed to a reward function; store text or numbers")
    if isinstance(value, Sequence | set | frozenset):
        return [_plain(entry) for entry in value]
    if hasattr(value, "tolist"):  # numpy
        return _plain(value.tolist())
    if hasattr(value, "isoformat"):
        return value.isoformat()
    raise TypeError(
        f"a field of type {type(value).__name__} cannot be handed to a reward function; store text or numbers"
    )
